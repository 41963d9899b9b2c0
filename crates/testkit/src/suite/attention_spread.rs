//! Mean and variance of the window's attention: windows of every size, heads that are cut, and every way the inputs may lie in memory.

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::AttentionSpread;
use kvbudget::{Dtype, Ragged, Result};

use super::{DTYPES, Expected, batch, fails, pass, poisoned, read, stored};
use crate::compare::{self, Scale};
use crate::data::{Layer, Place, Tensor, TestDevice, segment_lens, with_layers};
use crate::generate::{Keys, LENGTHS, Spec, window_head};
use crate::naive;

const PLAIN: AttentionSpread = AttentionSpread { window: 8, gamma: 200.0 };

/// Scores and sums.
fn run<D: TestDevice>(
    device: &D,
    op: AttentionSpread,
    layers: &[Layer],
) -> Result<[Ragged<f32>; 2]> {
    let lens = segment_lens(layers);
    let mut out = poisoned(device, &lens);
    let mut sums = poisoned(device, &vec![2; lens.len()]);
    with_layers(device, layers, |views| {
        device.backend().attention_spread(op, views, &mut out, &mut sums)
    })?;
    Ok([read(device, &out), read(device, &sums)])
}

/// The oracle's: scores, entropies and variances, whose f32 loops err differently.
fn expected(op: AttentionSpread, layers: &[Layer]) -> [Expected; 3] {
    let mut all = <[Expected; 3]>::default();
    for (layer, h) in layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(move |h| (l, h))) {
        let (scores, [entropy, variance]) = naive::attention_spread(op, &window_head(layer, h));
        let want = [scores, vec![entropy], vec![variance]];
        let (scores, [entropy, variance]) = naive::attention_spread(op, &window_head(layer, h));
        let baseline = [scores, vec![entropy], vec![variance]];
        for (expected, (want, baseline)) in all.iter_mut().zip(want.into_iter().zip(baseline)) {
            expected.want.push(want);
            expected.baseline.push(baseline);
        }
    }
    all
}

fn check<D: TestDevice>(device: &D, case: impl Debug, op: AttentionSpread, layers: &[Layer]) {
    let [out, sums] = run(device, op, layers).unwrap_or_else(|e| panic!("{case:?}, {op:?}: {e}"));
    let pairs: Vec<[f32; 2]> = sums
        .iter()
        .map(|row| row.try_into().unwrap_or_else(|_| panic!("{case:?}: sums {row:?}")))
        .collect();
    let column = |of: usize| pairs.iter().map(|pair| vec![pair[of]]).collect();
    let [scores, entropy, variance] = expected(op, layers);
    scores.check(&(&case, op), Ok(out), Scale::Element);
    entropy.check(&(&case, op, "entropy"), Ok(column(0)), Scale::Unit);
    variance.check(&(&case, op, "variance"), Ok(column(1)), Scale::Element);
}

/// Around every unit a kernel may work in.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        for window in [1, 8].map(|w: u32| w.min(tokens)) {
            let layer = Spec { tokens, queries: window, ..Spec::default() }.build();
            check(device, tokens, AttentionSpread { window, ..PLAIN }, &[layer]);
        }
    }
}

/// Windows of one query, which has no variance, of all tokens, of fewer queries than were lent, and longer than the sequence.
pub fn windows<D: TestDevice>(device: &D) {
    for (tokens, queries, window) in [
        (1, 1, 1),
        (9, 9, 9),
        (9, 9, 40),
        (40, 33, 2),
        (40, 33, 31),
        (40, 32, 32),
        (64, 16, 1),
        (100, 65, 33),
        (100, 65, 64),
    ] {
        let layer = Spec { tokens, queries, ..Spec::default() }.build();
        check(device, (tokens, queries), AttentionSpread { window, ..PLAIN }, &[layer]);
    }
}

/// Means alone, and variances taken away.
pub fn gammas<D: TestDevice>(device: &D) {
    for keys in [Keys::Random, Keys::Peaky] {
        let layers = [Spec { tokens: 90, queries: 8, keys, ..Spec::default() }.build()];
        for gamma in [0.0, 1.0, 1e4] {
            check(device, keys, AttentionSpread { gamma, ..PLAIN }, &layers);
        }
    }
}

