//! LagKV: partitions, ranks, heads that are too short for either.

use std::fmt::Debug;

use kvbudget::Dtype;
use kvbudget::backend::Backend;
use kvbudget::backend::ops::Lag;

use super::{DTYPES, Expected, batch, fails, scored, stored};
use crate::compare::Scale;
use crate::data::{Layer, Place, Tensor, TestDevice};
use crate::generate::{Rng, Spec};
use crate::naive::{self, Float, Matrix};

fn oracle<F: Float>(op: &Lag, layer: &Layer, h: usize) -> Vec<F> {
    naive::lag(op, &layer.k.head(h), &layer.v.head(h))
}

fn check<D: TestDevice>(device: &D, case: impl Debug, op: &Lag, layers: &[Layer]) {
    let expected = Expected::of_heads(layers, |l, h| oracle(op, l, h), |l, h| oracle(op, l, h));
    if !op.cross_scoring {
        // Ranks jump where scores nearly tie: the data must be such that f32 can tell them apart.
        let agree = expected.want.iter().flatten().zip(expected.baseline.iter().flatten());
        assert!(agree.into_iter().all(|(w, b)| *w as f32 == *b), "{case:?}: ambiguous ranks");
    }
    let got = scored(device, layers, |backend, views, out| backend.lag(op, views, out));
    expected.check(&(case, op), got, Scale::Element);
}

/// One slot before, at and after each partition boundary.
fn boundaries(op: &Lag) -> Vec<u32> {
    let full = |partitions| op.sinks + partitions * op.lag;
    (2..5).flat_map(|p| [full(p), full(p) + 1, full(p + 1) - 1]).collect()
}

/// Sinks and lag. Not smaller: a range of two slots can be so narrow that softmaxes saturate and all ranks tie.
const SIZES: [(u32, u32); 4] = [(0, 5), (4, 8), (4, 33), (1, 16)];

/// Raw scores.
pub fn cross_scores<D: TestDevice>(device: &D) {
    for (sinks, lag) in SIZES {
        let op = Lag { sinks, lag, cross_scoring: true };
        for tokens in boundaries(&op) {
            check(device, tokens, &op, &[Spec { tokens, ..Spec::default() }.build()]);
        }
    }
}

/// Ranks within each partition, as fractions of its size.
pub fn ranks<D: TestDevice>(device: &D) {
    for (sinks, lag) in SIZES {
        let op = Lag { sinks, lag, cross_scoring: false };
        for tokens in boundaries(&op) {
            check(device, tokens, &op, &[Spec { tokens, ..Spec::default() }.build()]);
        }
    }
}

/// Every dtype in every layout; many sequences at once.
pub fn storage<D: TestDevice>(device: &D) {
    let op = Lag { sinks: 4, lag: 8, cross_scoring: true };
    for spec in stored(&Spec { dim: 80, ..Spec::default() }) {
        check(device, &spec, &op, &[spec.build()]);
    }
    check(device, "batch", &op, &batch(&Spec::default()));
}

/// Head dims that share vectors and lanes otherwise, in every dtype; partitions of more slots than a block has threads.
pub fn wide<D: TestDevice>(device: &D) {
    let small = Lag { sinks: 4, lag: 8, cross_scoring: true };
    let of = |dtype, dim| Spec { dtype, dim, kv_heads: 1, ..Spec::default() };
    let wide = DTYPES.into_iter().flat_map(|t| [64, 96, 128, 136, 256].map(|dim| of(t, dim)));
    let narrow = [4, 12, 20].map(|dim| of(Dtype::F32, dim));
    for spec in wide.chain(narrow) {
        check(device, &spec, &small, &[spec.build()]);
    }
    let large = Spec { tokens: 610, ..of(Dtype::F32, 16) };
    for cross_scoring in [false, true] {
        let op = Lag { sinks: 2, lag: 300, cross_scoring };
        check(device, &large, &op, &[large.build()]);
    }
}

/// Equal slots tie, and the earlier one has the lower rank.
pub fn ties<D: TestDevice>(device: &D) {
    let op = Lag { sinks: 0, lag: 8, cross_scoring: false };
    let layer = Spec { tokens: 32, ..Spec::default() }.build();
    let doubled = |t: &Tensor| {
        let pairs = |m: &Matrix<f64>| (0..m.len()).map(|row| m[row / 2].clone()).collect();
        Tensor::new(t.heads.iter().map(pairs).collect(), 16, Dtype::F32, Place::HeadsFirst)
    };
    let layer = Layer { k: doubled(&layer.k), v: doubled(&layer.v), ..layer };
    check(device, "pairs", &op, &[layer]);
}

/// A NaN spoils its partition, and the one before that is scaled by it.
pub fn non_finite<D: TestDevice>(device: &D) {
    let clean = Spec::default().build();
    for cross_scoring in [false, true] {
        let op = Lag { sinks: 4, lag: 8, cross_scoring };
        let k = clean.k.with_row_scaled(1, 14, &[f64::NAN]);
        let layers = [Layer { k, ..clean.clone() }];
        let got = scored(device, &layers, |backend, views, out| backend.lag(&op, views, out));
        // All else is as it was without.
        let of = std::slice::from_ref(&clean);
        let mut expected =
            Expected::of_heads(of, |l, h| oracle(&op, l, h), |l, h| oracle(&op, l, h));
        expected.want[1][4..20].fill(f64::NAN);
        expected.baseline[1][4..20].fill(f32::NAN);
        expected.check(&op, got, Scale::Element);
    }
}

/// Without a partition and a next one to compare with, later is better.
pub fn short_heads<D: TestDevice>(device: &D) {
    for cross_scoring in [false, true] {
        let op = Lag { sinks: 4, lag: 8, cross_scoring };
        for tokens in [1, 3, 4, 5, 11, 12, 13, 19] {
            check(device, tokens, &op, &[Spec { tokens, ..Spec::default() }.build()]);
        }
    }
}

/// Channels that do not vary have no range to scale by: they count as 0, never NaN from `0/0`.
pub fn flat_channels<D: TestDevice>(device: &D) {
    let op = Lag { sinks: 4, lag: 8, cross_scoring: true };
    let clean = Spec::default().build();
    let mut factors = vec![1.0; 16];
    Rng::new(3).choose(5, 16).into_iter().for_each(|d| factors[d as usize] = 0.0);
    let flat = |t: &Tensor| {
        let rows = (0..2).flat_map(|h| (0..37).map(move |row| (h, row)));
        rows.fold(t.clone(), |t, (h, row)| t.with_row_scaled(h, row, &factors))
    };
    let k = flat(&clean.k);
    check(device, "flat channels", &op, &[Layer { k: k.clone(), ..clean.clone() }]);
    let zero = clean.v.heads.iter().map(|m| vec![vec![0.0; 16]; m.len()]).collect();
    let place = Place::HeadsFirst;
    let v = Tensor::new(zero, 16, Dtype::F32, place);
    check(device, "no values", &op, &[Layer { k, v, ..clean }]);
}

/// Partitions of nothing.
pub fn errors<D: TestDevice>(device: &D) {
    let op = Lag { sinks: 4, lag: 0, cross_scoring: true };
    let layers = [Spec::default().build()];
    fails(&op, scored(device, &layers, |backend, views, out| backend.lag(&op, views, out)));
}
