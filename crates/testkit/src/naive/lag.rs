//! LagKV on one head: how much a slot varies over its channels, scaled by the next partition's range.
//!
//! Partitions of `lag` slots start after the sinks. Each but the last full one is scored, keys and values apart:
//! `softmax over the partition of std over channels of (x - min) / (max - min)`, with the range of the next.
//! Everything else gets 1; a channel without range counts as 0. A head too short for two partitions is scored
//! by recency after the sinks.

use kvbudget::backend::ops::Lag;

use super::{Float, Matrix, max, num, ratio, sum};

/// One score per slot.
pub fn lag<F: Float>(op: &Lag, k: &Matrix<F>, v: &Matrix<F>) -> Vec<F> {
    let (sinks, size) = (op.sinks as usize, op.lag as usize);
    let mut scores = vec![F::one(); k.len()];
    if k.len() < sinks + 2 * size {
        for (i, score) in scores.iter_mut().skip(sinks).enumerate() {
            *score = num::<F>(i) / num(k.len() - sinks);
        }
        return scores;
    }
    let partitions = (k.len() - sinks) / size;
    for p in 1..partitions {
        let (from, to) = (sinks + (p - 1) * size, sinks + p * size);
        let half = |x: &Matrix<F>| spread(&x[from..to], &x[to..to + size]);
        let (of_k, of_v) = (half(k), half(v));
        let mut score: Vec<F> = (0..size).map(|i| (of_k[i] + of_v[i]) / num(2)).collect();
        if !op.cross_scoring {
            score = ranks(&score).iter().map(|&r| num::<F>(r) / num(size)).collect();
        }
        scores[from..to].copy_from_slice(&score);
    }
    scores
}

/// Softmax over slots of the (unbiased) standard deviation over channels.
fn spread<F: Float>(part: &[Vec<F>], reference: &[Vec<F>]) -> Vec<F> {
    let dim = part[0].len();
    let column = |d: usize| reference.iter().map(move |x| x[d]);
    let low = |d: usize| column(d).fold(F::infinity(), |a, x| -max(-a, -x));
    let high = |d: usize| column(d).fold(F::neg_infinity(), max);
    let std = |x: &Vec<F>| {
        let z: Vec<F> = (0..dim).map(|d| ratio(x[d] - low(d), high(d) - low(d))).collect();
        let mean = sum(z.iter().copied()) / num(dim);
        (sum(z.iter().map(|&z| (z - mean) * (z - mean))) / num(dim - 1)).sqrt()
    };
    let weights: Vec<F> = part.iter().map(|x| std(x).exp()).collect();
    let total = sum(weights.iter().copied());
    weights.iter().map(|&w| w / total).collect()
}

/// How many come before each in ascending order; of equals, the earlier first.
fn ranks<F: Float>(x: &[F]) -> Vec<usize> {
    let before = |i: usize, j: usize| x[j] < x[i] || (x[j] == x[i] && j < i);
    (0..x.len()).map(|i| (0..x.len()).filter(|&j| before(i, j)).count()).collect()
}
