#!/usr/bin/env python3
"""Golden vectors for the `reference` modes: run the published codes on CPU, store what they keep.

    generate.py --adakv DIR --defensivekv DIR          write the vectors
    generate.py --adakv DIR --defensivekv DIR --check  regenerate in memory, compare with the files

DIR is a checkout of FFY0/AdaKV or FFY0/DefensiveKV; a reference whose checkout is missing is skipped.
kvpress comes from requirements.txt. Existing input files are read, never rewritten.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import pathlib
import sys
import types
import warnings

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
HOW = "python generate.py --adakv DIR --defensivekv DIR"
SCORE_RTOL = 1e-5
NOISE = 2e-6  # relative input noise that must not change any kept set
TRIALS = 8  # random tie orders and noisy inputs tried per case
MIN_GAP = 1e-5  # smallest relative score gap accepted at a cut


# ---------------------------------------------------------------- inputs

# name: (seed, query heads per kv head, positions, stored query rows, profiles of the kv heads, layers);
# layer l uses the l-th list of profiles, cyclically
INPUTS = {
    "a": (11, 2, 300, 64, [["peaky", "flat"]], 1),
    "b": (12, 1, 200, 32, [["flat", "peaky"]], 1),
    "c": (13, 4, 200, 32, [["broad", "local"]], 1),
    "d": (14, 2, 200, 32, [["peaky", "flat"]], 4),
    "e": (15, 2, 65, 64, [["flat", "peaky"]], 1),
    "f": (16, 2, 100, 32, [["peaky", "flat"]], 1),
    "g": (17, 2, 200, 32, [["sink", "flat", "local", "peaky"]], 1),
    "h": (18, 2, 120, 16, [["peaky", "flat"], ["calm", "calm"]], 3),
}
HEAD_DIM, HIDDEN = 16, 32
# profile: (spread of random logits, logit of shared hot positions, logit of per-query hot positions, window boost)
PROFILES = {
    "peaky": (1.5, 4.5, 3.5, 0.0),
    "flat": (0.7, 2.0, 1.5, 0.0),
    "broad": (0.4, 0.8, 0.5, -3.0),
    "local": (1.0, 3.0, 1.0, 7.0),
    "sink": (1.0, 5.0, 2.0, 1.0),
    "calm": (0.05, 0.05, 0.05, 0.0),
}


def make_input(name):
    seed, group, positions, rows, profiles, layers = INPUTS[name]
    rng = np.random.default_rng(seed)
    heads = len(profiles[0])
    out = {}
    for layer in range(layers):
        k = rng.standard_normal((heads, positions, HEAD_DIM))
        v = rng.standard_normal((heads, positions, HEAD_DIM))
        v *= np.exp(0.5 * rng.standard_normal((heads, positions, 1)))
        q = np.zeros((heads * group, rows, HEAD_DIM))
        past = positions - rows
        for h, profile in enumerate(profiles[layer % len(profiles)]):
            spread, shared, own, boost = PROFILES[profile]
            temper = 1.0 + 0.25 * layer * (1 if h % 2 else -0.6)  # layers differ
            direction = rng.standard_normal(HEAD_DIM)
            direction /= np.linalg.norm(direction)
            k[h] -= np.outer(k[h] @ direction, direction)
            k[h, past:] += boost * direction
            for g in range(group):
                hot = rng.integers(0, past, size=min(3, past))
                if profile == "sink":
                    hot[0] = 0
                for i in range(rows):
                    row = spread * rng.standard_normal(HEAD_DIM)
                    row -= (row @ direction) * direction
                    for p in hot:
                        row += shared * rng.uniform(0.5, 1.0) * unit(k[h, p])
                    row += own * unit(k[h, rng.integers(0, past)])
                    row += 4.0 * direction * (1.0 if boost else 0.0)
                    q[h * group + g, i] = temper * row
        o_proj = rng.standard_normal((HIDDEN, heads * group * HEAD_DIM)) / 8.0
        if name == "g":  # value norms on both sides of 1
            o_proj[:, : group * HEAD_DIM] *= 0.08
        for key, value in (("k", k), ("v", v), ("q", q), ("o_proj", o_proj)):
            out[f"l{layer}.{key}"] = np.ascontiguousarray(value, dtype=np.float32)
    return out


def unit(x):
    return x / np.linalg.norm(x)


def input_path(name):
    return HERE / f"inputs-{name}.safetensors"


def load_input(name):
    tensors = load_file(input_path(name))
    layers = 1 + max(int(key[1:].split(".")[0]) for key in tensors)
    return [{part: torch.from_numpy(tensors[f"l{l}.{part}"]) for part in ("k", "v", "q", "o_proj")} for l in range(layers)]


def with_noise(layers, seed):
    gen = torch.Generator().manual_seed(seed)
    return [{key: x * (1 + NOISE * torch.randn(x.shape, generator=gen)) for key, x in layer.items()} for layer in layers]


# ---------------------------------------------------------------- tie and gap probe


class Probe:
    """Wraps topk, sort and argsort: records the relative gap at every cut, and (seed given) breaks ties at random."""

    def __init__(self, seed=None):
        self.gaps, self.ties, self.cut_ties = [], 0, 0
        self.gen = None if seed is None else torch.Generator().manual_seed(seed)
        self.saved = {(o, n): getattr(o, n) for o in (torch, torch.Tensor) for n in ("topk", "sort", "argsort")}

    def __enter__(self):
        raw_topk, raw_sort = self.saved[torch, "topk"], self.saved[torch, "sort"]

        def shuffle(x, dim):
            if self.gen is None:
                return x, None
            perm = torch.randperm(x.shape[dim], generator=self.gen)
            return x.index_select(dim, perm), perm

        def topk(x, k, dim=-1, largest=True, sorted=True):
            k = int(k)
            self.note(x, k, dim, largest)
            y, perm = shuffle(x, dim)
            values, indices = raw_topk(y, k, dim=dim, largest=largest, sorted=sorted)
            return torch.return_types.topk((values, indices if perm is None else perm[indices]))

        def sort(x, dim=-1, descending=False):
            y, perm = shuffle(x, dim)
            values, indices = raw_sort(y, dim=dim, descending=descending)
            return torch.return_types.sort((values, indices if perm is None else perm[indices]))

        def argsort(x, dim=-1, descending=False):
            return sort(x, dim=dim, descending=descending).indices

        for owner in (torch, torch.Tensor):
            owner.topk, owner.sort, owner.argsort = topk, sort, argsort
        return self

    def __exit__(self, *exc):
        for (owner, name), fn in self.saved.items():
            setattr(owner, name, fn)

    def note(self, x, k, dim, largest):
        if not 0 < k < x.shape[dim] or not x.is_floating_point():
            return
        order = self.saved[torch, "sort"](x, dim=dim, descending=largest).values
        kept, gone = order.select(dim, k - 1).double(), order.select(dim, k).double()
        self.note_gap(kept, gone)

    def note_gap(self, kept, gone):
        gap = ((kept - gone).abs() / kept.abs().clamp(min=1e-30)).nan_to_num(0.0).flatten()
        self.ties += int((gap == 0).sum())
        self.gaps += [float(g) for g in gap if g > 0]


# ---------------------------------------------------------------- stand-in attention module


class Attention(torch.nn.Module):
    """Hands the stored tensors to a press: identity q_proj and no rotation, so the query used is the stored one."""

    def __init__(self, layers, index):
        super().__init__()
        layer = layers[index]
        heads, _, dim = layer["k"].shape
        q_heads = layer["q"].shape[0]
        hidden = layer["o_proj"].shape[0]
        self.config = types.SimpleNamespace(
            num_attention_heads=q_heads, num_key_value_heads=heads, head_dim=dim, hidden_size=hidden,
            num_hidden_layers=len(layers), _attn_implementation="sdpa",
        )
        self.head_dim, self.num_key_value_groups, self.layer_idx = dim, q_heads // heads, index
        self.q_proj = torch.nn.Identity()
        self.o_proj = torch.nn.Linear(q_heads * dim, hidden, bias=False)
        self.o_proj.weight = torch.nn.Parameter(layer["o_proj"].clone(), requires_grad=False)


def press_inputs(layer):
    positions, dim = layer["k"].shape[1:]
    q_heads, rows, _ = layer["q"].shape
    hidden = torch.zeros(1, positions, q_heads * dim)
    hidden[0, positions - rows :] = layer["q"].transpose(0, 1).reshape(rows, -1)
    rope = torch.ones(1, positions, dim), torch.zeros(1, positions, dim)
    return hidden, layer["k"][None].clone(), layer["v"][None].clone(), rope


def positions_of(rows, source):
    """Positions of `rows` in `source` by exact row match."""
    where = {row.numpy().tobytes(): p for p, row in enumerate(source)}
    assert len(where) == len(source), "duplicate rows"
    return sorted(where[row.contiguous().numpy().tobytes()] for row in rows)


# ---------------------------------------------------------------- kvpress


def removed(keep):
    num, den = keep
    return (den - num) / den


def build_press(case):
    import kvpress

    s, r = case["set"], removed(case["keep"])
    snap = lambda: kvpress.SnapKVPress(r, window_size=s["window"], kernel_size=s["kernel"])
    return {
        "snapkv": snap,
        "pyramidkv": lambda: kvpress.PyramidKVPress(r, window_size=s["window"], kernel_size=s["kernel"], beta=s["beta"]),
        "adakv": lambda: kvpress.AdaKVPress(snap(), alpha_safeguard=s["alpha"]),
        "criticalkv": lambda: kvpress.CriticalKVPress(snap(), epsilon=s["epsilon"], first_stage_ratio=s["first_stage"]),
        "criticaladakv": lambda: kvpress.CriticalAdaKVPress(
            snap(), alpha_safeguard=s["alpha"], epsilon=s["epsilon"], first_stage_ratio=s["first_stage"]),
        "tova": lambda: kvpress.TOVAPress(r),
        "knorm": lambda: kvpress.KnormPress(r),
        "keydiff": lambda: kvpress.KeyDiffPress(r),
        "lagkv": lambda: kvpress.LagKVPress(r, n_sink=s["sinks"], lag_size=s["lag"], cross_scoring=s["cross_scoring"]),
        "streaming": lambda: kvpress.StreamingLLMPress(r, n_sink=s["sinks"]),
    }[case["policy"]]()


def run_kvpress(case, layers, probe):
    kept, scores = [], []
    for index, layer in enumerate(layers):
        press, module = build_press(case), Attention(layers, index)
        hidden, k, v, rope = press_inputs(layer)
        kwargs = {"position_embeddings": rope}
        scorer = getattr(press, "press", press) if case["policy"] in ("adakv", "criticaladakv") else press
        with torch.no_grad():
            before = list(probe.gaps), probe.ties
            scores.append(scorer.score(module, hidden, k.clone(), v.clone(), None, kwargs)[0].clone())
            probe.gaps, probe.ties = before
            out, _ = press.compress(module, hidden, k, v, None, kwargs)
        if hasattr(module, "masked_key_indices"):
            _, head, pos = module.masked_key_indices
            mask = torch.ones(k.shape[1:3], dtype=torch.bool)
            mask[head, pos] = False
            kept.append([row.nonzero().flatten().tolist() for row in mask])
        else:
            kept.append([positions_of(out[0, h], layer["k"][h]) for h in range(out.shape[1])])
    return kept, scores


def value_norms(layers):
    import kvpress

    with torch.no_grad():
        return [kvpress.CriticalKVPress.vwl1norm(l["v"][None], Attention(layers, i))[0] for i, l in enumerate(layers)]


# ---------------------------------------------------------------- FFY0/AdaKV


def load_adakv(root):
    stub = types.ModuleType("flash_attn")
    stub.__spec__ = importlib.util.spec_from_loader("flash_attn", loader=None)
    stub.flash_attn_func = None
    saved = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = stub
    try:
        path = pathlib.Path(root) / "adaptive_snapkv" / "monkeypatch" / "snapkv_utils.py"
        spec = importlib.util.spec_from_file_location("golden_snapkv_utils", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("flash_attn")
        if saved is not None:
            sys.modules["flash_attn"] = saved
    return module


def observed(q, k, window, kernel, pooling, group):
    """Window-mean, group-reduced, pooled attention on the past, from the description (used for group max)."""
    heads, positions, dim = k.shape
    per = q.shape[0] // heads
    logits = torch.einsum("hgwd,htd->hgwt", q[:, -window:].reshape(heads, per, window, dim), k) / math.sqrt(dim)
    future = torch.arange(positions)[None] > torch.arange(positions - window, positions)[:, None]
    mass = logits.masked_fill(future, float("-inf")).softmax(-1)[..., : positions - window].mean(2)
    mass = mass.amax(1) if group == "max" else mass.mean(1)
    pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
    return pool(mass, kernel, stride=1, padding=kernel // 2)


def build_cluster(module, case, layers, index):
    s, per = case["set"], layers[index]["q"].shape[0] // layers[index]["k"].shape[0]
    common = dict(
        window_size=s["window"], kernel_size=s["kernel"], pooling=s["pooling"] + "pool", layer_idx=index,
        num_hidden_layers=len(layers), pyram_mode="beta" in s, pyram_beta=s.get("beta", 20),
        gqa_support=True, num_key_value_groups=per,
    )
    ada = case["policy"] in ("adakv", "adapyramid")
    cls = module.AdaptiveSnapKVCluster if ada else module.SnapKVCluster
    if ada:
        common.update(base_capacity=case["tokens_per_head"], floor_alpha=s["alpha"], skip=s["skip"])
    else:
        common.update(max_capacity_prompt=case["tokens_per_head"])
    if "gqa_func" in inspect.signature(cls.__init__).parameters:
        return cls(**common, gqa_func=s["group"])
    if s["group"] == "max":
        layer = layers[index]

        class GroupMax(cls):
            def calcul_attn_sore(self, key_states, query_states):
                return observed(layer["q"], layer["k"], s["window"], s["kernel"], s["pooling"], "max")[None]

        cls = GroupMax
    return cls(**common)


def run_adakv(case, layers, probe, module):
    kept, scores, s = [], [], case["set"]
    for index, layer in enumerate(layers):
        cluster = build_cluster(module, case, layers, index)
        heads, positions, dim = layer["k"].shape
        query = torch.zeros(1, layer["q"].shape[0], positions, dim)
        query[0, :, positions - layer["q"].shape[1] :] = layer["q"]
        with contextlib.redirect_stdout(io.StringIO()):
            if hasattr(cluster, "calcul_attn_sore"):
                full = layer["k"].repeat_interleave(query.shape[1] // heads, 0)[None]
                score = cluster.calcul_attn_sore(full, query)[0]
                flat, _ = cluster.update_kv(layer["k"][None], query, layer["v"][None])
                parts = flat.split(cluster.head_lens.tolist())
            else:
                score = observed(layer["q"], layer["k"], s["window"], s["kernel"], s["pooling"], s["group"])
                parts = cluster.update_kv(layer["k"][None], query, layer["v"][None])[0][0]
        mine = observed(layer["q"], layer["k"], s["window"], s["kernel"], s["pooling"], s["group"])
        assert torch.allclose(score, mine, rtol=1e-5, atol=1e-9)
        kept.append([positions_of(parts[h], layer["k"][h]) for h in range(heads)])
        scores.append(score.clone())
        for h in range(heads):  # the code slices a sorted list: note the gap at every head's cut
            budget = len(kept[-1][h]) - s["window"]
            if 0 < budget < score.shape[1]:
                order = torch.sort(score[h], descending=True).values.double()
                probe.note_gap(order[budget - 1], order[budget])
                probe.cut_ties += int(order[budget - 1] == order[budget])
    return kept, scores


# ---------------------------------------------------------------- FFY0/DefensiveKV


def load_defensivekv(root):
    """Import the fork's press files alone: its package root, base class and GPU kernel are replaced by stand-ins."""
    saved = {n: sys.modules.pop(n) for n in list(sys.modules) if n == "kvpress" or n.startswith("kvpress.")}
    base = pathlib.Path(root) / "kvpress"

    def package(name, path, **members):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
        for key, value in members.items():
            setattr(sys.modules[name], key, value)

    @dataclasses.dataclass
    class BasePress:
        pass

    try:
        package("kvpress", base)
        package("kvpress.presses", base / "presses")
        package("kvpress.presses.base_press", base, BasePress=BasePress)
        package("kvpress.presses.scorer_press", base, ScorerPress=BasePress)
        package("kvpress.ops", base / "ops")
        package("kvpress.ops.vw_norm", base, vw_l1norm=None)
        from kvpress.presses.efficient_defensivekv_press import EfficientDefensiveKVPress
        from kvpress.presses.efficient_layer_defensivekv_press import EfficientLayerDefensiveKVPress
    finally:
        for name in [n for n in sys.modules if n == "kvpress" or n.startswith("kvpress.")]:
            del sys.modules[name]
        sys.modules.update(saved)

    class LayerPress(EfficientLayerDefensiveKVPress):
        def vwl1norm_triton(self, *args):  # same quantity without the GPU kernel
            return self.vwl1norm(*args)

    return EfficientDefensiveKVPress, LayerPress


