//! How much attention one KV head's slots get from the last queries, and how much that changes from one to the next.
//!
//! Over the slots before the window, `score[t] = mean_g (mean_w P + gamma · var_w P)` with the sample variance, and two sums: of
//! `-P ln P`, and of the variances.

use kvbudget::backend::ops::AttentionSpread;

use super::{Float, WindowHead, log_sum_exp, num, sum};

/// One score per slot, 0 inside the window; entropy and variance.
pub fn attention_spread<F: Float>(op: AttentionSpread, head: &WindowHead<F>) -> (Vec<F>, [F; 2]) {
    let window = op.window.min(head.tokens);
    let past = head.positions.iter().filter(|&&p| p < head.tokens - window).count();
    let (group, rows) = (num::<F>(head.q.len()), num::<F>(window));
    let mut scores = vec![F::zero(); head.k.len()];
    let (mut entropy, mut dispersion) = (F::zero(), F::zero());
    for (g, q) in head.q.iter().enumerate() {
        let weights: Vec<Vec<F>> = (q.len() - window as usize..q.len())
            .map(|at| {
                let z = head.logits(&q[at], head.tokens - (q.len() - at) as u32);
                let lse = head.lse.as_ref().map_or_else(|| log_sum_exp(&z), |lse| lse[g][at]);
                z[..past].iter().map(|z| (z.expect("all see the past") - lse).exp()).collect()
            })
            .collect();
        for (t, score) in scores[..past].iter_mut().enumerate() {
            let column = || weights.iter().map(|row| row[t]);
            let mean = sum(column()) / rows;
            let squares = sum(column().map(|p| (p - mean) * (p - mean)));
            let variance = if window > 1 { squares / (rows - F::one()) } else { F::zero() };
            *score = *score + (mean + num::<F>(op.gamma) * variance) / group;
            dispersion = dispersion + variance;
        }
        for p in weights.into_iter().flatten() {
            entropy = entropy - if p == F::zero() { p } else { p * p.ln() };
        }
    }
    (scores, [entropy, dispersion])
}
