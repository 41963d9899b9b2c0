//! Window attention: visibility, reductions, row pooling, and every way its inputs may lie in memory.

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Reduce, WindowAttention};
use kvbudget::{Dtype, Ragged};

use super::{DTYPES, Expected, batch, fails, poisoned, read, scored, stored};
use crate::compare::Scale;
use crate::data::{Layer, Place, TestDevice, segment_lens, with_layers};
use crate::generate::{Keys, LENGTHS, Spec, probe_head, window_head};
use crate::naive;

const PLAIN: WindowAttention = WindowAttention {
    window: 8,
    over_window: Reduce::Mean,
    over_group: Reduce::Mean,
    row_pool: None,
    score_window: false,
    gap: 0,
    probe: false,
};

/// Every combination of reductions, row pooling (none, the identity, and kernels wider than a tiny past)
/// and window scoring.
fn every_reduction(window: u32) -> Vec<WindowAttention> {
    let reduce = [Reduce::Mean, Reduce::Max];
    let mut ops = Vec::new();
    for (over_window, over_group) in reduce.iter().flat_map(|&w| reduce.map(|g| (w, g))) {
        for row_pool in [None, Some(1), Some(3), Some(5), Some(7)] {
            for score_window in [false, true] {
                ops.push(WindowAttention {
                    window,
                    over_window,
                    over_group,
                    row_pool,
                    score_window,
                    gap: 0,
                    probe: false,
                });
            }
        }
    }
    ops
}

/// Scores and means.
fn expected(op: &WindowAttention, layers: &[Layer]) -> [Expected; 2] {
    let [mut scores, mut means] = <[Expected; 2]>::default();
    for (layer, h) in layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(move |h| (l, h))) {
        let exact = if op.probe { probe_head(layer, h) } else { window_head(layer, h) };
        let (score, mean) = naive::window_attention(op, &exact);
        scores.want.push(score);
        means.want.push(mean);
        let narrow = if op.probe { probe_head(layer, h) } else { window_head(layer, h) };
        let (score, mean) = naive::window_attention(op, &narrow);
        scores.baseline.push(score);
        means.baseline.push(mean);
    }
    [scores, means]
}

fn check<D: TestDevice>(device: &D, case: impl Debug, op: &WindowAttention, layers: &[Layer]) {
    let lens = segment_lens(layers);
    let run = |with_mean: bool| -> kvbudget::Result<(Ragged<f32>, Ragged<f32>)> {
        let (mut out, mut mean) = (poisoned(device, &lens), poisoned(device, &lens));
        with_layers(device, layers, |views| {
            let mean = with_mean.then_some(&mut mean);
            device.backend().window_attention(op, views, &mut out, mean)
        })?;
        Ok((read(device, &out), read(device, &mean)))
    };
    let [scores, means] = expected(op, layers);
    let (out, mean) = run(true).unwrap_or_else(|e| panic!("{case:?}, {op:?}: {e}"));
    scores.check(&(&case, op), Ok(out), Scale::Element);
    means.check(&(&case, op, "mean"), Ok(mean), Scale::Element);
    scores.check(&(&case, op, "without mean"), run(false).map(|r| r.0), Scale::Element);
}

/// Around every unit a kernel may work in, with the last rows as window.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0).chain([4099]) {
        for window in [1, 8].map(|w: u32| w.min(tokens)) {
            let layer = Spec { tokens, queries: window, ..Spec::default() }.build();
            let op = WindowAttention { window, ..PLAIN };
            check(device, (tokens, window), &op, &[layer]);
        }
    }
}

/// Windows of one query, of all tokens (no past), and of fewer queries than were lent.
pub fn windows<D: TestDevice>(device: &D) {
    for (tokens, queries, window) in
        [(1, 1, 1), (2, 2, 2), (9, 9, 9), (33, 33, 33), (40, 33, 31), (64, 16, 1), (100, 65, 64)]
    {
        for score_window in [false, true] {
            let layer = Spec { tokens, queries, ..Spec::default() }.build();
            let op = WindowAttention { window, score_window, ..PLAIN };
            check(device, (tokens, queries), &op, &[layer]);
        }
    }
}