class Metadata(types.SimpleNamespace):
    def _update_metadata_while_compressing(self, head_lens, cu_seqlens_k, max_seqlen_k):
        self.head_lens = head_lens


def run_defensivekv(case, layers, probe, presses):
    s, r = case["set"], removed(case["keep"])
    joint = case["policy"] == "layerdefensivekv"
    heads, positions, dim = layers[0]["k"].shape
    cache = types.SimpleNamespace(
        layer_scores=[],
        key_cache=[l["k"].reshape(-1, dim).clone() for l in layers],
        value_cache=[l["v"].reshape(-1, dim).clone() for l in layers],
        metadata_list=[
            Metadata(head_lens=torch.full((heads,), positions, dtype=torch.int32), bsz=1, num_key_value_heads=heads)
            for _ in layers
        ],
    )
    press = presses[1 if joint else 0](r, window_size=s["window"], kernel_size=s["kernel"])
    scores = []
    inner = press.score

    def score(*args):
        out = inner(*args)
        scores.append(out.view(heads, positions).clone())
        return out

    press.score = score
    for index, layer in enumerate(layers):
        hidden, _, _, rope = press_inputs(layer)
        kwargs = {"position_embeddings": rope, "past_key_value": cache}
        out = press.compress(
            Attention(layers, index), hidden, cache.key_cache[index], cache.value_cache[index], None, kwargs)
        if not joint:
            cache.key_cache[index], cache.value_cache[index] = out
    kept = []
    for index, layer in enumerate(layers):
        parts = cache.key_cache[index].split(cache.metadata_list[index].head_lens.tolist())
        kept.append([positions_of(parts[h], layer["k"][h]) for h in range(heads)])
    return kept, scores


