"""Checks what the demo wrote: every policy and budget there, budgets met exactly, errors that make sense, pictures.

usage: check-demo.py DEMO-FOLDER TABLE
"""

import json
import os
import sys

folder, table = sys.argv[1:]
with open(os.path.join(folder, "results.json")) as file:
    results = json.load(file)
rows = {(row["policy"], row["budget"]): row for row in results["rows"]}
text = open(table).read()
named = "snapkv ada-snapkv ada-criticalkv defensivekv layer-defensivekv streaming knorm random".split()
full = results["dump"]["full_slots"]
for percent in (5, 10, 20, 40):
    for policy in named:
        row = rows[policy, f"{percent}%"]
        assert row["slots"] == full * percent // 100, row
        assert 0 < row["retained_mass"] < 1, row
        assert 0 < row["output_error"]["mean"] <= row["output_error"]["p95"], row
        assert f"\n{policy} " in text, f"{policy} is not in the table"
    error = {p: rows[p, f"{percent}%"]["output_error"]["mean"] for p in named}
    mass = {p: rows[p, f"{percent}%"]["retained_mass"] for p in named}
    assert max(error, key=error.get) == "random", error
    assert mass["layer-defensivekv"] > mass["snapkv"] > mass["random"], mass
for policy in named:
    errors = [rows[policy, f"{p}%"]["output_error"]["mean"] for p in (5, 10, 20, 40)]
    assert errors[0] > errors[3], f"{policy}: more budget, more error: {errors}"
for name, magic in [("map.svg", b"<svg"), ("error.svg", b"<svg"), ("map.png", b"\x89PNG"), ("error.png", b"\x89PNG")]:
    with open(os.path.join(folder, name), "rb") as file:
        start = file.read(4096)
    assert magic in start, name
with open(os.path.join(folder, "plan.json")) as file:
    plan = json.load(file)
kept = sum(len(head["kept"]) for layer in plan["layers"] for head in layer["heads"])
assert kept == plan["slots"] == full // 5, (kept, plan["slots"])
print(f"demo: {len(rows)} rows, budgets exact, pictures there")
