#!/usr/bin/env python3
"""Our operations against PyTorch's, on the same tensors, in turn: medians of ratios, with quartiles.

    python3 -m venv target/peers && target/peers/bin/pip install -r benches/peers/requirements.txt
    target/peers/bin/python benches/peers/run.py --tokens 4096 32768 --dtype bf16 f32

Peers: kvpress's own code (SnapKVPress.score, AdaKVPress.compress, CriticalKVPress.vwl1norm), fed with tensors in place of a model,
and PyTorch as well as we could write it (`Tuned`). One layer of Llama-3.1-8B; a fifth is kept. Both sides use as many threads.
Before anything is timed, scores and selections are compared. Start it under jemalloc (LD_PRELOAD) to give PyTorch its best allocator.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from kvpress import AdaKVPress, CriticalKVPress, SnapKVPress
from kvpress.presses import snapkv_press
from safetensors.torch import save_file

HQ, H, D, HIDDEN = 32, 8, 128, 4096
G = HQ // H
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Peer:
    """Our side: a process that does what it is told and says how long it took."""

    def __init__(self, path):
        build = ["cargo", "bench", "-p", "kvbudget", "--bench", "peers", "--no-run", "--message-format=json"]
        lines = subprocess.run(build, check=True, capture_output=True, text=True).stdout.splitlines()
        found = [m["executable"] for m in map(json.loads, lines) if m.get("target", {}).get("name") == "peers"]
        env = dict(os.environ, RAYON_NUM_THREADS=str(torch.get_num_threads()))
        env.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen([found[-1], path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def __call__(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()) / 1e6


class Kvpress:
    """kvpress's own code on tensors."""

    def __init__(self, x):
        self.x = x
        config = SimpleNamespace(
            num_attention_heads=HQ, num_key_value_heads=H, head_dim=D, hidden_size=HIDDEN, _attn_implementation="sdpa")
        self.module = SimpleNamespace(
            config=config, head_dim=D, num_key_value_groups=G, o_proj=SimpleNamespace(weight=x.o_proj))
        # The queries after RoPE, in place of a projection: cos = 1, sin = 0.
        snapkv_press.get_prerope_query_states = lambda module, hidden: x.q[None]
        one, zero = torch.ones(1, x.window, D, dtype=x.q.dtype), torch.zeros(1, x.window, D, dtype=x.q.dtype)
        self.kwargs = {"position_embeddings": (one, zero)}
        self.hidden = torch.empty(1, x.window + 1, 1)
        self.snap = SnapKVPress(compression_ratio=0.8, window_size=x.window, kernel_size=5)

    def score(self):
        x = self.x
        self.scores = self.snap.score(self.module, self.hidden, x.k[None], x.v[None], None, self.kwargs)

    def select(self):
        press = SimpleNamespace(score=lambda *_: self.scores.clone(), compression_ratio=0.8)
        ada = AdaKVPress.__new__(AdaKVPress)
        ada.press, ada.alpha_safeguard = press, 0.2
        ada.compress(self.module, self.hidden, self.x.k[None], self.x.v[None], None, self.kwargs)

    def gather(self):
        """kvpress masks what AdaKV drops; to free memory it has to be copied."""
        _, heads, slots = self.module.masked_key_indices
        mask = torch.ones(H, self.x.tokens, dtype=torch.bool)
        mask[heads, slots] = False
        self.kept = [self.x.k[mask], self.x.v[mask]]

    def layer(self):
        self.score(), self.select(), self.gather()

    def norms(self):
        self.result = CriticalKVPress.vwl1norm(self.x.v[None], self.module)


