"""What the machine can do, and the least that each operation must do: a row's limit is the slowest of its needs.

Rates are the best of several tries, ours or PyTorch's, in the same run as the rows; those of the machine are tried again before each
table, for its neighbours take of them what they like. The limit of a row is what one pass over its inputs takes at those rates, whatever
the method needs beyond that.
"""
import time

import torch

HQ, H, D, HIDDEN, LAYERS = 32, 8, 128, 4096, 32
TRIES = 7


def timed(f):
    """Milliseconds."""
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


class Machine:
    """Rates: `read` and `copy` in bytes a second (copies count both ways), `product` in operations, `exp` in exponentials."""

    def __init__(self):
        # 256 MiB each, as on our side: more than caches keep.
        self.large = torch.ones(1 << 26)
        self.copy = torch.zeros(1 << 26)
        self.ways = {}

    def evict(self):
        """Empties the caches and wakes PyTorch's threads; our side does the same before its clock starts."""
        self.large.sum()

    def measure(self, ours, dtype):
        """Tries again, keeps the best of the run, and says what that is."""
        size, threads = self.large.nbytes, torch.get_num_threads()
        matrix, vector = self.large.view(-1, 4096), self.large[:4096]
        # In and out of L2: 1 MiB a thread.
        x = torch.randn(threads << 17)
        y = torch.empty_like(x)
        self.keep("read", "ours", size, lambda: ours("read"))
        self.keep("read", "sum", size, lambda: timed(self.large.sum))
        self.keep("read", "mv", size, lambda: timed(lambda: matrix.mv(vector)))
        self.keep("copy", "ours", 2 * size, lambda: ours("copy"))
        self.keep("copy", "torch", 2 * size, lambda: timed(lambda: self.copy.copy_(self.large)))
        self.keep("exp", "torch.exp", 20 * x.numel(), lambda: timed(lambda: [torch.exp(x, out=y) for _ in range(20)]))
        self.keep("product f32", "gemm", 1, lambda: 1e3 / ours.number("gemm"))
        for kind in (torch.float32, dtype):
            short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[kind]
            for n in (1024, 2048, 3072):
                a, b, c = torch.rand(n, n).to(kind), torch.rand(n, n).to(kind), torch.empty(n, n, dtype=kind)
                self.keep(f"product {short}", "torch.mm", 2 * n**3, lambda: timed(lambda: torch.mm(a, b, out=c)))
                self.keep(f"product {short}", "torch.mm", 2 * n**3, lambda: timed(lambda: torch.mm(a, b.T, out=c)))
        best = {name: max(ways.values()) for name, ways in self.ways.items()}
        # A product in 16 bits can be had in f32.
        product = max(best["product f32"], best[f"product {short}"])
        self.rates = {"read": best["read"], "copy": best["copy"], "exp": best["exp"], "product": product}
        said = [f"{name} " + ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in ways.items()) for name, ways in self.ways.items()]
        return "Limits, best of the run so far, in 1e9 bytes (copies: both ways), exponentials or operations a second: " + "; ".join(said)

    def keep(self, name, way, amount, milliseconds):
        ways = self.ways.setdefault(name, {})
        for _ in range(TRIES):
            took = milliseconds()
            ways[way] = max(ways.get(way, 0), 1e3 * amount / took)
            if took > 500:
                break

    def limit(self, what, x):
        """Milliseconds, and what binds."""
        parts = ("score", "select", "gather") if what.startswith("layer") else (what,)
        total, longest, name = 0.0, 0.0, ""
        for part in parts:
            bound, binds = max((1e3 * amount / self.rates[rate], rate) for rate, amount in needs(part, x).items())
            total += bound
            if bound > longest:
                longest, name = bound, f"{part}: {binds}" if len(parts) > 1 else binds
        return total, name


def needs(what, x):
    """The least that an operation moves and computes."""
    element, tokens = x.k.element_size(), x.tokens
    keys = H * tokens * D * element
    kept = 2 * H * (tokens // 5) * D * element
    return {
        # One pass over the keys: logits of each, an exponential of each.
        "score": {"read": keys, "product": 2 * HQ * x.window * tokens * D, "exp": HQ * x.window * tokens},
        "defensive": {"read": keys, "product": 2 * HQ * x.window * tokens * D, "exp": HQ * x.window * tokens},
        # A threshold cannot be known before all are read, nor applied without reading again.
        "select": {"read": 2 * 4 * H * tokens},
        "select-all": {"read": 2 * 4 * LAYERS * H * tokens},
        "gather": {"copy": 2 * kept},
        "regather": {"copy": 2 * kept},
        "compact": {"copy": 2 * kept},
        "append": {"copy": 2 * 2 * H * D * element},
        "attend": {"read": kept},
        "dense": {"read": 2 * keys},
        "norms": {"read": keys, "product": 2 * HQ * tokens * D * HIDDEN},
        # Gram matrices of the output projection, then a quadratic form of each value.
        "grams": {"read": keys, "product": 2 * HQ * D * D * (HIDDEN + tokens)},
    }[what]
