//! How far the values of one KV head reach along what each query of its group reads.
//!
//! A query reads `y = Σ a[t] · v[t]` over the anchor, with its softmax row `a`, zero at slots that it does not see, pooled by maximum
//! if asked for. A slot's score is the sum of `a[t] · (v[t] · y)` over the queries. What is not finite is NaN.

use std::ops::Range;

use kvbudget::backend::ops::{Pool, Pooling, Projection};

use super::{Float, Matrix, WindowHead, dot, log_sum_exp, pool, ratio, sum};

/// One score per slot of a head with values `[T][D]`.
pub fn projection<F: Float>(
    op: &Projection<'_>,
    anchor: Range<u32>,
    head: &WindowHead<F>,
    v: &Matrix<F>,
) -> Vec<F> {
    let window = op.window.min(head.tokens) as usize;
    let mut scores = vec![F::zero(); v.len()];
    for (g, q) in head.q.iter().enumerate() {
        for at in q.len() - window..q.len() {
            let z = head.logits(&q[at], head.tokens - (q.len() - at) as u32);
            let lse = head.lse.as_ref().map_or_else(|| log_sum_exp(&z), |lse| lse[g][at]);
            let mut a: Vec<F> =
                z.iter().map(|z| z.map_or(F::zero(), |z| (z - lse).exp())).collect();
            if let Some(kernel) = op.row_pool {
                pool(&Pool { kind: Pooling::Max, kernel, lens: &[] }, &mut a);
            }
            let anchor = anchor.start as usize..anchor.end as usize;
            let mut y: Vec<F> =
                (0..q[at].len()).map(|d| sum(anchor.clone().map(|t| a[t] * v[t][d]))).collect();
            if op.normalise {
                let norm = dot(&y, &y).sqrt();
                y.iter_mut().for_each(|x| *x = ratio(*x, norm));
            }
            for (t, score) in scores.iter_mut().enumerate() {
                *score = *score + a[t] * dot(&v[t], &y);
            }
        }
    }
    scores.into_iter().map(|x| if x.is_finite() { x } else { F::nan() }).collect()
}