# ---------------------------------------------------------------- cases

CASES = {"kvpress": [], "adakv": [], "defensivekv": []}


def case(reference, name, policy, input, budget, scores=True, **params):
    size = {"tokens_per_head": budget} if isinstance(budget, int) else {"keep": list(budget)}
    CASES[reference].append(
        {"name": name, "policy": policy, "input": f"inputs-{input}.safetensors", **size, "set": params, "scores": scores})


def kvpress_cases():
    add = lambda *a, **p: case("kvpress", *a, **p)
    snap = lambda w, k=5, **more: dict(scorer="snapkv", window=w, kernel=k, pooling="avg", group="mean", **more)
    plain = lambda w, k=5, **more: dict(window=w, kernel=k, pooling="avg", group="mean", **more)

    add("snapkv-w64-half", "snapkv", "a", (1, 2), **plain(64))
    add("snapkv-w32-fifth-trunc59", "snapkv", "a", (1, 5), **plain(32))
    add("snapkv-w32-k7", "snapkv", "a", (3, 10), **plain(32, 7))
    add("snapkv-w1-k1", "snapkv", "a", (3, 10), **plain(1, 1))
    add("snapkv-g1", "snapkv", "b", (1, 4), **plain(32))
    add("snapkv-g4-trunc39", "snapkv", "c", (1, 5), **plain(32))
    add("snapkv-w8-tenth-trunc9", "snapkv", "f", (1, 10), **plain(8))
    add("snapkv-window-plus-one", "snapkv", "e", (64, 65), **plain(64))
    add("snapkv-h4", "snapkv", "g", (2, 5), **plain(16, 3))
    add("snapkv-layers", "snapkv", "d", (1, 4), **plain(32))

    add("pyramidkv-active-b4", "pyramidkv", "d", (1, 5), **plain(4, beta=4))
    add("pyramidkv-active-b20", "pyramidkv", "d", (1, 2), **plain(4, beta=20))
    add("pyramidkv-clipped", "pyramidkv", "d", (3, 5), **plain(4, beta=20))
    add("pyramidkv-clipped-w32", "pyramidkv", "d", (3, 4), **plain(32, beta=20))
    add("pyramidkv-fallback-round40", "pyramidkv", "d", (1, 5), **plain(32, beta=20))
    add("pyramidkv-fallback-half-even112", "pyramidkv", "a", (3, 8), **plain(32, beta=20))
    add("pyramidkv-fallback-half-up38", "pyramidkv", "a", (1, 8), **plain(32, beta=20))
    add("pyramidkv-clipped-one-layer", "pyramidkv", "e", (1, 2), **plain(16, beta=20))
    add("pyramidkv-one-layer", "pyramidkv", "a", (1, 5), **plain(4, beta=4))
    add("pyramidkv-third", "pyramidkv", "d", (1, 3), **plain(8, beta=5))

    add("adakv-w64-half", "adakv", "a", (1, 2), **snap(64, alpha=0.2))
    add("adakv-w32-fifth", "adakv", "a", (1, 5), **snap(32, alpha=0.2))
    add("adakv-g1", "adakv", "b", (1, 4), **snap(32, alpha=0.2))
    add("adakv-dominant", "adakv", "c", (1, 2), **snap(32, alpha=0.2))
    add("adakv-dominant-safe-binds", "adakv", "c", (1, 2), **snap(8, alpha=0.5))
    add("adakv-h4-fraction", "adakv", "g", (97, 200), **snap(16, alpha=0.3))
    add("adakv-alpha0", "adakv", "g", (1, 4), **snap(16, alpha=0.0))
    add("adakv-alpha1", "adakv", "g", (1, 4), **snap(16, alpha=1.0))
    add("adakv-tenth-trunc9", "adakv", "f", (1, 10), **snap(4, alpha=0.2))
    add("adakv-window-plus-one", "adakv", "e", (64, 65), **snap(64, alpha=0.2))
    add("adakv-layers", "adakv", "d", (1, 4), **snap(32, alpha=0.2))

    crit = dict(epsilon=1e-4, first_stage=0.5)
    add("criticalkv-half", "criticalkv", "a", (1, 2), **snap(32, **crit))
    add("criticalkv-quarter-stage", "criticalkv", "a", (1, 2), **snap(32, epsilon=1e-4, first_stage=0.25))
    add("criticalkv-window-over-stage1", "criticalkv", "a", (1, 4), scores=False, **snap(64, **crit))
    add("criticalkv-no-stage1", "criticalkv", "b", (1, 4), **snap(16, epsilon=1e-4, first_stage=0.0))
    add("criticalkv-epsilon", "criticalkv", "b", (1, 2), **snap(32, epsilon=1e-2, first_stage=0.5))
    add("criticalkv-g4", "criticalkv", "c", (2, 5), **snap(32, **crit))
    add("criticalkv-trunc", "criticalkv", "f", (1, 5), **snap(8, epsilon=1e-4, first_stage=0.7))
    add("criticalkv-h4-small-norms", "criticalkv", "g", (1, 4), **snap(16, **crit))
    add("criticalkv-window-plus-one", "criticalkv", "e", (64, 65), **snap(64, epsilon=1e-4, first_stage=1.0))

    ada = dict(alpha=0.2, **crit)
    add("criticaladakv-half", "criticaladakv", "a", (1, 2), **snap(32, **ada))
    add("criticaladakv-fifth", "criticaladakv", "a", (1, 5), **snap(32, **ada))
    add("criticaladakv-g1", "criticaladakv", "b", (1, 2), **snap(16, **ada))
    add("criticaladakv-dominant", "criticaladakv", "c", (1, 2), **snap(8, alpha=0.5, **crit))
    add("criticaladakv-h4-small-norms", "criticaladakv", "g", (97, 200), **snap(16, alpha=0.3, **crit))
    add("criticaladakv-alpha0", "criticaladakv", "g", (1, 4), **snap(8, alpha=0.0, epsilon=1e-2, first_stage=0.25))
    add("criticaladakv-layers", "criticaladakv", "d", (1, 4), **snap(32, **ada))

    for policy, params in (("tova", {}), ("knorm", {}), ("keydiff", {})):
        add(f"{policy}-fifth-trunc59", policy, "a", (1, 5), **params)
        add(f"{policy}-g1", policy, "b", (1, 2), **params)
        add(f"{policy}-g4-trunc39", policy, "c", (1, 5), **params)
        add(f"{policy}-tenth-trunc9", policy, "f", (1, 10), **params)
        add(f"{policy}-min-one", policy, "e", (1, 100), **params)

    lag = lambda sinks, size, cross=False: dict(sinks=sinks, lag=size, cross_scoring=cross)
    add("lagkv-default", "lagkv", "a", (3, 5), **lag(4, 128))
    add("lagkv-lag16", "lagkv", "f", (1, 2), **lag(4, 16))
    add("lagkv-lag32-remainder", "lagkv", "c", (1, 4), **lag(8, 32))
    add("lagkv-cross", "lagkv", "f", (3, 10), **lag(4, 16, True))
    add("lagkv-cross-remainder", "lagkv", "g", (3, 10), **lag(4, 16, True))
    add("lagkv-short", "lagkv", "e", (1, 5), **lag(4, 128))
    add("lagkv-no-sinks", "lagkv", "b", (13, 25), **lag(0, 50))

    add("streaming-fifth-trunc59", "streaming", "a", (1, 5), scores=False, sinks=4)
    add("streaming-g4-trunc39", "streaming", "c", (1, 5), scores=False, sinks=4)
    add("streaming-tenth-trunc9", "streaming", "f", (1, 10), scores=False, sinks=4)
    add("streaming-sinks8", "streaming", "b", (1, 4), scores=False, sinks=8)
    add("streaming-no-sinks", "streaming", "b", (1, 4), scores=False, sinks=0)
    add("streaming-only-sinks", "streaming", "f", (9, 100), scores=False, sinks=8)


