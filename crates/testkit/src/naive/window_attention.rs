//! Attention of the last queries on one KV head, reduced over the window, then over the group.
//!
//! `P[g][w][t] = exp(q[g][w] · k[t] / √D) / Σ over the slots visible to w`; a slot is visible to the queries at
//! its position and later, and to all of a probe. A query that sees nothing gives zeros.

use kvbudget::backend::ops::{Pool, Pooling, Reduce, WindowAttention};

use super::{Float, Matrix, dot, max, num, pool, ratio, sum};

/// What one KV head of one layer brings.
#[derive(Debug, Clone)]
pub struct WindowHead<F> {
    /// Queries of the group, `[G][rows][D]`; the last rows belong to the last tokens.
    pub q: Vec<Matrix<F>>,
    /// Keys `[T][D]`.
    pub k: Matrix<F>,
    /// Position of each slot, ascending.
    pub positions: Vec<u32>,
    /// Tokens seen.
    pub tokens: u32,
    /// Log of the softmax denominators, `[G][rows]`, if given.
    pub lse: Option<Matrix<F>>,
}

/// Scores, and the mean over window and group of the unpooled rows (zero inside the window).
pub fn window_attention<F: Float>(op: &WindowAttention, head: &WindowHead<F>) -> (Vec<F>, Vec<F>) {
    let rows = head.q[0].len();
    let window = if op.probe { rows.min(op.window as usize) } else { op.window as usize };
    let past = match op.probe {
        true => head.k.len(),
        false => head.positions.iter().filter(|&&p| p < head.tokens - op.window).count(),
    };
    let scored = if op.score_window { head.k.len() } else { past };

    let mut groups = Vec::new();
    let mut mean = vec![F::zero(); head.k.len()];
    for (g, q) in head.q.iter().enumerate() {
        let mut rows = Vec::new();
        for w in 0..window {
            let at = q.len() - window + w;
            let newest = if op.probe { head.tokens } else { head.tokens - op.window + w as u32 };
            let z = head.logits(&q[at], newest);
            let lse = head.lse.as_ref().map_or_else(|| log_sum_exp(&z), |lse| lse[g][at]);
            let mut row: Vec<F> =
                z.iter().map(|z| z.map_or(F::zero(), |z| (z - lse).exp())).collect();
            for t in (0..past).filter(|&t| head.positions[t] + op.gap <= newest) {
                mean[t] = mean[t] + row[t] / num(window * head.q.len());
            }
            row[scored..].fill(F::zero());
            for (x, &position) in row.iter_mut().zip(&head.positions) {
                if position + op.gap > newest {
                    *x = F::zero();
                }
            }
            if let Some(kernel) = op.row_pool {
                let mass = sum(row[..scored].iter().copied());
                pool(&Pool { kind: Pooling::Avg, kernel, lens: &[] }, &mut row[..scored]);
                let pooled = sum(row[..scored].iter().copied());
                row[..scored].iter_mut().for_each(|x| *x = ratio(*x * mass, pooled));
            }
            rows.push(row);
        }
        groups.push(reduce(op.over_window, &rows));
    }
    (reduce(op.over_group, &groups), mean)
}

/// `ln Σ exp` over what is visible.
pub fn log_sum_exp<F: Float>(logits: &[Option<F>]) -> F {
    let visible = || logits.iter().flatten().copied();
    let top = visible().fold(F::neg_infinity(), max);
    top + sum(visible().map(|z| (z - top).exp())).ln()
}

impl<F: Float> WindowHead<F> {
    /// Scaled products with the keys that a query at position `newest` sees.
    pub fn logits(&self, q: &[F], newest: u32) -> Vec<Option<F>> {
        let scale = num::<F>(q.len()).sqrt();
        let visible = |t: usize| self.positions[t] <= newest;
        (0..self.k.len()).map(|t| visible(t).then(|| dot(q, &self.k[t]) / scale)).collect()
    }
}

fn reduce<F: Float>(how: Reduce, rows: &[Vec<F>]) -> Vec<F> {
    let column = |t: usize| rows.iter().map(move |row| row[t]);
    (0..rows[0].len())
        .map(|t| match how {
            Reduce::Mean => sum(column(t)) / num(rows.len()),
            Reduce::Max => column(t).fold(F::neg_infinity(), max),
        })
        .collect()
}
