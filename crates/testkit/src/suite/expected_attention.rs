//! Attention of expected queries.

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::ExpectedAttention;
use kvbudget::{Dtype, ExpectedQueries};

use super::{DTYPES, Expected, batch, fails, poisoned, scored, stored};
use crate::compare::Scale;
use crate::data::{Layer, Place, TestDevice, with_layers};
use crate::generate::{Keys, LENGTHS, Spec};
use crate::naive::{self, Float, num};

/// Whatever a case does not say.
fn base() -> Spec {
    Spec { expected: true, ..Spec::default() }
}

fn oracle<F: Float>(layer: &Layer, h: usize, sinks: u32) -> Vec<F> {
    let expected = layer.expected.as_ref().expect("a layer with expected queries");
    let floats = |row: &[f32]| row.iter().map(|&x| num(x)).collect::<Vec<F>>();
    let of_head = |g| {
        let covariance = expected.covariance(g).chunks(layer.shape.head_dim());
        (floats(expected.mean(g)), covariance.map(floats).collect())
    };
    let queries: Vec<_> = layer.group(h).map(of_head).collect();
    let sinks = layer.slot_positions()[h].partition_point(|&p| p < sinks);
    naive::expected_attention(&queries, &layer.k.head(h), sinks)
}

fn check<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer], sinks: u32) {
    let op = ExpectedAttention { sinks };
    let got =
        scored(device, layers, |backend, views, out| backend.expected_attention(op, views, out));
    let (want, baseline) = (|l: &Layer, h| oracle(l, h, sinks), |l: &Layer, h| oracle(l, h, sinks));
    Expected::of_heads(layers, want, baseline).check(&(case, sinks), got, Scale::Row);
}

/// Around every unit a kernel may work in, and its blocks; more than a block adds up at once.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        check(device, tokens, &[Spec { tokens, ..base() }.build()], 4);
    }
    let long = Spec { tokens: 4500, kv_heads: 1, group: 1, dim: 8, ..base() };
    check(device, "long", &[long.build()], 4);
}

/// No sinks, one, none but sinks, more than there are tokens.
pub fn sinks<D: TestDevice>(device: &D) {
    let layers = [Spec { tokens: 300, ..base() }.build()];
    for sinks in [0, 1, 31, 255, 256, 299, 300, 1000] {
        check(device, "sinks", &layers, sinks);
    }
}

/// Groups and head dims that are no power of two, in every dtype; slots of several blocks.
pub fn shapes<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (dim, group, tokens) in [
            (8, 3, 50),
            (64, 9, 35),
            (72, 2, 140),
            (96, 1, 50),
            (128, 2, 270),
            (136, 1, 50),
            (256, 1, 50),
        ] {
            let spec = Spec { dtype, dim, group, tokens, kv_heads: 2, ..base() };
            check(device, (dtype, dim, group), &[spec.build()], 4);
        }
    }
    let narrow = Spec { dtype: Dtype::F32, dim: 20, group: 7, ..base() };
    check(device, "narrow", &[narrow.build()], 2);
}

/// Every dtype in every layout.
pub fn storage<D: TestDevice>(device: &D) {
    for spec in stored(&Spec { dim: 80, ..base() }) {
        check(device, &spec, &[spec.build()], 4);
    }
}

/// A compressed cache: sinks go by position, and a head may hold some of them or none.
pub fn compressed<D: TestDevice>(device: &D) {
    for place in [Place::Ragged { slack: 2 }, Place::Paged { page: 3 }] {
        let spec = Spec { kept: Some(vec![40, 0, 7]), kv_heads: 3, tokens: 64, place, ..base() };
        let layer = spec.build();
        let held = layer.slot_positions();
        assert!(held[0].iter().any(|&p| p < 20) && held[2].iter().any(|&p| p > 20), "{held:?}");
        check(device, place, &[layer], 20);
    }
}

/// Many sequences at once, each with queries of its own, empty heads among them; other head dims between.
pub fn batches<D: TestDevice>(device: &D) {
    check(device, "batch", &batch(&base()), 4);
    check(device, "no sequence", &[], 4);
    let mixed = [16, 24, 16].map(|dim| Spec { dim, seed: u64::from(dim), ..base() }.build());
    check(device, "dims", &mixed, 4);
}

/// Logits in the tens and hundreds: nearly all mass on one slot, the rest down to underflow. And equal ones.
pub fn peaky<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        let plain = Spec { dtype, tokens: 90, ..base() }.build();
        let lent = plain.expected.as_ref().expect("expected queries");
        for factor in [8.0, 60.0] {
            let heads = || 0..plain.shape.query_heads();
            let scale = |row: &[f32]| row.iter().map(|x| x * factor).collect::<Vec<_>>();
            let mean = heads().flat_map(|g| scale(lent.mean(g))).collect();
            let covariance = heads().flat_map(|g| lent.covariance(g).to_vec()).collect();
            let expected = ExpectedQueries::new(plain.shape, mean, covariance);
            let layer = Layer { expected: Some(expected.expect("finite")), ..plain.clone() };
            check(device, (dtype, factor), &[layer], 4);
        }
    }
    for keys in [Keys::Equal, Keys::Zero] {
        check(device, keys, &[Spec { keys, ..base() }.build()], 4);
    }
}

/// A key that is not finite spoils its head; a sink spoils nothing.
pub fn non_finite<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let clean = Spec { dtype, ..base() }.build();
        for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for row in [2, 20] {
                let k = clean.k.with_row_scaled(1, row, &[1.0, factor]);
                check(device, (dtype, factor, row), &[Layer { k, ..clean.clone() }], 4);
            }
        }
    }
}

/// Nothing expected, rows that do not fit.
pub fn errors<D: TestDevice>(device: &D) {
    let op = ExpectedAttention { sinks: 4 };
    let bare = [Spec::default().build()];
    let run =
        scored(device, &bare, |backend, views, out| backend.expected_attention(op, views, out));
    fails(&"no expected queries", run);
    let mut out = poisoned(device, &[37, 36]);
    with_layers(device, &[base().build()], |views| {
        fails(&"rows", device.backend().expected_attention(op, views, &mut out));
    });
}