/// All reductions, on a past that is empty, narrower than each kernel, or ample.
pub fn reductions<D: TestDevice>(device: &D) {
    for tokens in [8, 9, 10, 12, 14, 45] {
        let layer = Spec { tokens, queries: 8, ..Spec::default() }.build();
        for op in every_reduction(8) {
            check(device, tokens, &op, std::slice::from_ref(&layer));
        }
    }
}

/// Group sizes that are no power of two, head dims that are no multiple of 64.
pub fn shapes<D: TestDevice>(device: &D) {
    for group in [1, 2, 4, 7] {
        for dim in [16, 64, 80, 128] {
            let base = Spec { tokens: 67, queries: 9, group, dim, ..Spec::default() };
            let op = WindowAttention { window: 9, over_group: Reduce::Max, ..PLAIN };
            check(device, (group, dim), &op, &[base.build()]);
        }
    }
}

/// Every dtype in every layout, queries in both.
pub fn storage<D: TestDevice>(device: &D) {
    let base = Spec { tokens: 70, queries: 8, dim: 80, keys: Keys::Peaky, ..Spec::default() };
    for spec in stored(&base) {
        for query_place in [Place::HeadsFirst, Place::TokensFirst] {
            let spec = Spec { query_place, ..spec.clone() };
            check(device, &spec, &PLAIN, &[spec.build()]);
        }
    }
}

/// With the prefill's log-sum-exp lent, results do not change; its rows are the queries' rows, not the window's.
pub fn log_sum_exps<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (queries, keys) in [(8, Keys::Random), (8, Keys::Peaky), (13, Keys::Equal)] {
            let spec = Spec { tokens: 70, queries, keys, dtype, lse: true, ..Spec::default() };
            for op in every_reduction(8) {
                check(device, &spec, &op, &[spec.build()]);
            }
        }
    }
}

/// A query reaches the slots at least so far before it: all, all but itself, some, none; also where positions have holes.
pub fn gaps<D: TestDevice>(device: &D) {
    let queries = 40;
    let cases = [(Reduce::Mean, true), (Reduce::Max, true), (Reduce::Max, false)];
    for layer in batch(&Spec { queries, ..Spec::default() }) {
        for (gap, (over, score_window)) in
            [0, 1, 7, 39, 64, 1000].into_iter().flat_map(|gap| cases.map(|case| (gap, case)))
        {
            let op = WindowAttention {
                window: queries.min(layer.tokens),
                over_window: over,
                over_group: over,
                score_window,
                gap,
                ..PLAIN
            };
            check(device, layer.tokens, &op, std::slice::from_ref(&layer));
        }
    }
}

/// One-hot, uniform and directionless attention.
pub fn keys<D: TestDevice>(device: &D) {
    for keys in [Keys::Peaky, Keys::Equal, Keys::Zero] {
        let spec = Spec { tokens: 150, queries: 8, dim: 64, keys, ..Spec::default() };
        for op in every_reduction(8) {
            check(device, &spec, &op, &[spec.build()]);
        }
    }
}

/// Every way to reduce, with pooled rows and a gap: what a kernel may have a path of its own for.
fn every_path(window: u32) -> [WindowAttention; 8] {
    let plain = WindowAttention { window, ..PLAIN };
    let reduced = |over_window, over_group| WindowAttention { over_window, over_group, ..plain };
    use Reduce::{Max, Mean};
    [
        plain,
        reduced(Max, Max),
        reduced(Mean, Max),
        reduced(Max, Mean),
        WindowAttention { row_pool: Some(5), ..reduced(Max, Max) },
        WindowAttention { row_pool: Some(3), ..reduced(Mean, Max) },
        WindowAttention { gap: 3, score_window: true, ..reduced(Max, Mean) },
        WindowAttention { gap: 11, ..plain },
    ]
}

/// Every dtype at head dims of every size, multiples of 8 and not of 16 among them.
pub fn dims<D: TestDevice>(device: &D) {
    for (dtype, dim) in
        DTYPES.into_iter().flat_map(|t| [8, 64, 72, 96, 128, 200, 256].map(|d| (t, d)))
    {
        let base = Spec { tokens: 83, queries: 5, group: 3, kv_heads: 1, ..Spec::default() };
        let layer = Spec { dtype, dim, ..base }.build();
        for op in every_path(5) {
            check(device, (dtype, dim), &op, std::slice::from_ref(&layer));
        }
    }
}

