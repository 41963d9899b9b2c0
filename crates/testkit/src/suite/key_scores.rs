//! Scores from keys, and from positions alone.

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::Positional;
use kvbudget::{Dtype, Position, Ragged};

use super::{DTYPES, Expected, batch, fails, pass, poisoned, scored, stored};
use crate::compare::{self, Scale};
use crate::data::{Layer, Place, TestDevice, segment_lens, with_layers};
use crate::generate::{Keys, LENGTHS, Spec};
use crate::naive::{self, Float};

fn norm<F: Float>(layer: &Layer, h: usize) -> Vec<F> {
    naive::key_norm(&layer.k.head(h))
}

fn difference<F: Float>(layer: &Layer, h: usize) -> Vec<F> {
    naive::key_diff(&layer.k.head(h))
}

fn check_norm<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer]) {
    let got = scored(device, layers, |backend, views, out| backend.key_norm(views, out));
    Expected::of_heads(layers, norm, norm).check(&(case, "norm"), got, Scale::Element);
}

fn check_difference<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer]) {
    let got = scored(device, layers, |backend, views, out| backend.key_diff(views, out));
    let expected = Expected::of_heads(layers, difference, difference);
    expected.check(&(case, "difference"), got, Scale::Row);
}

/// Lengths and head dims.
fn grid() -> Vec<Spec> {
    let lengths = LENGTHS.into_iter().filter(|&n| n > 0);
    let mut grid: Vec<_> = lengths.map(|tokens| Spec { tokens, ..Spec::default() }).collect();
    grid.extend([64, 80, 128].map(|dim| Spec { dim, tokens: 70, ..Spec::default() }));
    grid
}

/// `-‖k‖` over lengths and head dims.
pub fn norms<D: TestDevice>(device: &D) {
    grid().iter().for_each(|spec| check_norm(device, spec, &[spec.build()]));
    check_norm(device, "batch", &batch(&Spec::default()));
}

/// `-cos` over lengths and head dims; one token is its own mean.
pub fn differences<D: TestDevice>(device: &D) {
    grid().iter().for_each(|spec| check_difference(device, spec, &[spec.build()]));
    check_difference(device, "batch", &batch(&Spec::default()));
}

/// Every dtype in every layout.
pub fn storage<D: TestDevice>(device: &D) {
    for spec in stored(&Spec { dim: 80, ..Spec::default() }) {
        check_norm(device, &spec, &[spec.build()]);
        check_difference(device, &spec, &[spec.build()]);
    }
}

/// Head dims that share vectors and lanes otherwise, in every dtype; several blocks of keys.
pub fn wide<D: TestDevice>(device: &D) {
    let base = Spec { tokens: 70, kv_heads: 1, ..Spec::default() };
    let of = |dtype, dim, tokens| Spec { dtype, dim, tokens, ..base.clone() };
    let wide = DTYPES.into_iter().flat_map(|t| [64, 96, 128, 136, 256].map(|dim| of(t, dim, 70)));
    let narrow = [4, 12, 20].map(|dim| of(Dtype::F32, dim, 70));
    let long = [of(Dtype::BF16, 64, 600), of(Dtype::F32, 128, 300)];
    for spec in wide.chain(narrow).chain(long) {
        check_norm(device, &spec, &[spec.build()]);
        check_difference(device, &spec, &[spec.build()]);
    }
}

/// Keys whose squares no f32 holds: norms go with them, and the directions of large ones stay. Small ones have none.
pub fn magnitudes<D: TestDevice>(device: &D) {
    for (dtype, factor) in [Dtype::F32, Dtype::BF16]
        .into_iter()
        .flat_map(|dtype| [2f64.powi(100), 2f64.powi(-100)].map(|factor| (dtype, factor)))
    {
        let plain = Spec { dtype, ..Spec::default() }.build();
        let rows = (0..2).flat_map(|h| (0..37).map(move |row| (h, row)));
        let k = rows.fold(plain.k.clone(), |k, (h, row)| k.with_row_scaled(h, row, &[factor; 16]));
        let layers = [Layer { k, ..plain.clone() }];
        let case = (dtype, factor);

        let scaled = |layer: &Layer, h| norm::<f64>(layer, h).iter().map(|x| x * factor).collect();
        let baseline = |layer: &Layer, h| {
            norm::<f32>(layer, h).iter().map(|x| x * factor as f32).collect::<Vec<f32>>()
        };
        let norms = Expected::of_heads(std::slice::from_ref(&plain), scaled, baseline);
        let got = scored(device, &layers, |backend, views, out| backend.key_norm(views, out));
        norms.check(&(case, "norm"), got, Scale::Element);

        if factor > 1.0 {
            let plain = Expected::of_heads(&[plain], difference, difference);
            let got = scored(device, &layers, |backend, views, out| backend.key_diff(views, out));
            plain.check(&(case, "difference"), got, Scale::Row);
        }
    }
}

