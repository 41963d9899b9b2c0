//! The oracle: what each operation means, as loops over nested vectors, one file per stem.
//!
//! Generic over the float type only so that the same loops in f32 give the error that a tolerance is derived
//! from. Shares parameter structs with the crate under test, and no code.

mod attend;
mod attention_spread;
mod expected_attention;
mod key_scores;
mod lag;
mod pool;
mod projection;
mod residual;
mod rows;
mod saliency;
mod top_k;
mod value_norm;
mod window_attention;

pub use attend::attend;
pub use attention_spread::attention_spread;
pub use expected_attention::expected_attention;
pub use key_scores::{key_diff, key_norm};
pub use lag::lag;
pub use num_traits::Float;
pub use pool::pool;
pub use projection::projection;
pub use residual::residual_norms;
pub use rows::{coarsen, floor_at_mean, pick, raise, rank, scale_norms, share_heads, weigh};
pub use saliency::saliency;
pub use top_k::{drop_top, free_mass, mass_count, pin_top, ranking, top_k};
pub use value_norm::value_norm;
pub use window_attention::{WindowHead, log_sum_exp, window_attention};

/// Rows of one head: `[row][column]`.
pub type Matrix<F> = Vec<Vec<F>>;

/// A number in the float type at hand.
pub fn num<F: Float>(x: impl num_traits::ToPrimitive) -> F {
    F::from(x).expect("every float type holds the numbers of the tests")
}

fn sum<F: Float>(xs: impl IntoIterator<Item = F>) -> F {
    xs.into_iter().fold(F::zero(), |a, x| a + x)
}

fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    assert_eq!(a.len(), b.len());
    sum((0..a.len()).map(|i| a[i] * b[i]))
}

/// The larger; NaN if either is, unlike `f64::max`.
fn max<F: Float>(a: F, b: F) -> F {
    if a.is_nan() || a > b { a } else { b }
}

/// `a / b`, and 0 where there is nothing to divide by.
fn ratio<F: Float>(a: F, b: F) -> F {
    if b == F::zero() { F::zero() } else { a / b }
}