/// Group sizes that are no power of two, dims of every size in every dtype.
pub fn shapes<D: TestDevice>(device: &D) {
    for (group, dtype, dim) in [1, 3, 7].into_iter().flat_map(|g| {
        DTYPES.into_iter().flat_map(move |t| [8, 64, 72, 128, 136, 256].map(move |d| (g, t, d)))
    }) {
        let base = Spec { tokens: 67, queries: 5, kv_heads: 1, group, ..Spec::default() };
        let layer = Spec { dtype, dim, ..base }.build();
        check(device, (group, dtype, dim), AttentionSpread { window: 5, ..PLAIN }, &[layer]);
    }
}

/// Every dtype in every layout, queries in both.
pub fn storage<D: TestDevice>(device: &D) {
    let base = Spec { tokens: 70, queries: 8, dim: 80, keys: Keys::Peaky, ..Spec::default() };
    for spec in stored(&base) {
        for query_place in [Place::HeadsFirst, Place::TokensFirst] {
            let spec = Spec { query_place, ..spec.clone() };
            check(device, &spec, PLAIN, &[spec.build()]);
        }
    }
}

/// With the prefill's log-sum-exp lent, results do not change.
pub fn log_sum_exps<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (queries, keys) in [(8, Keys::Random), (13, Keys::Peaky), (8, Keys::Zero)] {
            let spec = Spec { tokens: 70, queries, keys, dtype, lse: true, ..Spec::default() };
            check(device, &spec, PLAIN, &[spec.build()]);
        }
    }
}

/// More query rows than are kept at once: large groups, long windows, and both.
pub fn many_rows<D: TestDevice>(device: &D) {
    for (dtype, group, window, tokens) in [
        (Dtype::BF16, 16, 7, 70),
        (Dtype::F32, 5, 33, 90),
        (Dtype::F16, 8, 32, 75),
        (Dtype::F16, 2, 130, 140),
        (Dtype::BF16, 1, 290, 380),
    ] {
        let base = Spec { tokens, group, dtype, kv_heads: 1, ..Spec::default() };
        let layer = Spec { queries: window, ..base }.build();
        check(device, (dtype, group), AttentionSpread { window, ..PLAIN }, &[layer]);
    }
}

/// Heads that are shared out: sums go on where the work is cut.
pub fn long_heads<D: TestDevice>(device: &D) {
    for (dtype, keys) in [(Dtype::F32, Keys::Random), (Dtype::BF16, Keys::Peaky)] {
        let base = Spec { tokens: 2120, queries: 3, kv_heads: 1, dtype, ..Spec::default() };
        let layer = Spec { dim: 8, keys, ..base }.build();
        check(device, dtype, AttentionSpread { window: 3, ..PLAIN }, &[layer]);
    }
}

/// Slots are not positions: heads of different lengths at scattered positions, some without any past or window, some empty.
pub fn compressed<D: TestDevice>(device: &D) {
    for (place, lse) in [
        (Place::Ragged { slack: 1 }, false),
        (Place::Ragged { slack: 1 }, true),
        (Place::Paged { page: 4 }, false),
    ] {
        for kept in [vec![5, 20, 64], vec![3, 0, 2], vec![0, 0, 0], vec![63, 33, 7]] {
            let base = Spec { tokens: 64, kv_heads: 3, queries: 8, ..Spec::default() };
            let spec = Spec { kept: Some(kept), place, lse, ..base };
            check(device, &spec, PLAIN, &[spec.build()]);
        }
    }
}

/// Many sequences at once, of one model and of several.
pub fn batches<D: TestDevice>(device: &D) {
    let mut layers = batch(&Spec { queries: 8, ..Spec::default() });
    check(device, "no sequence", PLAIN, &[]);
    for (dtype, dim, group, lse) in [(Dtype::F16, 64, 2, true), (Dtype::BF16, 72, 16, false)] {
        let spec = Spec { tokens: 50, queries: 9, dtype, dim, group, lse, ..Spec::default() };
        layers.push(spec.build());
    }
    layers.push(Spec { tokens: 5, queries: 5, ..Spec::default() }.build());
    check(device, "models", PLAIN, &layers);
}