class Tuned:
    """PyTorch as well as we can: no copies of K, buffers made once, one head's logits at a time, index_select."""

    def __init__(self, x):
        self.x = x
        rows, past = G * x.window, x.tokens - x.window
        self.q = x.q.view(H, rows, D) * (1 / math.sqrt(D))
        self.logits = torch.empty(rows, x.tokens, dtype=x.k.dtype)
        self.p = torch.empty(rows, x.tokens, dtype=x.k.dtype)
        w = torch.arange(rows) % x.window
        self.mask = torch.zeros(rows, x.window, dtype=x.k.dtype)
        self.mask[torch.arange(x.window)[None] > w[:, None]] = -math.inf
        self.weights = torch.full((1, rows), 1 / rows, dtype=x.k.dtype)
        self.scores = torch.empty(H, x.tokens)
        self.past = past

    def score(self):
        for h in range(H):
            torch.mm(self.q[h], self.x.k[h].T, out=self.logits)
            self.logits[:, self.past:] += self.mask
            torch.softmax(self.logits, -1, out=self.p)
            # The mean as a product: sums in f32, reads P once.
            mean = torch.mm(self.weights, self.p)[:, : self.past].float()
            self.scores[h, : self.past] = F.avg_pool1d(mean, 5, 1, 2, count_include_pad=True)[0]
        self.scores[:, self.past:] = math.inf

    def select(self):
        tokens, window = self.x.tokens, self.x.window
        floor = max(tokens // 25, window)
        scores = self.scores.clone()
        scores.scatter_(1, torch.topk(self.scores, floor, sorted=False).indices, math.inf)
        flat = torch.topk(scores.view(-1), H * (tokens // 5), sorted=False).indices
        mask = torch.zeros(H * tokens, dtype=torch.bool)
        mask[flat] = True
        self.slots = mask.nonzero().flatten()

    def gather(self):
        flat = self.x.k.view(-1, D), self.x.v.view(-1, D)
        self.kept = [t.index_select(0, self.slots) for t in flat]

    def layer(self):
        self.score(), self.select(), self.gather()

    def attend(self):
        """Over a dense cache of a fifth: what a ragged one would be at best."""
        x, n = self.x, self.x.tokens // 5
        self.out = F.scaled_dot_product_attention(
            x.q[None, :, :1], x.k[None, :, :n], x.v[None, :, :n], enable_gqa=True)

    def dense(self):
        x = self.x
        self.out = F.scaled_dot_product_attention(x.q[None, :, :1], x.k[None], x.v[None], enable_gqa=True)


def compare(x, ours, tuned):
    """Scores to rounding, and almost the same slots."""
    path = os.path.join(x.folder, "result")
    ours("layer"), ours(f"write {path}")
    tuned.layer()
    data = np.fromfile(path, dtype=np.uint32)
    at, worst, common, total = 0, 0.0, 0, 0
    kept = torch.zeros(H * x.tokens, dtype=torch.bool)
    kept[tuned.slots] = True
    for h in range(H):
        scores = data[at:at + x.tokens].view(np.float32)
        past = slice(0, x.tokens - x.window)
        other = tuned.scores[h].numpy()[past]
        worst = max(worst, float(np.abs(scores[past] - other).max() / other.max()))
        n = int(data[at + x.tokens])
        slots = data[at + x.tokens + 1:at + x.tokens + 1 + n].astype(np.int64)
        common += int(kept[h * x.tokens + torch.from_numpy(slots)].sum())
        total += n
        at += x.tokens + 1 + n
    assert total == len(tuned.slots), (total, len(tuned.slots))
    limit = 1e-5 if x.q.dtype == torch.float32 else 2e-2
    assert worst < limit, f"scores differ by {worst} of the largest"
    assert common >= 0.97 * total, f"{common} of {total} slots in common"
    return worst, common / total


def timed(f):
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


def alternate(ours, what, rival, rounds):
    """Milliseconds of ours and of the rival, and their ratios, round by round."""
    ours(what), rival()
    rows = [(ours(what), timed(rival)) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in rows)
    quartile = lambda q: ratios[round(q * (len(ratios) - 1))]
    mine, theirs = (statistics.median(column) for column in zip(*rows))
    return mine, theirs, quartile(0.5), quartile(0.25), quartile(0.75)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "f32"], choices=DTYPES)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--norms", action="store_true", help="value norms too, which take a second a round")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, W = {args.window}, milliseconds, medians of {args.rounds}")
    for dtype in args.dtype:
        for tokens in args.tokens:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                torch.manual_seed(0)
                new = lambda *shape: torch.randn(*shape).to(DTYPES[dtype])
                x = SimpleNamespace(
                    q=new(HQ, args.window, D), k=new(H, tokens, D), v=new(H, tokens, D), o_proj=new(HIDDEN, HQ * D),
                    tokens=tokens, window=args.window, folder=folder)
                path = os.path.join(folder, "tensors")
                save_file({name: getattr(x, name) for name in ("q", "k", "v", "o_proj")}, path)
                ours, tuned, kvpress = Peer(path), Tuned(x), Kvpress(x)
                worst, common = compare(x, ours, tuned)
                kvpress.layer()
                copies = [ours("copy") for _ in range(7)]
                bandwidth = 2 * 8 * (32 << 20) / statistics.median(copies) / 1e6
                print(f"\n{dtype}, T = {tokens}: scores within {worst:.1e}, {common:.2%} of slots in common; copy {bandwidth:.1f} GB/s")
                print("| operation | ours | rival | ms | ratio | quartiles |\n|---|---|---|---|---|---|")
                cases = [
                    ("layer", "tuned", tuned.layer), ("layer", "kvpress", kvpress.layer), ("score", "tuned", tuned.score),
                    ("select", "tuned", tuned.select), ("select", "kvpress", kvpress.select), ("gather", "tuned", tuned.gather),
                    ("attend", "sdpa on a dense fifth", tuned.attend), ("dense", "sdpa", tuned.dense),
                    ("defensive", "tuned SnapKV", tuned.score),
                ]
                if args.norms:
                    cases += [("norms", "kvpress", kvpress.norms), ("grams", "kvpress L1", kvpress.norms)]
                for what, rival, run in cases:
                    mine, theirs, ratio, low, high = alternate(ours, what, run, args.rounds)
                    # The others leave scores and slots of their own.
                    if what in ("defensive", "norms", "grams"):
                        ours("layer")
                    print(f"| {what} | {mine:.2f} | {rival} | {theirs:.2f} | {ratio:.2f} | {low:.2f} - {high:.2f} |", flush=True)
                ours("ties")
                ties = statistics.median(ours("select") for _ in range(args.rounds))
                print(f"| select, all equal | {ties:.2f} | | | | |")


if __name__ == "__main__":
    main()