/// More query rows than a kernel keeps at once: large groups, long windows, and both; some rows see little.
pub fn many_rows<D: TestDevice>(device: &D) {
    for (dtype, group, window, tokens) in [
        (Dtype::BF16, 16, 7, 70),
        (Dtype::F16, 16, 9, 75),
        (Dtype::F32, 5, 33, 90),
        (Dtype::BF16, 3, 70, 150),
        (Dtype::F16, 2, 130, 140),
        (Dtype::F32, 1, 129, 129),
        (Dtype::BF16, 1, 290, 300),
    ] {
        for lse in [false, true] {
            let base = Spec { tokens, group, dtype, lse, kv_heads: 1, ..Spec::default() };
            let layer = Spec { queries: window, ..base }.build();
            for op in every_path(window) {
                check(device, (dtype, group, lse), &op, std::slice::from_ref(&layer));
            }
        }
    }
}

/// Rows that are shared out: pooling windows and sums go on where the work is cut.
pub fn long_rows<D: TestDevice>(device: &D) {
    for (dtype, kernel) in [(Dtype::F32, 5), (Dtype::BF16, 7), (Dtype::F16, 31)] {
        let base = Spec { tokens: 2120, queries: 3, kv_heads: 1, dtype, ..Spec::default() };
        let layer = Spec { dim: 8, keys: Keys::Peaky, ..base }.build();
        for over in [Reduce::Max, Reduce::Mean] {
            for row_pool in [None, Some(kernel)] {
                let op = WindowAttention {
                    window: 3,
                    over_window: over,
                    over_group: over,
                    row_pool,
                    ..PLAIN
                };
                check(device, dtype, &op, std::slice::from_ref(&layer));
            }
        }
    }
}

/// Slots are not positions: heads of different lengths at scattered positions, some without any past,
/// some without any window, some empty; with long windows, some queries older than all that a head holds.
pub fn compressed<D: TestDevice>(device: &D) {
    for (place, lse) in [Place::Ragged { slack: 1 }, Place::Paged { page: 4 }]
        .into_iter()
        .flat_map(|place| [(place, false), (place, true)])
    {
        for kept in [vec![5, 20, 64], vec![1, 0, 2], vec![0, 0, 0], vec![63, 33, 7]] {
            let base = Spec { tokens: 64, kv_heads: 3, queries: 64, ..Spec::default() };
            let spec = Spec { kept: Some(kept), place, lse, ..base };
            for window in [1, 8, 64] {
                for score_window in [false, true] {
                    let row_pool = Some(5);
                    let op = WindowAttention { window, score_window, row_pool, ..PLAIN };
                    check(device, &spec, &op, &[spec.build()]);
                }
            }
        }
    }
}

/// Many sequences at once.
pub fn batches<D: TestDevice>(device: &D) {
    let layers = batch(&Spec { queries: 8, ..Spec::default() });
    check(device, "batch", &PLAIN, &layers);
    let op = WindowAttention { row_pool: Some(5), over_window: Reduce::Max, ..PLAIN };
    check(device, "batch", &op, &layers);
    check(device, "no sequence", &PLAIN, &[]);
    // Sequences of different models.
    let mut layers = layers;
    for (dtype, dim, group, lse) in [
        (Dtype::F16, 64, 2, true),
        (Dtype::BF16, 128, 5, false),
        (Dtype::F16, 128, 1, false),
        (Dtype::BF16, 72, 16, true),
    ] {
        let spec = Spec { tokens: 50, queries: 9, dtype, dim, group, lse, ..Spec::default() };
        layers.push(spec.build());
    }
    for op in every_path(8) {
        check(device, "models", &op, &layers);
    }
}

