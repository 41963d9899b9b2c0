//! Value norms of one KV head: `mean_g ‖v · W_o[g]‖`, with `W_o[g]` the columns of query head `g` of its group; and `‖v‖`.

use kvbudget::backend::ops::ValueNorm;

use super::{Float, Matrix, dot, num, sum};

/// `v` is `[T][D]`, `o_proj` is `[hidden][Hq·D]`, `query_heads` are the heads of the group.
pub fn value_norm<F: Float>(
    op: ValueNorm,
    v: &Matrix<F>,
    o_proj: &Matrix<F>,
    query_heads: std::ops::Range<usize>,
) -> Vec<F> {
    let Some(d) = v.first().map(Vec::len) else { return Vec::new() };
    let mut norms = vec![F::zero(); v.len()];
    for g in query_heads.clone() {
        let w: Vec<&[F]> = o_proj.iter().map(|w| &w[g * d..][..d]).collect();
        let gram = match op {
            ValueNorm::L1 | ValueNorm::Plain => Matrix::new(),
            ValueNorm::L2 => gram(&w, d),
        };
        for (norm, value) in norms.iter_mut().zip(v) {
            *norm = *norm
                + match op {
                    ValueNorm::L1 => sum(w.iter().map(|w| dot(value, w).abs())),
                    ValueNorm::L2 => root(sum((0..d).map(|i| value[i] * dot(value, &gram[i])))),
                    ValueNorm::Plain => dot(value, value).sqrt(),
                };
        }
    }
    norms.into_iter().map(|norm| norm / num(query_heads.len())).collect()
}

/// `Wᵀ W`.
fn gram<F: Float>(w: &[&[F]], d: usize) -> Matrix<F> {
    let element = |i: usize, j: usize| sum(w.iter().map(|w| w[i] * w[j]));
    (0..d).map(|i| (0..d).map(|j| element(i, j)).collect()).collect()
}

/// Of a square that rounding may have made negative; NaN of what is not finite.
fn root<F: Float>(square: F) -> F {
    if square.is_finite() { square.max(F::zero()).sqrt() } else { F::nan() }
}
