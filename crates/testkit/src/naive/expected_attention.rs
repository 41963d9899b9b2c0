//! Attention of normally distributed queries to the keys of one head.

use super::{Float, Matrix, dot, max, num, sum};

/// Mean over query heads, each a mean `[D]` and a covariance `[D][D]`, of `softmax(μ·k/√D + kᵀΣk/(2D))`; the first `sinks` keys take no
/// part and get 0. NaN for all others if one of their logits is not finite.
pub fn expected_attention<F: Float>(
    queries: &[(Vec<F>, Matrix<F>)],
    keys: &Matrix<F>,
    sinks: usize,
) -> Vec<F> {
    let mut scores = vec![F::zero(); keys.len()];
    for (mean, covariance) in queries {
        let dim: F = num(mean.len());
        let square = |k: &Vec<F>| sum((0..k.len()).map(|i| k[i] * dot(&covariance[i], k)));
        let logit = |k: &Vec<F>| dot(mean, k) / dim.sqrt() + square(k) / (dim + dim);
        let finite = |x: F| if x.is_finite() { x } else { F::nan() };
        let logits: Vec<F> = keys[sinks..].iter().map(|k| finite(logit(k))).collect();
        let most = logits.iter().copied().fold(F::neg_infinity(), max);
        let weights: Vec<F> = logits.iter().map(|&x| (x - most).exp()).collect();
        let total = sum(weights.iter().copied());
        for (score, weight) in scores[sinks..].iter_mut().zip(weights) {
            *score = *score + weight / total / num(queries.len());
        }
    }
    scores
}
