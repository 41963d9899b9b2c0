#!/usr/bin/env python3
"""Our operations against PyTorch's, kvpress's and numpy's, on the same tensors, in turn: ratios, and fractions of the machine's limits.

    python3 -m venv target/peers && target/peers/bin/pip install -r benches/peers/requirements.txt
    target/peers/bin/python benches/peers/run.py --jemalloc /usr/lib/x86_64-linux-gnu/libjemalloc.so.2

One layer of Llama-3.1-8B; a fifth is kept. Both sides use as many threads. Before anything is timed, scores and selections are
compared. Each round times ours, then the rival. Before its clock starts, each side reads 256 MiB with its own threads, so caches are
cold and threads awake on both; and PyTorch's threads, which spin for a while after their work, are waited for.
A ratio is the rival's time by ours, in one round: above 1, we are faster. `limit` is what binds (limits.py), `of it` its time by ours.
"""
import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

from limits import D, H, HIDDEN, HQ, LAYERS, Machine, timed
from rivals import APPENDED, Kvpress, Tuned

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Longer than OpenMP's threads spin.
PAUSE = 0.03


class Peer:
    """Our side: a process that does what it is told and says how long it took, in milliseconds."""

    def __init__(self, binary, path):
        env = dict(os.environ, RAYON_NUM_THREADS=str(torch.get_num_threads()))
        env.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen([binary, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def number(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __call__(self, what):
        return self.number(what) / 1e6

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def build():
    command = ["cargo", "bench", "-p", "kvbudget", "--bench", "peers", "--no-run", "--message-format=json-render-diagnostics"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [m["executable"] for m in map(json.loads, lines) if m.get("executable") and m["target"]["name"] == "peers"][-1]


def memory_available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


class Bench:
    """One dtype, length and window: both sides, and a row of the table for each comparison."""

    def __init__(self, args, machine, binary, dtype, tokens, window, folder):
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape).to(DTYPES[dtype])
        self.x = x = SimpleNamespace(
            q=new(HQ, window, D), k=new(H, tokens, D), v=new(H, tokens, D), o_proj=new(HIDDEN, HQ * D), tokens=tokens, window=window)
        self.args, self.machine, self.dtype, self.folder = args, machine, dtype, folder
        path = os.path.join(folder, "tensors")
        save_file({name: getattr(x, name) for name in ("q", "k", "v", "o_proj")}, path)
        self.ours = Peer(binary, path)
        # It has read the file once it answers.
        self.ours("score")
        os.remove(path)
        self.tuned, self.kvpress = Tuned(x), Kvpress(x)

    def result(self, what, type):
        path = os.path.join(self.folder, "result")
        self.ours(f"{what} {path}")
        return np.fromfile(path, dtype=type)

    def kept(self):
        """What we kept, as slots of all heads."""
        data, at, slots, x = self.result("write-kept", np.uint32), 0, [], self.x
        while at < len(data):
            slots.append(len(slots) * x.tokens + data[at + 1:at + 1 + data[at]].astype(np.int64))
            at += 1 + int(data[at])
        return np.concatenate(slots)

    def compare(self):
        """Scores to rounding, and almost the same slots."""
        x, tuned = self.x, self.tuned
        self.ours("layer"), tuned.layer()
        past = slice(0, x.tokens - x.window)
        scores = self.result("write-scores", np.float32).reshape(H, x.tokens)[:, past]
        others = tuned.scores.numpy()[:, past]
        worst = float((np.abs(scores - others).max(1) / others.max(1)).max())
        kept = self.kept()
        assert len(kept) == len(tuned.slots), (len(kept), len(tuned.slots))
        common = len(np.intersect1d(kept, tuned.slots.numpy(), assume_unique=True)) / len(kept)
        limit = 1e-5 if x.q.dtype == torch.float32 else 2e-2
        assert worst < limit, f"scores differ by {worst} of the largest"
        assert common >= 0.97, f"{common} of slots in common"
        return f"scores within {worst:.1e} of tuned, {common:.2%} of slots in common"

    def mine(self, what, before=None):
        """Our side of a round."""
        def run():
            if before:
                self.ours(before)
            time.sleep(PAUSE)
            return self.ours(f"cold {what}")
        return run

    def theirs(self, f, threads=None, calls=1):
        """The rival's side of a round."""
        def run():
            every = torch.get_num_threads()
            if threads:
                torch.set_num_threads(threads)
            self.machine.evict()
            took = timed(f) / calls
            torch.set_num_threads(every)
            return took
        return run

    def row(self, what, mine, rival, theirs, limit=None):
        """Prints a row; returns our median."""
        start = time.perf_counter()
        mine(), theirs()
        once = time.perf_counter() - start
        rounds = min(self.args.rounds, max(3, int(self.args.seconds / once)))
        gc.collect()
        rows = [(mine(), theirs()) for _ in range(rounds)]
        ratios = sorted(theirs / mine for mine, theirs in rows)
        low, ratio, high = (ratios[round(q * (rounds - 1))] for q in (0.25, 0.5, 0.75))
        our, other = (statistics.median(column) for column in zip(*rows))
        bound, binds = self.machine.limit(limit, self.x) if limit else (0, "")
        fraction = f"{bound / our:.0%}" if limit else ""
        cells = [what, f"{our:.4g}", rival, f"{other:.4g}", f"{ratio:.2f}", f"{low:.2f} - {high:.2f}", binds, fraction, rounds]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        return our

    def rival(self, what, of, rival, f, memory=0):
        """A row of an operation against a rival's, or why there is none. What it changes on our side is repaired."""
        if memory > memory_available():
            print(f"| {what} | | {rival} | | skipped: it needs {memory / 1e9:.0f} GB, {memory_available() / 1e9:.0f} are free | | | | |")
            return None
        return self.row(what, self.mine(of), rival, self.theirs(f), of)

    def scoring(self):
        """Rows that depend on the window. Returns our time of a layer."""
        tuned, kvpress, ours = self.tuned, self.kvpress, self.ours
        needed = kvpress.memory("score")
        layer = self.rival("layer", "layer", "tuned", tuned.relayer)
        self.rival("layer, new buffers", "layer-new", "tuned", tuned.layer)
        self.rival("layer, new buffers", "layer-new", "kvpress", kvpress.layer, needed)
        self.rival("score", "score", "tuned", tuned.score)
        self.rival("score", "score", "kvpress", kvpress.score, needed)
        self.row("defensive", self.mine("defensive"), "our score", self.mine("score"), "defensive")
        ours("layer")
        self.row("layer, one thread", self.mine("one layer"), "tuned, one thread", self.theirs(tuned.relayer, 1))
        self.row("layer, two threads", self.mine("layer"), "our one thread", self.mine("one layer"))
        return layer

    def rest(self):
        """Rows that do not depend on the window. Returns our time of appending a token."""
        tuned, kvpress, ours = self.tuned, self.kvpress, self.ours
        tuned.score(), ours("layer")
        if kvpress.memory("score") <= memory_available():
            kvpress.score()
            self.rival("select", "select", "kvpress", kvpress.select)
            kvpress.scores = None
        else:
            print("| select | | kvpress | | skipped: as its scores are | | | | |")
        self.rival("select", "select", "tuned", tuned.select)
        self.rival("select", "select", "torch.topk alone", tuned.topk)
        self.rival("select", "select", "numpy argpartition", tuned.argpartition)
        self.row("select, all equal", self.mine("select", "ties"), "ours, different", self.mine("select", "score"), "select")
        ours("layer"), tuned.select()
        self.rival("gather", "regather", "index_select, same buffers", tuned.regather)
        self.rival("gather, new buffers", "gather", "index_select", tuned.gather)
        self.rival("compact, in place", "compact", "index_select, same buffers", tuned.regather)
        self.row("compact, in place", self.mine("compact"), "our gather", self.mine("regather"), "compact")
        ours("layer")
        append = self.row("append, a token", self.mine("append"), "DynamicCache's cat", self.theirs(tuned.cat), "append")
        self.row("append, a token", self.mine("append"), "StaticCache's index_copy_", self.theirs(tuned.index_copy, calls=APPENDED), "append")
        self.rival("attend", "attend", f"{tuned.how_attend}, dense fifth", tuned.attend)
        if kvpress.memory("attend") <= memory_available() and not hasattr(kvpress.module, "masked_key_indices"):
            kvpress.layer()
        self.rival("attend", "attend", "kvpress's masked Ada", kvpress.attend, kvpress.memory("attend"))
        kvpress.masked_keys = None
        self.rival("dense", "dense", tuned.how_dense, tuned.dense)
        return append

    def all_layers(self):
        """Selection over all layers together."""
        scores = torch.rand(LAYERS * H, self.x.tokens) ** 8
        path = os.path.join(self.folder, "scores")
        scores.numpy().tofile(path)
        self.ours(f"read-scores {path}"), self.ours("select-all")
        os.remove(path)
        kept, flat, n = self.kept(), scores.view(-1), scores.numel() // 5
        dropped = torch.ones(scores.numel(), dtype=torch.bool)
        dropped[torch.from_numpy(kept)] = False
        assert len(kept) == n and flat[~dropped].min() >= flat[dropped].max(), "not the best of all layers"
        self.rival(f"select, {LAYERS} layers", "select-all", "torch.topk over all", lambda: torch.topk(flat, n, sorted=False))

    def norms(self):
        """Value norms, and how alike their approximation orders slots."""
        needed, x = self.kvpress.memory("norms"), self.x
        self.rival("value norms, L1", "norms", "kvpress", self.kvpress.norms, needed)
        self.rival("value norms, Gram", "grams", "kvpress (L1)", self.kvpress.norms, needed)
        norms = []
        for what in ("norms", "grams"):
            self.ours(what)
            norms.append(self.result("write-scores", np.float32).reshape(H, x.tokens))
        ranks = [scores.argsort(1).argsort(1) for scores in norms]
        rho = sorted(np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks))
        line = f"Rank agreement of Gram with L1 (Spearman, by head): median {statistics.median(rho):.4f}, worst {rho[0]:.4f}"
        if hasattr(self.kvpress, "result"):
            theirs = self.kvpress.result[0].float().numpy()
            line += f"; L1 within {np.abs(norms[0] / theirs - 1).max():.1e} of kvpress's"
        return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "f16", "f32"], choices=DTYPES)
    parser.add_argument("--window", type=int, nargs="+", default=[32, 64], help="all rows at the first, scores and layers at the others")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20, help="of a row, after which rounds are fewer, down to 3")
    parser.add_argument("--norms", type=int, default=4096, help="longest T with value norms, of which a round takes seconds")
    parser.add_argument("--quick", action="store_true", help="bf16, T = 4096, W = 32, 3 rounds: does it run?")
    parser.add_argument("--jemalloc", metavar="PATH", help="libjemalloc.so.2, PyTorch's best allocator; ours stays glibc's")
    parser.add_argument("--binary", help="our side, if it is built already")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.dtype, args.window, args.rounds = [4096], ["bf16"], [32], 3
    if args.jemalloc and os.environ.get("LD_PRELOAD") != args.jemalloc:
        # As PyTorch's tuning guide has it: memory is not given back.
        keep = "oversize_threshold:1,background_thread:false,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"
        os.environ.setdefault("MALLOC_CONF", keep)
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ, LD_PRELOAD=args.jemalloc))
    gc.disable()
    binary = args.binary or build()
    with open("/proc/cpuinfo") as file:
        model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    allocator = os.path.basename(args.jemalloc) if args.jemalloc else "glibc"
    print(f"# Against PyTorch, kvpress and numpy on a CPU\n\n{datetime.date.today()}, commit {commit}, {model}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {allocator}; medians of up to {args.rounds} rounds, caches cold")
    machine, layers, appends = Machine(), {}, {}
    for dtype in args.dtype:
        for tokens in args.tokens:
            for window in args.window:
                with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                    bench = Bench(args, machine, binary, dtype, tokens, window, folder)
                    print(f"\n### {dtype}, T = {tokens}, W = {window}\n\n{bench.compare()}.\n{machine.measure(bench.ours, DTYPES[dtype])}.\n")
                    print("| operation | ours, ms | rival | ms | ratio | quartiles | limit | of it | rounds |\n|---|---|---|---|---|---|---|---|---|")
                    layers[dtype, window, tokens] = bench.scoring()
                    if window == args.window[0]:
                        appends[dtype, window, tokens] = bench.rest()
                        if dtype == args.dtype[0]:
                            bench.all_layers()
                        if tokens <= args.norms:
                            print(f"\n{bench.norms()}")
                        else:
                            print(f"\nValue norms skipped: T is above --norms {args.norms}")
                    bench.ours.stop()
    for name, times, scale, unit in (("layer", layers, 1e6, "ns a token of the context"), ("append", appends, 1e6, "ns")):
        print(f"\n{name}, {unit}, at T:")
        for dtype, window in dict.fromkeys(key[:2] for key in times):
            row = [(t, ms) for (d, w, t), ms in times.items() if (d, w) == (dtype, window)]
            each = [f"{t}: {ms * scale / (t if name == 'layer' else 1):.0f}" for t, ms in row]
            print(f"- {dtype}, W = {window}: {', '.join(each)}")


if __name__ == "__main__":
    main()
