//! The conformance suite: what every backend must do, one module per operation, cases as data.
//!
//! A case is a function of a device; [`conformance!`](crate::conformance) makes each a test of its own. Output
//! rows start as NaN, so that what an operation does not write is noticed.

pub mod attend;
pub mod attention_spread;
pub mod expected_attention;
pub mod key_scores;
pub mod lag;
pub mod pool;
pub mod projection;
pub mod residual;
pub mod rows;
pub mod saliency;
pub mod top_k;
pub mod top_k_golden;
pub mod value_norm;
pub mod window_attention;

use std::fmt::Debug;

use kvbudget::backend::Backend;
use kvbudget::{Dtype, LayerView, Ragged, Result};

use crate::compare::{self, Scale, Verdict};
use crate::data::{Floats, Layer, Lent, Place, TestDevice, segment_lens, with_layers};
use crate::generate::Spec;
use crate::naive::Matrix;

/// Passes the list of all cases, `operation: case case …;`, to a macro of this crate.
#[macro_export]
macro_rules! for_each_case {
    ($then:ident, $($args:tt)*) => {
        $crate::$then! { $($args)*;
            attend: lengths queries shapes storage dims row_blocks ragged_heads splits many_heads batches peaky non_finite
                errors;
            attention_spread: lengths windows gammas shapes storage log_sum_exps many_rows long_heads compressed batches alike
                non_finite golden errors;
            expected_attention: lengths sinks shapes storage compressed batches peaky non_finite errors;
            key_scores: norms differences storage wide magnitudes no_direction non_finite recency random errors;
            lag: cross_scores ranks storage wide ties short_heads flat_channels non_finite errors;
            pool: averages maxima non_finite errors;
            projection: lengths windows kernels anchors shapes storage log_sum_exps many_rows long_heads compressed
                batches non_finite golden errors;
            residual: keys lengths ranks dims storage batches inside non_finite errors;
            rows: containers nan_counts norm_scales mean_floors weights raises ranks long_ranks shared_heads units picks errors;
            saliency: lengths temperatures equal storage batches non_finite errors;
            top_k: lengths values floors contests tiles parts random_problems pins drops masses free_masses errors;
            top_k_golden: cases;
            value_norm: lengths shapes widths blocks storage batches compressed zeros gram_shapes gram_widths gram_channels
                gram_batches gram_zeros plain errors;
            window_attention: lengths windows reductions shapes dims many_rows long_rows storage log_sum_exps keys
                gaps compressed batches probes non_finite errors;
        }
    };
}

/// A case by name, for a device of type `D`.
pub type Case<D> = (&'static str, fn(&D));

/// Every case.
pub fn cases<D: TestDevice>() -> Vec<Case<D>> {
    crate::for_each_case!(case_table, D)
}

/// Every layout, page sizes that divide nothing included.
const PLACES: [Place; 6] = [
    Place::HeadsFirst,
    Place::TokensFirst,
    Place::Gapped,
    Place::Ragged { slack: 3 },
    Place::Paged { page: 16 },
    Place::Paged { page: 5 },
];

/// Every storage type.
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// `base` in every dtype and layout.
fn stored(base: &Spec) -> impl Iterator<Item = Spec> + '_ {
    let all = DTYPES.into_iter().flat_map(|dtype| PLACES.map(|place| (dtype, place)));
    all.map(|(dtype, place)| Spec { dtype, place, ..base.clone() })
}

/// Sequences of different lengths, head counts and layouts; one empty, one of a single token.
fn batch(base: &Spec) -> Vec<Layer> {
    let sequence = |kv_heads, group, tokens, place, seed| Spec {
        kv_heads,
        group,
        tokens,
        place,
        seed,
        queries: base.queries.min(tokens),
        ..base.clone()
    };
    let empty = Some(vec![0, 0]);
    vec![
        sequence(1, 4, 130, Place::HeadsFirst, 1).build(),
        Spec { kept: empty, ..sequence(2, 1, 40, Place::HeadsFirst, 2) }.build(),
        sequence(3, 2, 65, Place::TokensFirst, 3).build(),
        Spec { kept: Some(vec![9, 0, 64, 1]), ..sequence(4, 1, 90, Place::Ragged { slack: 0 }, 4) }
            .build(),
        sequence(2, 7, 33, Place::Paged { page: 8 }, 5).build(),
    ]
}

#[track_caller]
fn pass(case: &dyn Debug, verdict: Verdict) {
    if let Err(difference) = verdict {
        panic!("{case:?}: {difference}");
    }
}

#[track_caller]
fn fails<T>(case: &dyn Debug, result: Result<T>) {
    assert!(result.is_err(), "{case:?}: accepted");
}

fn upload<D: TestDevice>(device: &D, rows: &[Vec<f32>]) -> Floats<D> {
    let rows = device.backend().upload(rows.iter().cloned().collect());
    rows.expect("rows can be written")
}

fn read<D: TestDevice>(device: &D, rows: &Floats<D>) -> Ragged<f32> {
    device.backend().to_host(rows).expect("rows can be read")
}

fn poisoned<D: TestDevice>(device: &D, lens: &[u32]) -> Floats<D> {
    upload(device, &lens.iter().map(|&n| vec![f32::NAN; n as usize]).collect::<Vec<_>>())
}

fn wide(rows: &[Vec<f32>]) -> Matrix<f64> {
    rows.iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

/// Runs an operation that reads layers and writes one row per segment.
fn scored<D: TestDevice>(
    device: &D,
    layers: &[Layer],
    run: impl FnOnce(&D::Backend, &[LayerView<'_, Lent<'_, D>>], &mut Floats<D>) -> Result<()>,
) -> Result<Ragged<f32>> {
    let mut out = poisoned(device, &segment_lens(layers));
    with_layers(device, layers, |views| run(device.backend(), views, &mut out))?;
    Ok(read(device, &out))
}

/// The oracle's rows, and the same loops in f32.
#[derive(Default)]
struct Expected {
    want: Matrix<f64>,
    baseline: Matrix<f32>,
}

impl Expected {
    fn of_heads(
        layers: &[Layer],
        want: impl Fn(&Layer, usize) -> Vec<f64>,
        baseline: impl Fn(&Layer, usize) -> Vec<f32>,
    ) -> Self {
        let heads = || layers.iter().flat_map(|l| (0..l.shape.kv_heads()).map(move |h| (l, h)));
        Self {
            want: heads().map(|(l, h)| want(l, h)).collect(),
            baseline: heads().map(|(l, h)| baseline(l, h)).collect(),
        }
    }

    #[track_caller]
    fn check(&self, case: &dyn Debug, got: Result<Ragged<f32>>, scale: Scale) {
        let got = got.unwrap_or_else(|e| panic!("{case:?}: {e}"));
        pass(case, compare::floats(&got, &self.want, &self.baseline, scale));
    }
}