/// Zero keys, and keys whose mean is zero: 0, never NaN from `0/0`.
pub fn no_direction<D: TestDevice>(device: &D) {
    let zero = Spec { keys: Keys::Zero, ..Spec::default() }.build();
    let clean = Spec { tokens: 9, ..Spec::default() }.build();
    let one_zero = Layer { k: clean.k.with_row_scaled(0, 4, &[0.0; 16]), ..clean };
    let pair = Spec { tokens: 2, keys: Keys::Equal, ..Spec::default() }.build();
    let opposite = Layer { k: pair.k.with_row_scaled(1, 0, &[-1.0; 16]), ..pair };
    for (name, layer) in [("all zero", zero), ("one zero", one_zero), ("opposite", opposite)] {
        check_norm(device, name, std::slice::from_ref(&layer));
        check_difference(device, name, &[layer]);
    }
}

/// A NaN key spoils its slot, and through the mean its head, and nothing else.
pub fn non_finite<D: TestDevice>(device: &D) {
    let clean = Spec { kv_heads: 3, ..Spec::default() }.build();
    let k = clean.k.with_row_scaled(1, 5, &[f64::NAN]);
    check_norm(device, "NaN", &[Layer { k: k.clone(), ..clean.clone() }]);
    check_difference(device, "NaN", &[Layer { k, ..clean.clone() }]);
    let k = clean.k.with_row_scaled(1, 5, &[f64::INFINITY]);
    check_norm(device, "infinity", &[Layer { k, ..clean }]);
}

/// A full and a compressed layer over the same tokens.
fn full_and_compressed() -> [Layer; 2] {
    let place = Place::Ragged { slack: 0 };
    let base = Spec { tokens: 130, kv_heads: 3, place, ..Spec::default() };
    [base.build(), Spec { kept: Some(vec![50, 0, 129]), ..base }.build()]
}

fn positional<D: TestDevice>(device: &D, op: Positional, layers: &[Layer]) -> Ragged<f32> {
    let run = scored(device, layers, |backend, views, out| backend.positional(op, views, out));
    run.unwrap_or_else(|e| panic!("{op:?}: {e}"))
}

/// Later is better, by position and not by slot, also where f32 has no integer for each position any more.
pub fn recency<D: TestDevice>(device: &D) {
    let exact = 1 << 24;
    let far =
        [0, 1, exact - 1, exact, exact + 1, exact + 2, 1 << 30, (1 << 30) + 1, i32::MAX as u32 - 1];
    let base = Spec { place: Place::Ragged { slack: 0 }, kv_heads: 1, ..Spec::default() };
    let mut long = Spec { kept: Some(vec![far.len() as u32]), tokens: 100, ..base }.build();
    long.tokens = i32::MAX as u32;
    long.positions = Some(vec![far.map(Position).to_vec()]);

    let layers = [full_and_compressed().to_vec(), vec![long]].concat();
    let scores = positional(device, Positional::Recency, &layers);
    let want = segment_lens(&layers).iter().map(|&n| n as usize).collect::<Vec<_>>();
    pass(&"lengths", compare::equal(&scores.lens().collect::<Vec<_>>(), &want));
    let positions = layers.iter().flat_map(Layer::slot_positions);
    let mut all: Vec<(u32, f32)> =
        positions.zip(scores.iter()).flat_map(|(p, x)| p.into_iter().zip(x.to_vec())).collect();
    all.sort_by_key(|&(position, _)| position);
    for pair in all.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        assert!(if a.0 == b.0 { a.1 == b.1 } else { a.1 < b.1 }, "{a:?}, {b:?}");
    }
}

/// Random scores are a function of seed, layer, head and position: not of slot, batch or neighbours.
pub fn random<D: TestDevice>(device: &D) {
    let layers = full_and_compressed();
    let positions: Vec<_> = layers.iter().flat_map(Layer::slot_positions).collect();
    let draw = |seed, layer| {
        let op = Positional::Random { seed, layer };
        let scores = positional(device, op, &layers);
        pass(&(op, "again"), compare::bits(&positional(device, op, &layers), &scores));
        let of_full = |(s, positions): (usize, &Vec<u32>)| -> Vec<f64> {
            positions.iter().map(|&p| f64::from(scores.row(s % 3)[p as usize])).collect()
        };
        let want: Vec<Vec<f64>> = positions.iter().enumerate().map(of_full).collect();
        pass(&(op, "by position"), compare::exact(&scores, &want));
        scores
    };
    let first = draw(7, 3);
    for other in [draw(8, 3), draw(7, 4)] {
        let same = other.data().iter().zip(first.data()).filter(|(a, b)| a == b).count();
        assert!(same < 3, "seed and layer change every score; {same} stayed");
    }
    let same = first.row(0).iter().zip(first.row(1)).filter(|(a, b)| a == b).count();
    assert!(same < 3, "heads draw apart; {same} scores agree");

    assert!(first.data().iter().all(|x| (0.0..1.0).contains(x)), "scores lie in [0, 1)");
    let mean = first.row(0).iter().sum::<f32>() / 130.0;
    assert!((0.35..0.65).contains(&mean), "130 uniform numbers have mean {mean}");
}

/// Output rows must be the segments'.
pub fn errors<D: TestDevice>(device: &D) {
    for lens in [&[37][..], &[37, 36], &[37, 38], &[37, 37, 37]] {
        let mut out = poisoned(device, lens);
        with_layers(device, &[Spec::default().build()], |views| {
            let backend = device.backend();
            fails(&("norm", lens), backend.key_norm(views, &mut out));
            fails(&("difference", lens), backend.key_diff(views, &mut out));
            fails(&("recency", lens), backend.positional(Positional::Recency, views, &mut out));
        });
    }
}
