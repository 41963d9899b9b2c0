//! Shares by the norms of hidden rows, added to scores.
#![allow(clippy::single_range_in_vec_init, reason = "a stretch for each view, and one view")]

use std::fmt::Debug;
use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::Saliency;
use kvbudget::{Dtype, Ragged, Result};

use super::{Expected, PLACES, batch, fails, read, upload};
use crate::compare::Scale;
use crate::data::{Layer, Place, Tensor, TestDevice, segment_lens, with_layers};
use crate::generate::{LENGTHS, Rng, Spec};
use crate::naive::{self, Float, Matrix, num};

const WEIGHT: f32 = 0.75;

fn spec() -> Spec {
    Spec { hidden_norms: Some(Place::HeadsFirst), ..Spec::default() }
}

/// Small next to what is added: an entry that lacks it shows.
fn scores(layers: &[Layer]) -> Vec<Vec<f32>> {
    let rng = &mut Rng::new(3);
    let row = |n: u32| (0..n).map(|_| rng.unit() as f32 * 1e-3).collect();
    segment_lens(layers).into_iter().map(row).collect()
}

fn run<D: TestDevice>(
    device: &D,
    temperature: f32,
    layers: &[Layer],
    stretches: &[Range<u32>],
) -> Result<Ragged<f32>> {
    let op = Saliency { weight: WEIGHT, temperature, stretches };
    let mut rows = upload(device, &scores(layers));
    with_layers(device, layers, |views| device.backend().saliency(&op, views, &mut rows))?;
    Ok(read(device, &rows))
}

fn oracle<F: Float>(temperature: f32, layers: &[Layer], stretches: &[Range<u32>]) -> Matrix<F> {
    let mut rows = scores(layers).into_iter();
    let mut out = Vec::new();
    for (layer, stretch) in layers.iter().zip(stretches) {
        let norms = layer.hidden_norms.as_ref().map(|norms| norms.head::<F>(0));
        let norm = |p: u32| norms.as_ref().expect("norms of a stretch")[p as usize][0];
        let shares = naive::saliency(temperature, &stretch.clone().map(norm).collect::<Vec<F>>());
        for positions in layer.slot_positions() {
            let row = rows.next().expect("a row for each head");
            let entry = |(x, p): (f32, u32)| match stretch.contains(&p) {
                true => num::<F>(x) + num::<F>(WEIGHT) * shares[(p - stretch.start) as usize],
                false => num(x),
            };
            out.push(row.into_iter().zip(positions).map(entry).collect());
        }
    }
    out
}

fn check<D: TestDevice>(
    device: &D,
    case: impl Debug,
    temperature: f32,
    layers: &[Layer],
    stretches: &[Range<u32>],
) {
    let want = oracle(temperature, layers, stretches);
    let baseline = oracle(temperature, layers, stretches);
    let got = run(device, temperature, layers, stretches);
    Expected { want, baseline }.check(&(case, stretches), got, Scale::Element);
}

/// Stretches of one token and of many, at the start, at the end, between.
pub fn lengths<D: TestDevice>(device: &D) {
    for len in LENGTHS.into_iter().filter(|&n| n > 0) {
        for (before, after) in [(0, 0), (3, 0), (0, 5), (20, 9)] {
            let layer = Spec { tokens: before + len + after, kv_heads: 1, ..spec() }.build();
            check(device, "lengths", 3.5, &[layer], &[before..before + len]);
        }
    }
}

/// From nearly one token's alone to nearly equal shares.
pub fn temperatures<D: TestDevice>(device: &D) {
    for temperature in [0.1, 1.0, 3.5, 100.0] {
        check(device, temperature, temperature, &[spec().build()], &[5..30]);
    }
}

/// Equal norms share alike.
pub fn equal<D: TestDevice>(device: &D) {
    for norm in [0.0, 17.0] {
        let norms = vec![vec![norm]; 37];
        let norms = Tensor::new(vec![norms], 1, Dtype::F32, Place::HeadsFirst);
        let layer = Layer { hidden_norms: Some(norms), ..spec().build() };
        check(device, norm, 3.5, &[layer], &[4..33]);
    }
}

/// Wherever the norms lie.
pub fn storage<D: TestDevice>(device: &D) {
    for place in PLACES {
        let spec = Spec { hidden_norms: Some(place), ..spec() };
        check(device, place, 3.5, &[spec.build()], &[5..30]);
    }
}

/// Many sequences at once, compressed ones too: by position. Views without a stretch need no norms.
pub fn batches<D: TestDevice>(device: &D) {
    let layers = batch(&spec());
    let stretches = [20..100, 0..40, 0..0, 3..88, 32..33];
    check(device, "batch", 3.5, &layers, &stretches);
    let mut bare = layers;
    bare[2].hidden_norms = None;
    check(device, "without norms", 3.5, &bare, &stretches);
}

/// A norm that is not finite spoils its stretch and nothing else.
pub fn non_finite<D: TestDevice>(device: &D) {
    let clean = spec().build();
    let norms = clean.hidden_norms.as_ref().expect("norms");
    for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for token in [7, 35] {
            let norms = Some(norms.with_row_scaled(0, token, &[factor]));
            let layer = Layer { hidden_norms: norms, ..clean.clone() };
            check(device, (factor, token), 3.5, &[layer], &[5..30]);
        }
    }
}

/// No norms, no such positions, no temperature, no such rows.
pub fn errors<D: TestDevice>(device: &D) {
    let layer = &[spec().build()];
    let bare = Spec { hidden_norms: None, ..spec() };
    fails(&"no norms", run(device, 3.5, &[bare.build()], &[5..30]));
    fails(&"past the end", run(device, 3.5, layer, &[5..38]));
    fails(&"no stretch", run(device, 3.5, layer, &[]));
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        fails(&temperature, run(device, temperature, layer, &[5..30]));
    }
    let mut rows = upload(device, &[vec![0.0; 37]]);
    let op = Saliency { weight: WEIGHT, temperature: 3.5, stretches: &[5..30] };
    with_layers(device, layer, |views| {
        fails(&"few rows", device.backend().saliency(&op, views, &mut rows));
    });
}