def adakv_cases():
    add = lambda *a, **p: case("adakv", *a, **p)
    par = lambda w, k, pool, alpha, group="mean", **more: dict(
        window=w, kernel=k, pooling=pool, group=group, alpha=alpha, skip=0, **more)

    for c in ADA_MAX_C["a"]:
        add(f"adakv-max-c{c}", "adakv", "a", c, **par(32, 7, "max", 0.2))
    add("adakv-avg-c96", "adakv", "a", 96, **par(32, 7, "avg", 0.2))
    add("adakv-avg-w64", "adakv", "a", 160, **par(64, 5, "avg", 0.5))
    add("adakv-g1-avg", "adakv", "b", 65, **par(32, 5, "avg", 0.2))
    for c in ADA_MAX_C["b"]:
        add(f"adakv-g1-max-c{c}", "adakv", "b", c, **par(32, 7, "max", 0.5))
    add("adakv-dominant-alpha02", "adakv", "c", 97, **par(32, 5, "avg", 0.2))
    add("adakv-dominant-alpha0", "adakv", "c", 97, **par(32, 5, "avg", 0.0))
    add("adakv-group-max", "adakv", "c", 80, **par(32, 5, "avg", 0.2, "max"))
    for c in ADA_MAX_C["c"]:
        add(f"adakv-group-max-maxpool-c{c}", "adakv", "c", c, **par(32, 7, "max", 0.2, "max"))
    for c in (95, 97, 128):
        add(f"adakv-h4-c{c}-alpha03", "adakv", "g", c, **par(32, 5, "avg", 0.3))
    add("adakv-h4-c97-alpha05", "adakv", "g", 97, **par(32, 5, "avg", 0.5))
    add("adakv-h4-c97-alpha1", "adakv", "g", 97, **par(32, 5, "avg", 1.0))
    add("adakv-h4-window-only", "adakv", "g", 32, **par(32, 5, "avg", 0.2))
    add("adakv-capacity-minus-one", "adakv", "f", 99, **par(32, 5, "avg", 0.2))
    add("adakv-capacity-equal", "adakv", "f", 100, **par(32, 5, "avg", 0.2))
    add("adakv-capacity-equal-alpha1", "adakv", "f", 100, **par(32, 5, "avg", 1.0))
    add("adakv-capacity-plus-one", "adakv", "f", 101, **par(32, 5, "avg", 0.2))
    add("adakv-window-plus-one", "adakv", "e", 65, **par(64, 5, "avg", 0.2))
    add("adakv-window-plus-one-half-lost", "adakv", "e", 65, **par(64, 5, "avg", 0.5))
    add("adakv-window-plus-one-keeps-all", "adakv", "e", 66, **par(64, 5, "avg", 0.2))
    add("adakv-layers-skip2", "adakv", "d", 80, **{**par(32, 5, "avg", 0.2), "skip": 2})

    add("adapyramid-c64", "adapyramid", "d", 64, **par(32, 7, "avg", 0.2, beta=20))
    add("adapyramid-c80-alpha05", "adapyramid", "d", 80, **par(16, 5, "avg", 0.5, beta=20))
    add("adapyramid-c97-alpha03", "adapyramid", "d", 97, **par(32, 7, "avg", 0.3, beta=20))
    add("adapyramid-clipped", "adapyramid", "d", 131, **par(32, 5, "avg", 0.2, beta=20))
    add("adapyramid-inverted", "adapyramid", "d", 210, **par(32, 5, "avg", 0.2, beta=20))
    add("adapyramid-beta4", "adapyramid", "d", 64, **par(16, 5, "avg", 0.2, beta=4))
    for c in ADA_MAX_C["d"]:
        add(f"adapyramid-max-c{c}", "adapyramid", "d", c, **par(16, 3, "max", 0.2, beta=20))

    snap = lambda w, k, pool, **more: dict(window=w, kernel=k, pooling=pool, group="mean", **more)
    add("snapkv-avg", "snapkv", "a", 96, **snap(32, 5, "avg"))
    add("snapkv-capacity-equal", "snapkv", "f", 100, **snap(32, 5, "avg"))
    add("pyramidkv-c64", "pyramidkv", "d", 64, **snap(32, 5, "avg", beta=20))
    add("pyramidkv-clipped", "pyramidkv", "d", 132, **snap(32, 5, "avg", beta=20))


