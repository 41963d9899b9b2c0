"""Plans a cache of T = 131072, H = 8, D = 128 in bf16 and fails if memory passes 1.5 times the dump's size.

usage: large-plan.py KVBUDGET SCRATCH
"""

import json
import os
import resource
import struct
import subprocess
import sys

binary, scratch = sys.argv[1:]
LAYERS, HEADS, GROUP, TOKENS, DIM, WINDOW = 2, 8, 4, 131072, 128, 32
SIGNS = bytes(0x3F | (i & 0x80) for i in range(256))
MANTISSA = bytes(i | 0x80 for i in range(256))


def noise(elements):
    """bf16 values in ±[1, 2): finite, little endian."""
    out = bytearray(2 * elements)
    out[0::2] = os.urandom(elements).translate(MANTISSA)
    out[1::2] = os.urandom(elements).translate(SIGNS)
    return out


tensors = {}
offset = 0
for layer in range(LAYERS):
    for name, shape in [
        ("k", [HEADS, TOKENS, DIM]),
        ("v", [HEADS, TOKENS, DIM]),
        ("q", [HEADS * GROUP, WINDOW, DIM]),
    ]:
        size = 2 * shape[0] * shape[1] * shape[2]
        tensors[f"l{layer}.{name}"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
header = json.dumps(tensors).encode()
header += b" " * (-len(header) % 8)
dump = os.path.join(scratch, "large.safetensors")
with open(dump, "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header)
    rest = offset // 2
    while rest > 0:
        chunk = min(rest, 1 << 24)
        file.write(noise(chunk))
        rest -= chunk

plan = os.path.join(scratch, "large.json")
arguments = ["plan", dump, "--policy", "ada-snapkv", "--budget", "20%", "-o", plan]
subprocess.run([binary, *arguments], check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
size = os.path.getsize(dump)
os.remove(dump)
with open(plan) as file:
    slots = json.load(file)["slots"]
print(f"input {size / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB, {slots} slots")
assert slots == LAYERS * HEADS * TOKENS // 5, slots
assert peak <= 1.5 * size, "memory passes 1.5 times the input"
