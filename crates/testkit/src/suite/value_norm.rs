//! Value norms through the output projection.

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::ValueNorm;
use kvbudget::{Dtype, LayerView, Result};

use super::{DTYPES, Expected, batch, fails, scored, stored};
use crate::compare::Scale;
use crate::data::{Layer, Lent, Place, TestDevice};
use crate::generate::{LENGTHS, Spec};
use crate::naive::{self, Float};

fn oracle<F: Float>(op: ValueNorm, layer: &Layer, h: usize) -> Vec<F> {
    let o_proj = layer.o_proj.as_ref().expect("a layer with an output projection");
    naive::value_norm(op, &layer.v.head(h), &o_proj.head(0), layer.group(h))
}

fn check<D: TestDevice>(device: &D, case: impl Debug, layers: &[Layer]) {
    check_norm(device, ValueNorm::L1, case, layers);
}

fn check_norm<D: TestDevice>(device: &D, op: ValueNorm, case: impl Debug, layers: &[Layer]) {
    let got = scored(device, layers, |backend, views, out| backend.value_norm(op, views, out));
    let (want, baseline) = (|l: &Layer, h| oracle(op, l, h), |l: &Layer, h| oracle(op, l, h));
    Expected::of_heads(layers, want, baseline).check(&case, got, Scale::Row);
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

/// L2: lengths around every unit, the groups and head dims of [`shapes`], every layout.
pub fn gram_shapes<D: TestDevice>(device: &D) {
    let check = |case: &dyn Debug, layer| check_norm(device, ValueNorm::L2, case, &[layer]);
    for tokens in LENGTHS.into_iter().filter(|&n| n > 0) {
        check(&tokens, Spec { tokens, hidden: 33, ..Spec::default() }.build());
    }
    for (group, dim) in [(1, 16), (2, 64), (4, 80), (7, 128)] {
        // With a channel or two squares cancel: their error is then a matter of luck, in f32 loops as well.
        for hidden in [7, 8, 65] {
            let spec = Spec { group, dim, hidden, tokens: 20, ..Spec::default() };
            check(&(group, dim, hidden), spec.build());
        }
    }
    for spec in stored(&Spec { hidden: 40, dim: 80, tokens: 40, ..Spec::default() }) {
        check(&spec, spec.build());
    }
}

/// L2 of every dtype and of every width that a kernel may be made for, and between; a large group; slots of several blocks.
pub fn gram_widths<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (dim, group, tokens) in [
            (8, 3, 50),
            (64, 16, 35),
            (72, 2, 140),
            (96, 2, 50),
            (128, 2, 270),
            (136, 1, 50),
            (256, 1, 50),
        ] {
            let spec =
                Spec { dtype, kv_heads: 1, dim, group, hidden: 70, tokens, ..Spec::default() };
            check_norm(device, ValueNorm::L2, (dtype, dim, group), &[spec.build()]);
        }
    }
}

/// L2 with channels of several blocks, shared out; more channels than a matrix has columns, and fewer.
pub fn gram_channels<D: TestDevice>(device: &D) {
    for dtype in [Dtype::BF16, Dtype::F32] {
        for (dim, hidden) in [(64, 700), (32, 257), (128, 20)] {
            let spec =
                Spec { dtype, dim, hidden, kv_heads: 1, group: 2, tokens: 35, ..Spec::default() };
            check_norm(device, ValueNorm::L2, (dtype, dim, hidden), &[spec.build()]);
        }
    }
}

/// L2 of many sequences at once, empty heads among them: with projections of their own, and with one for all.
pub fn gram_batches<D: TestDevice>(device: &D) {
    let op = ValueNorm::L2;
    check_norm(device, op, "batch", &batch(&Spec { hidden: 24, ..Spec::default() }));
    check_norm(device, op, "no sequence", &[]);
    let base = Spec { hidden: 24, kv_heads: 3, tokens: 64, ..Spec::default() };
    for place in [Place::Ragged { slack: 2 }, Place::Paged { page: 3 }] {
        let spec = Spec { kept: Some(vec![20, 0, 7]), place, ..base.clone() };
        check_norm(device, op, place, &[spec.build()]);
    }
    let layers =
        [1, 2, 3].map(|seed| Spec { seed, tokens: 10 * seed as u32, ..base.clone() }.build());
    let shared = layers[0].o_proj.clone().expect("a layer with an output projection");
    let of_all = |backend: &D::Backend, views: &[LayerView<'_, Lent<'_, D>>], out: &mut _| {
        let o_proj = *views[0].o_proj("this test")?;
        let sharing = views.iter().map(|view| view.with_output_projection(o_proj));
        backend.value_norm(op, &sharing.collect::<Result<Vec<_>>>()?, out)
    };
    let expected = layers.each_ref().map(|l| Layer { o_proj: Some(shared.clone()), ..l.clone() });
    let got = scored(device, &layers, of_all);
    let (want, baseline) = (|l: &Layer, h| oracle(op, l, h), |l: &Layer, h| oracle(op, l, h));
    Expected::of_heads(&expected, want, baseline).check(&"one projection", got, Scale::Row);
}

/// L2: a value of zeros moves nothing; one that is not finite makes its own slot NaN.
pub fn gram_zeros<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        let clean = Spec { dtype, hidden: 23, ..Spec::default() }.build();
        for factor in [0.0, f64::NAN, f64::INFINITY] {
            for count in [1, 16] {
                let v = clean.v.with_row_scaled(1, 5, &vec![factor; count]);
                let layers = [Layer { v, ..clean.clone() }];
                check_norm(device, ValueNorm::L2, (dtype, factor, count), &layers);
            }
        }
    }
}

/// Without the projection: lengths and head dims, every layout, many sequences; values whose squares no f32 holds, none, infinite ones.
pub fn plain<D: TestDevice>(device: &D) {
    let check = |case: &dyn Debug, layers: &[Layer]| {
        let norm = |l: &Layer, h| naive::value_norm(ValueNorm::Plain, &l.v.head(h), &vec![], 0..1);
        let baseline =
            |l: &Layer, h| naive::value_norm(ValueNorm::Plain, &l.v.head(h), &vec![], 0..1);
        let got = scored(device, layers, |backend, views, out| {
            backend.value_norm(ValueNorm::Plain, views, out)
        });
        Expected::of_heads(layers, norm, baseline).check(case, got, Scale::Element);
    };
    for tokens in [1, 31, 33, 129, 300] {
        check(&tokens, &[Spec { tokens, ..Spec::default() }.build()]);
    }
    for dim in [8, 64, 136, 256] {
        check(&dim, &[Spec { dim, ..Spec::default() }.build()]);
    }
    for spec in stored(&Spec { dim: 80, ..Spec::default() }) {
        check(&spec, &[spec.build()]);
    }
    check(&"batch", &batch(&Spec::default()));
    let clean = Spec::default().build();
    for factor in [0.0, f64::NAN, f64::INFINITY] {
        let v = clean.v.with_row_scaled(1, 5, &[factor; 16]);
        check(&factor, &[Layer { v, ..clean.clone() }]);
    }
}

/// Without an output projection there is no norm.
pub fn errors<D: TestDevice>(device: &D) {
    let layers = [Spec::default().build()];
    for op in [ValueNorm::L1, ValueNorm::L2] {
        let run = scored(device, &layers, |backend, views, out| backend.value_norm(op, views, out));
        fails(&(op, "no output projection"), run);
    }
}
