//! Projections of values on what the window's queries read: anchors, pooled rows, and every way the inputs may lie in memory.

use std::fmt::Debug;
use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::Projection;
use kvbudget::{Dtype, Ragged, Result};

use super::{DTYPES, Expected, batch, fails, pass, scored, stored};
use crate::compare::{self, Scale};
use crate::data::{Layer, Place, Tensor, TestDevice, segment_lens};
use crate::generate::{Keys, LENGTHS, Spec, window_head};
use crate::naive::{self, Float, Matrix};

const PLAIN: Projection<'_> =
    Projection { window: 8, row_pool: None, normalise: false, anchor: &[] };

/// Rows raw and pooled, outputs as they are and normalised.
fn every_kind(window: u32) -> [Projection<'static>; 4] {
    let plain = Projection { window, ..PLAIN };
    [
        plain,
        Projection { row_pool: Some(7), ..plain },
        Projection { normalise: true, ..plain },
        Projection { row_pool: Some(3), normalise: true, ..plain },
    ]
}

/// All but the first two slots and the last five, as far as there are more.
fn inner(layers: &[Layer]) -> Vec<Range<u32>> {
    let of = |len: u32| 2.min(len)..len.saturating_sub(5).max(2.min(len));
    segment_lens(layers).into_iter().map(of).collect()
}

fn whole(layers: &[Layer]) -> Vec<Range<u32>> {
    segment_lens(layers).into_iter().map(|len| 0..len).collect()
}

fn run<D: TestDevice>(device: &D, op: &Projection<'_>, layers: &[Layer]) -> Result<Ragged<f32>> {
    scored(device, layers, |backend, views, out| backend.projection(op, views, out))
}

fn oracle<F: Float>(op: &Projection<'_>, layers: &[Layer]) -> Matrix<F> {
    let heads = layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(move |h| (l, h)));
    let anchored = heads.zip(op.anchor.iter().cloned());
    anchored
        .map(|((l, h), anchor)| naive::projection(op, anchor, &window_head(l, h), &l.v.head(h)))
        .collect()
}

/// With anchors of every slot and of those [within](inner).
fn check<D: TestDevice>(device: &D, case: impl Debug, op: &Projection<'_>, layers: &[Layer]) {
    for anchor in [inner(layers), whole(layers)] {
        check_anchor(device, &case, &Projection { anchor: &anchor, ..*op }, layers);
    }
}

fn check_anchor<D: TestDevice>(
    device: &D,
    case: impl Debug,
    op: &Projection<'_>,
    layers: &[Layer],
) {
    let expected = Expected { want: oracle(op, layers), baseline: oracle(op, layers) };
    expected.check(&(&case, op), run(device, op, layers), Scale::Row);
}

/// Around every unit a kernel may work in.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        for window in [1, 8].map(|w: u32| w.min(tokens)) {
            let layer = Spec { tokens, queries: window, ..Spec::default() }.build();
            for row_pool in [None, Some(7)] {
                let op = Projection { window, row_pool, ..PLAIN };
                check(device, (tokens, window), &op, std::slice::from_ref(&layer));
            }
        }
    }
}

/// Windows of one query, of all tokens, of fewer queries than were lent, and longer than the sequence.
pub fn windows<D: TestDevice>(device: &D) {
    for (tokens, queries, window) in
        [(1, 1, 1), (9, 9, 9), (9, 9, 40), (33, 33, 33), (40, 33, 31), (64, 16, 1), (100, 65, 64)]
    {
        let layer = Spec { tokens, queries, ..Spec::default() }.build();
        for op in every_kind(window) {
            check(device, (tokens, queries), &op, std::slice::from_ref(&layer));
        }
    }
}

/// Rows pooled by kernels from the identity to wider than the head.
pub fn kernels<D: TestDevice>(device: &D) {
    for tokens in [8, 12, 45] {
        for keys in [Keys::Random, Keys::Peaky] {
            let layer = Spec { tokens, keys, queries: 8, ..Spec::default() }.build();
            for kernel in [1, 3, 5, 7, 9, 13, 17] {
                let op = Projection { row_pool: Some(kernel), ..PLAIN };
                check(device, (tokens, kernel), &op, std::slice::from_ref(&layer));
            }
        }
    }
}