# Capacities at which no head's cut falls inside a max-pool plateau (found by --scan).
ADA_MAX_C = {"a": [70, 104, 145], "b": [53, 115], "c": [68, 107], "d": [132, 190]}


def defensivekv_cases():
    add = lambda *a, **p: case("defensivekv", *a, **p)
    par = lambda w=32, k=5: dict(window=w, kernel=k, pooling="avg", group="max", threshold=0.9)
    add("defensivekv-half", "defensivekv", "a", (1, 2), **par())
    add("defensivekv-quarter", "defensivekv", "a", (1, 4), **par())
    add("defensivekv-fifth-trunc119", "defensivekv", "a", (1, 5), **par())
    add("defensivekv-w64", "defensivekv", "a", (2, 5), **par(64))
    add("defensivekv-k7", "defensivekv", "a", (3, 10), **par(16, 7))
    add("defensivekv-g1", "defensivekv", "b", (1, 4), **par())
    add("defensivekv-bound-zero", "defensivekv", "b", (19, 100), **par())
    add("defensivekv-g4-dominant", "defensivekv", "c", (1, 2), **par())
    add("defensivekv-g4-quarter", "defensivekv", "c", (1, 4), **par())
    add("defensivekv-h4", "defensivekv", "g", (3, 10), **par())
    add("defensivekv-h4-w8", "defensivekv", "g", (1, 5), **par(8))
    add("defensivekv-small", "defensivekv", "f", (1, 2), **par(8))
    add("defensivekv-layers", "defensivekv", "d", (1, 4), **par())
    add("layerdefensivekv-quarter", "layerdefensivekv", "d", (1, 4), **par())
    add("layerdefensivekv-half", "layerdefensivekv", "d", (1, 2), **par())
    add("layerdefensivekv-fifth", "layerdefensivekv", "d", (1, 5), **par(16))
    add("layerdefensivekv-tenth", "layerdefensivekv", "d", (1, 10), **par(8))
    add("layerdefensivekv-layer-wiped", "layerdefensivekv", "h", (1, 4), **par(8))
    add("layerdefensivekv-h-half-trunc", "layerdefensivekv", "h", (3, 5), **par(16))
    add("layerdefensivekv-one-layer", "layerdefensivekv", "a", (1, 4), **par())


