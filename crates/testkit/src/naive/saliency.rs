//! Shares of tokens by the norms of their hidden rows.

use super::{Float, num, sum};

/// `softmax(z / temperature)` with the z-scores of `norms` by their sample deviation.
pub fn saliency<F: Float>(temperature: f32, norms: &[F]) -> Vec<F> {
    let n: F = num(norms.len());
    let mean = sum(norms.iter().copied()) / n;
    let squares = sum(norms.iter().map(|&r| (r - mean) * (r - mean)));
    let deviation = (squares / num(norms.len().max(2) - 1)).sqrt() + num(1e-8);
    let scaled = |&r: &F| (r - mean) / deviation / num(temperature);
    let logits: Vec<F> = norms.iter().map(scaled).collect();
    let most = logits.iter().copied().fold(F::neg_infinity(), super::max);
    let weights: Vec<F> = logits.into_iter().map(|x| (x - most).exp()).collect();
    let total = sum(weights.iter().copied());
    weights.into_iter().map(|w| w / total).collect()
}
