//! Value norms through the output projection.

use std::fmt::Debug;

use kvbudget::backend::Backend;

use super::{Expected, batch, fails, scored, stored};
use crate::compare::Scale;
use crate::data::{Layer, Place, TestDevice};
use crate::generate::{LENGTHS, Spec};
use crate::naive::{self, Float};

fn oracle<F: Float>(layer: &Layer, h: usize) -> Vec<F> {
    let o_proj = layer.o_proj.as_ref().expect("a layer with an output projection");
    naive::value_norm(&layer.v.head(h), &o_proj.head(0), layer.group(h))
}

fn check<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer]) {
    let got = scored(device, layers, |backend, views, out| backend.value_norm(views, out));
    Expected::of_heads(layers, oracle, oracle).check(&case, got, Scale::Row);
}

/// Around every unit a kernel may work in.
pub fn lengths<D: TestDevice>(device: &D) {
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        check(device, tokens, &[Spec { tokens, hidden: 33, ..Spec::default() }.build()]);
    }
}

/// Groups, head dims and hidden sizes that are no power of two; a hidden size of one.
pub fn shapes<D: TestDevice>(device: &D) {
    for (group, dim) in [(1, 16), (2, 64), (4, 80), (7, 128)] {
        for hidden in [1, 7, 8, 65, 128] {
            check(
                device,
                (group, dim, hidden),
                &[Spec { group, dim, hidden, ..Spec::default() }.build()],
            );
        }
    }
}

/// Every dtype in every layout.
pub fn storage<D: TestDevice>(device: &D) {
    for spec in stored(&Spec { hidden: 40, dim: 80, ..Spec::default() }) {
        check(device, &spec, &[spec.build()]);
    }
}

/// Many sequences at once, empty heads among them.
pub fn batches<D: TestDevice>(device: &D) {
    check(device, "batch", &batch(&Spec { hidden: 24, ..Spec::default() }));
    check(device, "no sequence", &[]);
}

/// A compressed cache: values are by slot, positions do not matter.
pub fn compressed<D: TestDevice>(device: &D) {
    for place in [Place::Ragged { slack: 2 }, Place::Paged { page: 3 }] {
        let base = Spec { hidden: 24, kv_heads: 3, tokens: 64, ..Spec::default() };
        check(device, place, &[Spec { kept: Some(vec![20, 0, 7]), place, ..base }.build()]);
    }
}

/// A value of zeros moves nothing; a NaN or infinite value spoils its own slot only.
pub fn zeros<D: TestDevice>(device: &D) {
    let clean = Spec { hidden: 24, ..Spec::default() }.build();
    for factor in [0.0, f64::NAN, f64::INFINITY] {
        let v = clean.v.with_row_scaled(1, 5, &[factor; 16]);
        check(device, factor, &[Layer { v, ..clean.clone() }]);
    }
}

/// Without an output projection there is no norm.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = [Spec::default().build()];
    let run = scored(device, &layers, |backend, views, out| backend.value_norm(views, out));
    fails(&"no output projection", run);
}