/// Anchors of nothing, which leave zeros, of one slot, and of stretches across whatever is cut.
pub fn anchors<D: TestDevice>(device: &D) {
    let layers = [Spec { tokens: 300, queries: 8, kv_heads: 1, ..Spec::default() }.build()];
    for anchor in [0..0, 300..300, 7..7, 0..1, 299..300, 15..33, 16..32, 100..290] {
        for op in every_kind(8) {
            let anchor = std::slice::from_ref(&anchor);
            check_anchor(device, "anchor", &Projection { anchor, ..op }, &layers);
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
        let [.., both] = every_kind(5);
        check(device, (group, dtype, dim), &both, &[layer]);
    }
}

/// Every dtype in every layout, queries in both.
pub fn storage<D: TestDevice>(device: &D) {
    let base = Spec { tokens: 70, queries: 8, dim: 80, keys: Keys::Peaky, ..Spec::default() };
    for spec in stored(&base) {
        for query_place in [Place::HeadsFirst, Place::TokensFirst] {
            let spec = Spec { query_place, ..spec.clone() };
            check(device, &spec, &Projection { row_pool: Some(5), ..PLAIN }, &[spec.build()]);
        }
    }
}

/// With the prefill's log-sum-exp lent, results do not change.
pub fn log_sum_exps<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (queries, keys) in [(8, Keys::Random), (13, Keys::Peaky), (8, Keys::Zero)] {
            let spec = Spec { tokens: 70, queries, keys, dtype, lse: true, ..Spec::default() };
            for op in every_kind(8) {
                check(device, &spec, &op, &[spec.build()]);
            }
        }
    }
}

/// More query rows than are kept at once: large groups, long windows, and both.
pub fn many_rows<D: TestDevice>(device: &D) {
    for (dtype, group, window, tokens) in [
        (Dtype::BF16, 16, 7, 70),
        (Dtype::F32, 5, 33, 90),
        (Dtype::F16, 2, 130, 140),
        (Dtype::BF16, 1, 290, 300),
    ] {
        let base = Spec { tokens, group, dtype, kv_heads: 1, ..Spec::default() };
        let layer = Spec { queries: window, ..base }.build();
        for op in every_kind(window) {
            check(device, (dtype, group), &op, std::slice::from_ref(&layer));
        }
    }
}

/// Heads that are shared out: pooling windows and sums go on where the work is cut.
pub fn long_heads<D: TestDevice>(device: &D) {
    for (dtype, kernel) in [(Dtype::F32, 7), (Dtype::BF16, 15)] {
        let base = Spec { tokens: 2120, queries: 3, kv_heads: 1, dtype, ..Spec::default() };
        let layer = Spec { dim: 8, keys: Keys::Peaky, ..base }.build();
        check(device, dtype, &Projection { window: 3, row_pool: Some(kernel), ..PLAIN }, &[layer]);
    }
}

/// Slots are not positions: heads of different lengths at scattered positions, some without any past or window, some empty.
/// Neighbours are slots that lie side by side.
pub fn compressed<D: TestDevice>(device: &D) {
    for (place, lse) in [
        (Place::Ragged { slack: 1 }, false),
        (Place::Ragged { slack: 1 }, true),
        (Place::Paged { page: 4 }, false),
    ] {
        for kept in [vec![5, 20, 64], vec![1, 0, 2], vec![0, 0, 0], vec![63, 33, 7]] {
            let base = Spec { tokens: 64, kv_heads: 3, queries: 8, ..Spec::default() };
            let spec = Spec { kept: Some(kept), place, lse, ..base };
            for op in every_kind(8) {
                check(device, &spec, &op, &[spec.build()]);
            }
        }
    }
}

/// Many sequences at once, of one model and of several.
pub fn batches<D: TestDevice>(device: &D) {
    let mut layers = batch(&Spec { queries: 8, ..Spec::default() });
    check(device, "no sequence", &PLAIN, &[]);
    for (dtype, dim, group, lse) in [(Dtype::F16, 64, 2, true), (Dtype::BF16, 72, 16, false)] {
        let spec = Spec { tokens: 50, queries: 9, dtype, dim, group, lse, ..Spec::default() };
        layers.push(spec.build());
    }
    for op in every_kind(8) {
        check(device, "models", &op, &layers);
    }
}

