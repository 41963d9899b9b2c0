//! Keys read back, and what is left of keys outside subspaces.

use std::fmt::Debug;
use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::Residuals;
use kvbudget::{Dtype, Ragged, Result};

use super::{DTYPES, Expected, batch, fails, pass, poisoned, scored, stored};
use crate::compare::{self, Scale};
use crate::data::{Layer, Place, Tensor, TestDevice, segment_lens, with_layers};
use crate::generate::{LENGTHS, Rng, Spec};
use crate::naive::{self, Float, Matrix, num};

fn read_keys<D: TestDevice>(
    device: &D,
    layers: &[Layer],
    slots: &[Range<u32>],
) -> Result<Ragged<f32>> {
    with_layers(device, layers, |views| device.backend().keys(slots, views))
}

/// Every key to the bit, in every dtype and layout, of ranges that begin and end anywhere; dims that share vectors otherwise.
pub fn keys<D: TestDevice>(device: &D) {
    let check = |case: &dyn Debug, layers: &[Layer], slots: &[Range<u32>]| {
        let heads = layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(|h| l.k.head::<f64>(h)));
        let some = |(keys, slots): (Matrix<f64>, &Range<u32>)| {
            keys[slots.start as usize..slots.end as usize].concat()
        };
        let want: Vec<Vec<f64>> = heads.zip(slots).map(some).collect();
        let got = read_keys(device, layers, slots).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        pass(case, compare::exact(&got, &want));
    };
    for spec in stored(&Spec { dim: 80, ..Spec::default() }) {
        check(&spec, &[spec.build()], &[0..37, 5..29]);
    }
    for (dtype, dim) in DTYPES.into_iter().flat_map(|t| [8, 128, 136, 256].map(|dim| (t, dim))) {
        let spec = Spec { dtype, dim, tokens: 300, kv_heads: 1, ..Spec::default() };
        check(&spec, &[spec.build()], std::slice::from_ref(&(7..290)));
    }
    let layers = batch(&Spec::default());
    let half: Vec<Range<u32>> = segment_lens(&layers).iter().map(|&n| n / 3..n - n / 4).collect();
    check(&"batch", &layers, &half);
    let mixed = [16, 24].map(|dim| Spec { dim, ..Spec::default() }.build());
    check(&"dims", &mixed, &[1..5, 0..0, 0..37, 36..37]);
}

/// Orthonormal rows, rounded.
fn basis(rank: usize, dim: usize, seed: u64) -> Matrix<f32> {
    let mut rows = Rng::new(seed).matrix(rank as u32, dim as u32);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for i in 0..rank {
        let (before, rest) = rows.split_at_mut(i);
        // Twice is enough.
        for b in before.iter().chain(before.iter()) {
            let along = dot(&rest[0], b);
            rest[0].iter_mut().zip(b).for_each(|(x, b)| *x -= along * b);
        }
        let norm = dot(&rest[0], &rest[0]).sqrt();
        rest[0].iter_mut().for_each(|x| *x /= norm);
    }
    rows.into_iter().map(|row| row.into_iter().map(|x| x as f32).collect()).collect()
}

/// A basis of the given rank for each segment.
fn bases(layers: &[Layer], rank: usize) -> Vec<Matrix<f32>> {
    let dims = layers.iter().flat_map(|l| vec![l.shape.head_dim(); l.shape.kv_heads()]);
    (0u64..).zip(dims).map(|(s, dim)| basis(rank.min(dim), dim, s)).collect()
}

/// Two ranges with slots before, between and after.
fn parts(layers: &[Layer]) -> Vec<Vec<Range<u32>>> {
    let of = |n: u32| vec![n / 8..n / 3, n / 2..n - n.div_ceil(16)];
    segment_lens(layers).into_iter().map(of).collect()
}

fn run<D: TestDevice>(
    device: &D,
    layers: &[Layer],
    bases: &[Matrix<f32>],
    slots: &[Vec<Range<u32>>],
) -> Result<Ragged<f32>> {
    let bases: Ragged<f32> = bases.iter().map(|basis| basis.concat()).collect();
    let slots: Ragged<Range<u32>> = slots.iter().cloned().collect();
    let op = Residuals { bases: &bases, slots: &slots };
    scored(device, layers, |backend, views, out| backend.residual_norms(&op, views, out))
}

fn oracle<F: Float>(
    layers: &[Layer],
    bases: &[Matrix<f32>],
    slots: &[Vec<Range<u32>>],
) -> Matrix<F> {
    let heads = layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(move |h| l.k.head::<F>(h)));
    let mut rows = Vec::new();
    for (keys, (basis, slots)) in heads.zip(bases.iter().zip(slots)) {
        let basis: Matrix<F> =
            basis.iter().map(|row| row.iter().map(|&x| num(x)).collect()).collect();
        let norms = naive::residual_norms(&basis, &keys).into_iter();
        let measured = |t: u32| slots.iter().any(|range| range.contains(&t));
        let entry = |(t, norm): (u32, F)| if measured(t) { -norm } else { F::neg_infinity() };
        rows.push((0u32..).zip(norms).map(entry).collect());
    }
    rows
}

fn check<D: TestDevice>(
    device: &D,
    case: impl Debug,
    layers: &[Layer],
    bases: &[Matrix<f32>],
    slots: &[Vec<Range<u32>>],
) {
    let (want, baseline) = (oracle(layers, bases, slots), oracle(layers, bases, slots));
    let got = run(device, layers, bases, slots);
    Expected { want, baseline }.check(&case, got, Scale::Row);
}

fn check_rank<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer], rank: usize) {
    check(device, (case, rank), layers, &bases(layers, rank), &parts(layers));
}

