"""What the machine can do, and the least that each operation must do: a row's limit is the slowest of its needs.

Rates are the best of several tries, ours or PyTorch's, in the same run as the rows; the limit of a row is what one pass over its
inputs takes at those rates, whatever the method needs beyond that.
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

    def evict(self):
        """Empties the caches and wakes PyTorch's threads; our side does the same before its clock starts."""
        self.large.sum()

    def measure(self, ours, dtype):
        best = lambda f: 1e3 / min(timed(f) for _ in range(TRIES))
        our_best = lambda what: 1e3 / min(ours(what) for _ in range(TRIES))
        size, threads = self.large.nbytes, torch.get_num_threads()
        matrix, vector = self.large.view(-1, 4096), self.large[:4096]
        read = {"ours": our_best("read") * size, "sum": best(self.large.sum) * size, "mv": best(lambda: matrix.mv(vector)) * size}
        copy = {"ours": our_best("copy") * 2 * size, "torch": best(lambda: self.copy.copy_(self.large)) * 2 * size}
        product = {"gemm f32": max(ours.number("gemm") for _ in range(TRIES))}
        for kind in {torch.float32, dtype}:
            for n in (1024, 2048, 3072):
                a, b, c = torch.rand(n, n).to(kind), torch.rand(n, n).to(kind), torch.empty(n, n, dtype=kind)
                # A first product sets up; slow ones (f16 without instructions for it) are not worth more than one other.
                slow = [timed(lambda: torch.mm(a, b, out=c)) for _ in range(2)][-1] > 500
                rate = 2 * n**3 * (1e3 / timed(lambda: torch.mm(a, b, out=c)) if slow else best(lambda: torch.mm(a, b, out=c)))
                name = f"torch.mm {str(kind)[6:]}"
                product[name] = max(rate, product.get(name, 0))
                if slow:
                    break
        # In and out of L2: 1 MiB a thread.
        x = torch.randn(threads << 17)
        y = torch.empty_like(x)
        exp = best(lambda: [torch.exp(x, out=y) for _ in range(20)]) * 20 * x.numel()
        self.rates = {"read": max(read.values()), "copy": max(copy.values()), "product": max(product.values()), "exp": exp}
        list_rates = lambda rates, unit: ", ".join(f"{name} {rate / unit:.1f}" for name, rate in rates.items())
        return (
            f"Limits: read {list_rates(read, 1e9)} GB/s; copy, both ways counted, {list_rates(copy, 1e9)} GB/s; product "
            f"{list_rates(product, 1e9)} GFLOP/s; torch.exp of f32 in L2 {exp / 1e9:.2f} G/s")

    def limit(self, what, x):
        """Milliseconds, and what binds."""
        parts = ("score", "select", "gather") if what == "layer" else (what,)
        total, longest, name = 0.0, 0.0, ""
        for part in parts:
            bound, binds = max((1e3 * amount / self.rates[rate], rate) for rate, amount in needs(part, x).items())
            total += bound
            if bound > longest:
                longest, name = bound, f"{part}: {binds}" if len(parts) > 1 else binds
        return total, name


def needs(what, x):
    """The least that an operation moves and computes."""
    element, past = x.k.element_size(), x.tokens
    keys = H * past * D * element
    kept = 2 * H * (past // 5) * D * element
    return {
        # One pass over the keys: logits of each, an exponential of each.
        "score": {"read": keys, "product": 2 * HQ * x.window * past * D, "exp": HQ * x.window * past},
        "defensive": {"read": keys, "product": 2 * HQ * x.window * past * D, "exp": HQ * x.window * past},
        # A threshold cannot be known before all are read, nor applied without reading again.
        "select": {"read": 2 * 4 * H * past},
        "select-all": {"read": 2 * 4 * LAYERS * H * past},
        "gather": {"copy": 2 * kept},
        "regather": {"copy": 2 * kept},
        "compact": {"copy": 2 * kept},
        "append": {"copy": 2 * 2 * H * D * element},
        "attend": {"read": kept},
        "dense": {"read": 2 * keys},
        "norms": {"read": keys, "product": 2 * HQ * past * D * HIDDEN},
        # Gram matrices of the output projection, then a quadratic form of each value.
        "grams": {"read": keys, "product": 2 * HQ * D * D * (HIDDEN + past)},
    }[what]