/// NaN and infinities of queries, keys and values: all scores of their head, or a slot's own.
pub fn non_finite<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let spec = Spec { tokens: 50, queries: 8, dtype, ..Spec::default() };
        let clean = spec.build();
        let key = |row, x| Layer { k: clean.k.with_row_scaled(1, row, &[x]), ..clean.clone() };
        let value = |row, x| Layer { v: clean.v.with_row_scaled(1, row, &[x]), ..clean.clone() };
        let queries = clean.q.as_ref().expect("generated");
        let query = Layer { q: Some(queries.with_row_scaled(0, 3, &[f64::NAN])), ..clean.clone() };
        let layers = [
            ("NaN key", key(5, f64::NAN)),
            ("infinite key", key(5, f64::INFINITY)),
            ("NaN value in the anchor", value(20, f64::NAN)),
            ("NaN value outside", value(0, f64::NAN)),
            ("infinite value in the anchor", value(20, f64::INFINITY)),
            ("infinite value outside", value(49, f64::INFINITY)),
            ("NaN query", query.clone()),
        ];
        for (name, layer) in layers {
            for op in every_kind(8) {
                check(device, (name, dtype), &op, std::slice::from_ref(&layer));
            }
        }
        // Nothing is read: the row's weights alone are NaN, and those of neighbours that they are pooled with.
        for op in every_kind(8) {
            let op = Projection { anchor: &[0..0, 9..9], ..op };
            check_anchor(device, dtype, &op, std::slice::from_ref(&query));
        }
    }
}

/// Weights of 12 slots for the last two queries, in thirtieths, and what sums over pairs of slots must be: worked out in f64, apart
/// from all code here, from the published steps over chunks.
pub fn golden<D: TestDevice>(device: &D) {
    let weights = [[10, 1, 2, 1, 5, 1, 1, 3, 1, 1, 4, 0], [8, 1, 1, 1, 6, 1, 2, 2, 1, 1, 3, 3]];
    // A key's logits are the logarithms of its weights; the last slot is after the first query.
    let log = |w: i32| (f64::from(w.max(1)) / 30.0).ln();
    let keys = (0..12).map(|t| vec![log(weights[0][t]), log(weights[1][t]), 0.0, 0.0]).collect();
    let queries = vec![vec![2.0, 0.0, 0.0, 0.0], vec![0.0, 2.0, 0.0, 0.0]];
    let value = |t: usize| vec![(t % 3 + 1) as f64, (t % 2) as f64 - 0.5, 0.0, 0.0];
    let tensor = |rows| Tensor::new(vec![rows], 4, Dtype::F32, Place::HeadsFirst);
    let layer = Layer {
        k: tensor(keys),
        v: tensor((0..12).map(value).collect()),
        q: Some(tensor(queries)),
        ..Spec { tokens: 12, kv_heads: 1, group: 1, dim: 4, ..Spec::default() }.build()
    };
    for (row_pool, anchor, want) in [
        (None, 2..10, &[0.370833, 0.941389, 0.432778, 0.266667][..]),
        (None, 0..12, &[1.343333, 0.641111, 1.671111, 0.747778, 0.466667, 1.371111]),
        (Some(3), 2..10, &[1.260556, 3.411111, 0.94, 1.380556]),
        (Some(3), 0..12, &[6.08, 2.261667, 6.1, 1.7, 2.492778, 3.95]),
    ] {
        let op = Projection { window: 2, row_pool, anchor: std::slice::from_ref(&anchor), ..PLAIN };
        let scores = run(device, &op, std::slice::from_ref(&layer)).expect("scores");
        let layers = std::slice::from_ref(&layer);
        let expected = Expected { want: oracle(&op, layers), baseline: oracle(&op, layers) };
        expected.check(&(row_pool, anchor.clone()), Ok(scores.clone()), Scale::Row);
        let slots = &scores.row(0)[anchor.start as usize..anchor.end as usize];
        let pairs = slots.chunks(2).map(|pair| pair.iter().sum::<f32>()).collect();
        // To the digits that are given.
        let want: Vec<f64> = want.to_vec();
        let digits = want.iter().map(|x| (x + 5e-7) as f32).collect();
        let verdict = compare::floats(&Ragged::from_iter([pairs]), &[want], &[digits], Scale::Row);
        pass(&(row_pool, anchor.clone()), verdict);
    }
}

/// What cannot be computed is refused.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = |queries| [Spec { tokens: 40, queries, ..Spec::default() }.build()];
    let anchor = [0..40, 0..40];
    let op = Projection { anchor: &anchor, ..PLAIN };
    fails(&"no queries", run(device, &op, &layers(0)));
    fails(&"too few queries", run(device, &op, &layers(7)));
    fails(&"no window", run(device, &Projection { window: 0, ..op }, &layers(8)));
    fails(&"even kernel", run(device, &Projection { row_pool: Some(4), ..op }, &layers(8)));
    #[allow(clippy::reversed_empty_ranges, reason = "what must be refused")]
    for wrong in [&[][..], &anchor[..1], &[0..41, 0..40], &[0..40, 9..8]] {
        fails(&wrong, run(device, &Projection { anchor: wrong, ..op }, &layers(8)));
    }
}