/// Queries of a probe see all slots: fewer than there are tokens or more, one or many, also where positions have holes; the
/// last of them, if not all; whatever else is lent.
pub fn probes<D: TestDevice>(device: &D) {
    let op = WindowAttention { window: u32::MAX, probe: true, ..PLAIN };
    let worst = WindowAttention { over_window: Reduce::Max, over_group: Reduce::Max, ..op };
    for (group, dtype) in [1, 2, 7].into_iter().zip(DTYPES) {
        for (tokens, probe) in [(1, 1), (1, 9), (37, 1), (37, 90), (150, 20)] {
            let layer = Spec { tokens, probe, group, dtype, ..Spec::default() }.build();
            for op in [op, worst, WindowAttention { window: 7, ..worst }] {
                check(device, (group, tokens, probe), &op, std::slice::from_ref(&layer));
            }
        }
    }
    let base = Spec { tokens: 70, probe: 5, dim: 80, keys: Keys::Peaky, ..Spec::default() };
    for spec in stored(&base) {
        for query_place in [Place::HeadsFirst, Place::TokensFirst] {
            let spec = Spec { query_place, ..spec.clone() };
            check(device, &spec, &worst, &[spec.build()]);
        }
    }
    for kept in [vec![5, 20, 64], vec![1, 0, 2]] {
        let base = Spec { tokens: 64, kv_heads: 3, probe: 70, kept: Some(kept), ..Spec::default() };
        let spec = Spec { place: Place::Paged { page: 4 }, ..base };
        for op in [op, worst] {
            check(device, &spec, &op, &[spec.build()]);
        }
    }
    let spec = Spec { tokens: 45, queries: 8, lse: true, probe: 5, ..Spec::default() };
    for op in every_reduction(u32::MAX) {
        check(device, "beside a window", &WindowAttention { probe: true, ..op }, &[spec.build()]);
    }
    let layers = batch(&Spec { probe: 40, ..Spec::default() });
    for op in [op, worst] {
        check(device, "batch", &op, &layers);
    }
}

/// NaN goes through both reductions, to be counted by the caller; infinite keys give what IEEE says.
pub fn non_finite<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F32, Dtype::BF16] {
        non_finite_in(device, dtype);
    }
}

fn non_finite_in<D: TestDevice>(device: &D, dtype: Dtype) {
    let spec = Spec { tokens: 50, queries: 8, dtype, ..Spec::default() };
    let clean = spec.build();
    let bad_key =
        |row, factor: f64| Layer { k: clean.k.with_row_scaled(1, row, &[factor]), ..clean.clone() };
    let queries = clean.q.as_ref().expect("generated");
    let bad_query =
        |row| Layer { q: Some(queries.with_row_scaled(0, row, &[f64::NAN])), ..clean.clone() };
    let layers = [
        ("NaN key", bad_key(5, f64::NAN)),
        ("NaN key in the window", bad_key(49, f64::NAN)),
        ("infinite key", bad_key(5, f64::INFINITY)),
        ("infinite key in the window", bad_key(45, f64::INFINITY)),
        ("NaN query", bad_query(0)),
        ("last query NaN", bad_query(7)),
    ];
    for (name, layer) in layers {
        for op in every_reduction(8).into_iter().filter(|op| !op.score_window) {
            check(device, (name, dtype), &op, std::slice::from_ref(&layer));
        }
    }
}

/// What cannot be computed is refused.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = |queries| [Spec { tokens: 40, queries, ..Spec::default() }.build()];
    let run = |layers: &[Layer], op: WindowAttention| {
        scored(device, layers, |backend, views, out| {
            backend.window_attention(&op, views, out, None)
        })
    };
    fails(&"no queries", run(&layers(0), PLAIN));
    fails(&"too few queries", run(&layers(7), PLAIN));
    let pooled = WindowAttention { gap: 1, row_pool: Some(3), ..PLAIN };
    fails(&"gap and pooled rows", run(&layers(8), pooled));
    let probe = WindowAttention { probe: true, ..PLAIN };
    fails(&"no probe", run(&layers(8), probe));
    let probed = [Spec { probe: 3, ..Spec::default() }.build()];
    fails(&"a probe with a gap", run(&probed, WindowAttention { gap: 1, ..probe }));
    fails(&"even kernel", run(&layers(8), WindowAttention { row_pool: Some(4), ..PLAIN }));

    for lens in [&[40][..], &[40, 39], &[40, 41], &[40, 40, 40]] {
        let mut out = poisoned(device, lens);
        let result = with_layers(device, &layers(8), |views| {
            device.backend().window_attention(&PLAIN, views, &mut out, None)
        });
        fails(&lens, result);
    }
}