/// Around lanes, tiles and blocks; nothing measured, everything, the ends.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        let layers = [Spec { tokens, ..Spec::default() }.build()];
        check_rank(device, tokens, &layers, 5);
        let all = std::iter::once(0..tokens).collect::<Vec<_>>();
        check(device, tokens, &layers, &bases(&layers, 3), &[all, vec![]]);
        let ends = vec![0..1, 1..1, tokens - 1..tokens];
        let ends = if tokens > 1 { ends } else { vec![] };
        check(device, tokens, &layers, &bases(&layers, 3), &[ends.clone(), ends]);
    }
}

/// No direction, one, as many as shared memory holds, more, all but one; in every dtype.
pub fn ranks<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        let layers = [Spec { dtype, dim: 72, tokens: 20, kv_heads: 1, ..Spec::default() }.build()];
        for rank in [0, 1, 31, 32, 33, 65, 71] {
            check_rank(device, dtype, &layers, rank);
        }
    }
}

/// Head dims that share vectors and lanes otherwise.
pub fn dims<D: TestDevice>(device: &D) {
    let of = |dtype, dim| Spec { dtype, dim, kv_heads: 1, tokens: 20, ..Spec::default() };
    let wide = DTYPES.into_iter().flat_map(|t| [64, 96, 128, 136, 256].map(|dim| of(t, dim)));
    let narrow = [4, 12, 20].map(|dim| of(Dtype::F32, dim));
    for spec in wide.chain(narrow) {
        check_rank(device, &spec, &[spec.build()], 3);
    }
}

/// Every dtype in every layout.
pub fn storage<D: TestDevice>(device: &D) {
    for spec in stored(&Spec { dim: 80, ..Spec::default() }) {
        check_rank(device, &spec, &[spec.build()], 6);
    }
}

/// Many sequences at once, of different ranks.
pub fn batches<D: TestDevice>(device: &D) {
    let layers = batch(&Spec::default());
    let mut bases = bases(&layers, 9);
    (0..).zip(&mut bases).for_each(|(s, basis)| basis.truncate(s % 5));
    check(device, "batch", &layers, &bases, &parts(&layers));
}

/// Keys inside the subspace, next to others: nothing but rounding is left of them, not its square root.
pub fn inside<D: TestDevice>(device: &D) {
    let spec = Spec { dim: 64, kv_heads: 1, ..Spec::default() };
    let layer = spec.build();
    let bases = bases(std::slice::from_ref(&layer), 4);
    let mut keys = layer.k.head::<f64>(0);
    for (t, key) in keys.iter_mut().enumerate().filter(|(t, _)| t % 3 > 0) {
        let b = |i: usize, d: usize| f64::from(bases[0][i][d]);
        *key = (0..64).map(|d| 7.0 * b(t % 4, d) + b((t + 1) % 4, d)).collect();
    }
    let k = Tensor::new(vec![keys], 64, Dtype::F32, Place::HeadsFirst);
    let layers = [Layer { k, ..layer }];
    let all = [std::iter::once(0..37).collect::<Vec<_>>()];
    let (want, baseline) = (oracle(&layers, &bases, &all), oracle(&layers, &bases, &all));
    let got = run(device, &layers, &bases, &all);
    Expected { want, baseline }.check(&"inside", got.clone(), Scale::Row);
    let got = got.expect("residuals");
    for (t, &norm) in got.row(0).iter().enumerate().filter(|(t, _)| t % 3 > 0) {
        assert!(norm.abs() < 1e-5, "slot {t}: {norm} is left of a key of norm 7");
    }
}

/// A key that is not finite has no residual; nor has any against a subspace that is none.
pub fn non_finite<D: TestDevice>(device: &D) {
    let clean = Spec::default().build();
    let none = bases(std::slice::from_ref(&clean), 3);
    for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let k = clean.k.with_row_scaled(1, 20, &[1.0, factor]);
        let layers = [Layer { k, ..clean.clone() }];
        check(device, factor, &layers, &none, &parts(&layers));
    }
    let mut none = none;
    none[0] = vec![vec![f32::NAN; 16]];
    let layers = [clean];
    check(device, "no subspace", &layers, &none, &parts(&layers));
}

/// Ranges, bases and rows that do not fit.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = &[Spec::default().build()];
    for slots in [&[][..], &[0..38, 0..0], &[0..0, 0..0, 0..0]] {
        fails(&("keys", slots), read_keys(device, layers, slots));
    }
    #[allow(clippy::reversed_empty_ranges, reason = "what is to be refused")]
    let reversed = [9..5, 0..0];
    fails(&"reversed", read_keys(device, layers, &reversed));

    let (good, all) = (bases(layers, 2), parts(layers));
    for slots in [vec![], vec![vec![0..38], vec![]], vec![vec![4..6, 5..7], vec![]]] {
        fails(&("slots", &slots), run(device, layers, &good, &slots));
    }
    let odd = vec![vec![vec![0.0; 17]], good[1].clone()];
    let many = vec![vec![vec![0.0; 16]; 17], good[1].clone()];
    for bases in [&good[..1], &odd, &many] {
        fails(&("bases", bases.len()), run(device, layers, bases, &all));
    }
    let mut out = poisoned(device, &[37, 36]);
    let bases: Ragged<f32> = good.iter().map(|basis| basis.concat()).collect();
    let slots: Ragged<Range<u32>> = all.into_iter().collect();
    let op = Residuals { bases: &bases, slots: &slots };
    with_layers(device, layers, |views| {
        fails(&"rows", device.backend().residual_norms(&op, views, &mut out));
    });
}
