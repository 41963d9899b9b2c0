//! Value norms through the output projection.

use std::fmt::Debug;

use kvbudget::Dtype;
use kvbudget::backend::Backend;

use super::{DTYPES, Expected, batch, fails, scored, stored};
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

/// 16-bit values of every width that a tensor core's kernel may be made for, and between; a large group.
pub fn widths<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F16, Dtype::BF16] {
        for (dim, group) in [(8, 3), (64, 16), (72, 2), (96, 2), (128, 2), (136, 1), (256, 2)] {
            let spec = Spec { dtype, dim, group, hidden: 70, tokens: 50, ..Spec::default() };
            check(device, (dtype, dim, group), &[spec.build()]);
        }
    }
}

/// Channels and slots of several blocks: shared out where there are few slots, and not where there are many sequences.
pub fn blocks<D: TestDevice>(device: &D) {
    for dtype in [Dtype::BF16, Dtype::F32] {
        let base = Spec { dtype, kv_heads: 1, group: 1, ..Spec::default() };
        let short = |seed| Spec { tokens: 2, dim: 8, hidden: 390, seed, ..base.clone() }.build();
        check(device, ("many", dtype), &(0..134).map(short).collect::<Vec<_>>());
        let long = Spec { tokens: 260, dim: 64, hidden: 700, group: 2, ..base.clone() };
        check(device, ("long", dtype), &[long.build()]);
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

/// A value of zeros moves nothing; a NaN or infinite value spoils its own slot only, and one infinite element leaves
/// an infinite norm.
pub fn zeros<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        let clean = Spec { dtype, hidden: 23, ..Spec::default() }.build();
        for factor in [0.0, f64::NAN, f64::INFINITY] {
            for count in [1, 16] {
                let v = clean.v.with_row_scaled(1, 5, &vec![factor; count]);
                check(device, (dtype, factor, count), &[Layer { v, ..clean.clone() }]);
            }
        }
    }
}

/// Without an output projection there is no norm.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = [Spec::default().build()];
    let run = scored(device, &layers, |backend, views, out| backend.value_norm(views, out));
    fails(&"no output projection", run);
}