/// Queries that hardly differ: their variance is what a difference of large sums would lose.
pub fn alike<D: TestDevice>(device: &D) {
    let layer = Spec { tokens: 60, queries: 8, ..Spec::default() }.build();
    let queries = layer.q.as_ref().expect("generated");
    let nearly =
        |row: usize, q: &[f64]| q.iter().map(|x| x * (1.0 + row as f64 / 4096.0)).collect();
    let heads = (0..4).map(|h| {
        let first = queries.head::<f64>(h).remove(0);
        (0..8).map(|row| nearly(row, &first)).collect()
    });
    let q = Some(Tensor::new(heads.collect(), 16, Dtype::F32, Place::HeadsFirst));
    check(device, "alike", PLAIN, &[Layer { q, ..layer }]);
}

/// NaN and infinities of queries and keys: what they reach is NaN, in the scores and in the sums.
pub fn non_finite<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let spec = Spec { tokens: 50, queries: 8, dtype, ..Spec::default() };
        let clean = spec.build();
        let key = |row, x| Layer { k: clean.k.with_row_scaled(1, row, &[x]), ..clean.clone() };
        let queries = clean.q.as_ref().expect("generated");
        let query = |x| Layer { q: Some(queries.with_row_scaled(0, 3, &[x])), ..clean.clone() };
        for (name, layer) in [
            ("NaN key", key(5, f64::NAN)),
            ("infinite key", key(5, f64::INFINITY)),
            ("NaN key in the window", key(47, f64::NAN)),
            ("NaN query", query(f64::NAN)),
            ("infinite query", query(f64::INFINITY)),
        ] {
            check(device, (name, dtype), PLAIN, &[layer]);
        }
    }
}

/// Weights of eight slots for the last two queries of two heads, in fortieths: scores and sums worked out in numpy's f64, apart from
/// all code here.
pub fn golden<D: TestDevice>(device: &D) {
    let weights = GOLDEN;
    // A key's logits are the logarithms of its weights; the last slot is after the first query.
    let log = |w: i32| (f64::from(w.max(1)) / 40.0).ln();
    let keys = (0..8).map(|t| weights.iter().map(|row| log(row[t])).collect()).collect();
    let query = |at: usize| (0..4).map(|d| if d == at { 2.0 } else { 0.0 }).collect();
    let queries = [[0, 1], [2, 3]].map(|head| head.map(query).to_vec());
    let tensor = |heads| Tensor::new(heads, 4, Dtype::F32, Place::HeadsFirst);
    let layer = Layer {
        k: tensor(vec![keys]),
        q: Some(tensor(queries.to_vec())),
        ..Spec { tokens: 8, kv_heads: 1, group: 2, dim: 4, ..Spec::default() }.build()
    };
    let op = AttentionSpread { window: 2, ..PLAIN };
    let [out, sums] = run(device, op, std::slice::from_ref(&layer)).expect("scores");
    for (got, want) in [(out, SCORES.as_slice()), (sums, SUMS.as_slice())] {
        // To the digits that are given.
        let digits = want.iter().map(|x| (x * (1.0 + 1e-7)) as f32).collect();
        pass(&op, compare::floats(&got, &[want.to_vec()], &[digits], Scale::Element));
    }
}

/// Fortieths, rows of the first head, then of the second.
const GOLDEN: [[i32; 8]; 4] = [
    [12, 1, 4, 3, 8, 2, 10, 0],
    [2, 9, 4, 1, 8, 6, 4, 6],
    [20, 2, 2, 4, 1, 1, 10, 0],
    [16, 4, 2, 6, 1, 1, 5, 5],
];
const SCORES: [f64; 8] = [3.9375, 2.225, 0.075, 0.3375, 0.1125, 0.5625, 0.0, 0.0];
const SUMS: [f64; 2] = [5.04038429, 0.065];

/// What cannot be computed is refused.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = |queries| [Spec { tokens: 40, queries, ..Spec::default() }.build()];
    fails(&"no queries", run(device, PLAIN, &layers(0)));
    fails(&"too few queries", run(device, PLAIN, &layers(7)));
    fails(&"no window", run(device, AttentionSpread { window: 0, ..PLAIN }, &layers(8)));
    fails(&"gamma", run(device, AttentionSpread { gamma: f32::NAN, ..PLAIN }, &layers(8)));
    for shape in [&[2][..], &[2, 1], &[2, 3], &[2, 2, 2]] {
        let layers = layers(8);
        let (mut out, mut sums) =
            (poisoned(device, &segment_lens(&layers)), poisoned(device, shape));
        let done = with_layers(device, &layers, |views| {
            device.backend().attention_spread(PLAIN, views, &mut out, &mut sums)
        });
        fails(&shape, done);
    }
}