# ---------------------------------------------------------------- running


def source_of(reference, item):
    if reference == "kvpress":
        return "published code"
    if reference == "adakv":
        if item["set"]["group"] == "max":
            return "published code for allocation and selection; group-max scores from the description"
        return "published code"
    if item["policy"] == "layerdefensivekv":
        return "published code with its own PyTorch value norm in place of the GPU kernel"
    return "published code"


def run_case(item, layers, runner):
    """Kept sets and scores, plus the smallest gap at a cut; names outcomes that hang on ties or rounding."""
    with Probe() as probe:
        kept, scores = runner(item, layers, probe)
    problems = {"tie at a cut"} if probe.cut_ties else set()
    for seed in range(TRIALS):
        with Probe(seed) as other:
            again, again_scores = runner(item, layers, other)
        if again != kept:
            problems.add("tie at a cut")
        if item["scores"] and not all(torch.equal(a, b) for a, b in zip(scores, again_scores)):
            problems.add("scores depend on tie order")
        with Probe() as other:
            if runner(item, with_noise(layers, 100 + seed), other)[0] != kept:
                problems.add("outcome within rounding noise")
    gap = min(probe.gaps, default=None)
    if gap is not None and gap < MIN_GAP:
        problems.add(f"gap {gap:.1e}")
    if item["scores"] and not all(torch.isfinite(s).all() for s in scores):
        problems.add("non-finite score")
    return kept, scores, gap, sorted(problems)


