"""The other side: kvpress's own code fed with tensors in place of a model, PyTorch as well as we could write it, numpy."""
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from kvpress import AdaKVPress, CriticalKVPress, SnapKVPress
from kvpress.presses import snapkv_press
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limits import D, H, HIDDEN, HQ, timed

G = HQ // H


class Kvpress:
    def __init__(self, x):
        self.x = x
        config = SimpleNamespace(
            num_attention_heads=HQ, num_key_value_heads=H, head_dim=D, hidden_size=HIDDEN, _attn_implementation="sdpa")
        self.module = SimpleNamespace(
            config=config, head_dim=D, num_key_value_groups=G, o_proj=SimpleNamespace(weight=x.o_proj), training=False, is_causal=True)
        # The queries after RoPE, in place of a projection: cos = 1, sin = 0.
        snapkv_press.get_prerope_query_states = lambda module, hidden: x.q[None]
        one, zero = torch.ones(1, x.window, D, dtype=x.q.dtype), torch.zeros(1, x.window, D, dtype=x.q.dtype)
        self.kwargs = {"position_embeddings": (one, zero)}
        self.hidden = torch.empty(1, x.window + 1, 1)
        self.snap = SnapKVPress(compression_ratio=0.8, window_size=x.window, kernel_size=5)
        self.masked_keys = None

    def memory(self, what):
        """Bytes that it allocates at most, about: K repeated for the group, five times the logits in its dtype and in f32."""
        x = self.x
        logits = HQ * x.window * x.tokens
        repeated = G * x.k.nbytes
        return {
            "score": repeated + logits * (4 * x.k.element_size() + 4),
            "norms": repeated + 2 * x.tokens * HIDDEN * x.k.element_size(),
            "attend": (1 + 2 * G) * x.k.nbytes,
        }[what]

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
        self.kept = None
        self.kept = [self.x.k[mask], self.x.v[mask]]

    def layer(self):
        self.score(), self.select(), self.gather()

    def attend(self):
        """A decode step of AdaKV in kvpress: keys that nobody looks at are written where slots were dropped, then all are read."""
        if self.masked_keys is None:
            self.masked_keys = self.x.k.clone()[None]
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.out = attention(self.module, self.x.q[None, :, :1].contiguous(), self.masked_keys, self.x.v[None], None, dropout=0.0)

    def norms(self):
        self.result = CriticalKVPress.vwl1norm(self.x.v[None], self.module)


class Tuned:
    """No copies of K, buffers made once, one head's logits at a time, index_select."""

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
        self.past, self.total, self.floor = past, H * (x.tokens // 5), max(x.tokens // 25, x.window)
        self.buffers = [torch.empty(self.total, D, dtype=x.k.dtype) for _ in "kv"]
        # A dense cache of a fifth: what a ragged one would be at best. With room for tokens to come, too.
        self.fifth = [t[:, : x.tokens // 5].contiguous()[None] for t in (x.k, x.v)]
        self.roomy = [F.pad(t, (0, 0, 0, APPENDED)) for t in self.fifth]
        self.new = [t[None, :, :1].contiguous() for t in (x.k, x.v)]
        self.attend, self.how_attend = fastest(attentions(x.q, *self.fifth))
        self.dense, self.how_dense = fastest(attentions(x.q, x.k[None], x.v[None]))

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
        scores = self.scores.clone()
        scores.scatter_(1, torch.topk(self.scores, self.floor, sorted=False).indices, math.inf)
        flat = torch.topk(scores.view(-1), self.total, sorted=False).indices
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[flat] = True
        self.slots = mask.nonzero().flatten()

    def topk(self):
        """The largest scores of the layer, no floors, in no order."""
        torch.topk(self.scores.view(-1), self.total, sorted=False)

    def argpartition(self):
        """The selection by numpy, which uses one thread."""
        scores = self.scores.numpy().copy()
        np.put_along_axis(scores, np.argpartition(scores, -self.floor, axis=1)[:, -self.floor:], np.inf, axis=1)
        mask = np.zeros(scores.size, dtype=bool)
        mask[np.argpartition(scores.reshape(-1), -self.total)[-self.total:]] = True
        self.slots = torch.from_numpy(np.flatnonzero(mask))

    def flat(self):
        return [t.view(-1, D) for t in (self.x.k, self.x.v)]

    def gather(self):
        self.kept = None
        self.kept = [t.index_select(0, self.slots) for t in self.flat()]

    def regather(self):
        """Into the same buffers each time."""
        for t, out in zip(self.flat(), self.buffers):
            torch.index_select(t, 0, self.slots, out=out)

    def layer(self):
        self.score(), self.select(), self.gather()

    def relayer(self):
        self.score(), self.select(), self.regather()

    def cat(self):
        """One token as transformers' DynamicCache appends it."""
        self.longer = [torch.cat([t, new], dim=-2) for t, new in zip(self.fifth, self.new)]

    def index_copy(self):
        """Tokens as its StaticCache appends them."""
        first = self.x.tokens // 5
        for token in range(APPENDED):
            at = torch.tensor([first + token])
            for t, new in zip(self.roomy, self.new):
                t.index_copy_(2, at, new)


# Tokens appended by one measurement, as on our side.
APPENDED = 256


def attentions(q, k, v):
    """Ways to attend with one query of each head over `[1, H, n, D]`."""
    one, grouped = q[None, :, :1].contiguous(), q[:, 0].view(1, H, G, D).contiguous()
    scale = 1 / math.sqrt(D)

    def products():
        p = torch.softmax(torch.bmm(grouped[0] * scale, k[0].transpose(1, 2)), -1)
        return torch.bmm(p, v[0])

    return {
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(one, k, v, enable_gqa=True),
        # The queries of a group as rows of one head: nothing is repeated.
        "sdpa grouped": lambda: F.scaled_dot_product_attention(grouped, k, v),
        "bmm": products,
    }


def fastest(ways):
    """The fastest of some ways, and its name."""
    for way in ways.values():
        way()
    name = min(ways, key=lambda name: min(timed(ways[name]) for _ in range(5)))
    return ways[name], name
