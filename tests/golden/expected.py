#!/usr/bin/env python3
"""Golden vectors of ExpectedAttention: run kvpress's press on CPU in float32, store what it is given and what it makes of it.

    expected.py          write expected.safetensors
    expected.py --check  regenerate in memory, compare with the file

Stored: `q` [Hq,T,D] before RoPE, `k`, `v` [H,T,D], `frequencies` [D/2]; the press's `mean` [Hq,D], `covariance` [Hq,D,D] and, for
each epsilon, `scores` [H,T]. Needs requirements.txt.
"""

import pathlib
import sys
import types

import numpy as np
import torch
from kvpress import ExpectedAttentionPress
from safetensors.numpy import load_file, save_file

FILE = pathlib.Path(__file__).resolve().parent / "expected.safetensors"
SEED, QUERY_HEADS, HEADS, TOKENS, DIM = 23, 4, 2, 120, 16
EPSILONS = {"scores": 0.0, "scores-epsilon": 0.02}


def inputs():
    """Queries that share a direction and spread along a few, as those of a model do; the first four are outliers."""
    rng = np.random.default_rng(SEED)
    normal = lambda *shape: rng.standard_normal(shape)
    q = 1.5 * normal(QUERY_HEADS, 1, DIM) + normal(QUERY_HEADS, TOKENS, 3) @ normal(QUERY_HEADS, 3, DIM)
    q += 0.3 * normal(QUERY_HEADS, TOKENS, DIM)
    q[:, :4] *= 30.0
    k, v = normal(HEADS, TOKENS, DIM), normal(HEADS, TOKENS, DIM) * np.exp(0.5 * normal(HEADS, TOKENS, 1))
    frequencies = 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    named = {"q": q, "k": k, "v": v, "frequencies": frequencies}
    return {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in named.items()}


class Attention(torch.nn.Module):
    """A stand-in that hands the stored queries to the press: identity projection, and a plain RoPE."""

    def __init__(self, frequencies):
        super().__init__()
        self.config = types.SimpleNamespace(num_attention_heads=QUERY_HEADS)
        self.head_dim, self.q_proj = DIM, torch.nn.Identity()
        self.frequencies = frequencies

    def rotary_emb(self, _, position_ids):
        angles = position_ids[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def run(given):
    q, k, v, frequencies = (torch.from_numpy(given[name]) for name in ("q", "k", "v", "frequencies"))
    module = Attention(frequencies)
    hidden = q.transpose(0, 1).reshape(1, TOKENS, -1)
    made = {}
    with torch.no_grad():
        mean, covariance = ExpectedAttentionPress(0.5).get_query_statistics(module, hidden)
        made["mean"], made["covariance"] = mean[0].numpy(), covariance[0].numpy()
        for name, epsilon in EPSILONS.items():
            press = ExpectedAttentionPress(0.5, epsilon=epsilon)
            made[name] = press.score(module, hidden, k[None], v[None], None, {})[0].numpy()
    return {name: np.ascontiguousarray(x) for name, x in made.items()}


def main():
    torch.set_num_threads(1)
    if "--check" not in sys.argv[1:]:
        given = inputs()
        save_file({**given, **run(given)}, FILE)
        return
    stored = load_file(FILE)
    for name, made in run(stored).items():
        assert np.allclose(made, stored[name], rtol=1e-5, atol=1e-7 * np.abs(stored[name]).max()), name
    print("ok")


if __name__ == "__main__":
    main()