def run_reference(reference, runner, titles):
    document = {
        "format": "kvbudget-golden", "version": 1, "reference": reference, "source": titles[reference], "how": HOW,
        "cases": [],
    }
    tensors, bad, inputs = {}, 0, {}
    for item in CASES[reference]:
        stem = item["input"][len("inputs-") : -len(".safetensors")]
        layers = inputs.setdefault(stem, load_input(stem))
        try:
            kept, scores, gap, problems = run_case(item, layers, runner)
        except Exception as error:  # report every broken case, then fail
            kept, scores, gap, problems = [], [], None, [f"{type(error).__name__}: {error}"]
        if problems:
            bad += 1
            print(f"BAD {reference} {item['name']}: {'; '.join(problems)}")
        lens = [[len(head) for head in layer] for layer in kept]
        print(f"{reference:12} {item['name']:36} lens {lens} gap {'-' if gap is None else f'{gap:.1e}'}")
        if item["scores"]:
            for l, score in enumerate(scores):
                tensors[f"{item['name']}.l{l}"] = np.ascontiguousarray(score.numpy(), dtype=np.float32)
        document["cases"].append({
            **item, "source": source_of(reference, item), "min_gap": None if gap is None else float(f"{gap:.2g}"),
            "scores": item["name"] if item["scores"] else None, "kept": kept,
        })
    if reference == "kvpress":
        for stem in sorted(inputs):
            for l, norm in enumerate(value_norms(inputs[stem])):
                tensors[f"value-norm.inputs-{stem}.l{l}"] = norm.numpy()
    return document, tensors, bad


def render(document):
    head = {key: value for key, value in document.items() if key != "cases"}
    lines = [json.dumps(item, separators=(",", ":")) for item in document["cases"]]
    return json.dumps(head)[:-1] + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n"


def compare(document, tensors, reference):
    stored = json.loads((HERE / f"{reference}.json").read_text())
    old = load_file(HERE / f"{reference}-scores.safetensors")
    bad = 0

    def complain(text):
        nonlocal bad
        bad += 1
        print(f"DIFF {reference}: {text}")

    names = [c["name"] for c in stored["cases"]]
    if names != [c["name"] for c in document["cases"]]:
        complain("case list")
    for a, b in zip(stored["cases"], document["cases"]):
        for key in ("policy", "input", "keep", "tokens_per_head", "set", "kept", "scores"):
            if a.get(key) != b.get(key):
                complain(f"{a['name']}: {key}")
    if sorted(old) != sorted(tensors):
        complain("score tensor names")
    for name in set(old) & set(tensors):
        floor = 1e-6 if name.startswith("keydiff") else 1e-9  # cosines near zero lose relative accuracy
        if old[name].shape != tensors[name].shape or not np.allclose(tensors[name], old[name], SCORE_RTOL, floor):
            complain(f"scores {name}")
    return bad


def scan(module):
    """Print the capacities whose max-pool outcome does not hang on a plateau."""
    for stem, window, kernel, alpha, group, extra in (  # the parameters of the ADA_MAX_C cases
        ("a", 32, 7, 0.2, "mean", {}), ("b", 32, 7, 0.5, "mean", {}), ("c", 32, 7, 0.2, "max", {}),
        ("d", 16, 3, 0.2, "mean", {"beta": 20}),
    ):
        good, layers = [], load_input(stem)
        for c in range(window + 12, 200):
            params = dict(window=window, kernel=kernel, pooling="max", group=group, alpha=alpha, skip=0, **extra)
            item = {"policy": "adapyramid" if extra else "adakv", "tokens_per_head": c, "set": params, "scores": True}
            if not run_case(item, layers, lambda i, x, p: run_adakv(i, x, p, module))[3]:
                good.append(c)
        print(stem, good)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adakv", metavar="DIR", help="checkout of FFY0/AdaKV")
    parser.add_argument("--defensivekv", metavar="DIR", help="checkout of FFY0/DefensiveKV")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--only", choices=sorted(CASES), help="one reference")
    parser.add_argument("--scan", action="store_true", help="list tie-free capacities for the max-pool cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="gqa_support is enabled")
    for name in INPUTS:
        if not input_path(name).exists():
            save_file(make_input(name), input_path(name))
    kvpress_cases(), adakv_cases(), defensivekv_cases()

    runners, titles = {}, {}
    if args.only in (None, "kvpress") and not args.scan:
        import kvpress  # noqa: F401

        runners["kvpress"] = run_kvpress
        titles["kvpress"] = f"kvpress {package_version('kvpress')} on PyPI, torch {torch.__version__.split('+')[0]}"
    if args.adakv and args.only in (None, "adakv"):
        module = load_adakv(args.adakv)
        if args.scan:
            return scan(module)
        runners["adakv"] = lambda item, layers, probe: run_adakv(item, layers, probe, module)
        titles["adakv"] = "FFY0/AdaKV adaptive_snapkv/monkeypatch/snapkv_utils.py at 1baceda, gqa_support=True"
    if args.defensivekv and args.only in (None, "defensivekv"):
        presses = load_defensivekv(args.defensivekv)
        runners["defensivekv"] = lambda item, layers, probe: run_defensivekv(item, layers, probe, presses)
        titles["defensivekv"] = (
            "FFY0/DefensiveKV kvpress/presses at c278cd0 and 249e795 (scores, joint selection) "
            "and cf9bc41 (efficient_ada_scorer_press_old.py, per-layer selection)")
    bad = 0
    for reference, runner in runners.items():
        document, tensors, problems = run_reference(reference, runner, titles)
        bad += problems
        if args.check:
            bad += compare(document, tensors, reference)
        else:
            (HERE / f"{reference}.json").write_text(render(document))
            save_file(tensors, HERE / f"{reference}-scores.safetensors")
    skipped = sorted(set(CASES) - set(runners))
    print(f"{'FAILED' if bad else 'ok'}: {bad} problems; skipped: {', '.join(skipped) or 'none'}")
    raise SystemExit(1 if bad else 0)


def package_version(name):
    import importlib.metadata

    return importlib.metadata.version(name)


if __name__ == "__main__":
    main()
