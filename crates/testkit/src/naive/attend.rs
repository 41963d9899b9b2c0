//! Ragged attention of one KV head's query group: query `i` of `M` sees all but the last `M - 1 - i` slots.

use super::{Float, Matrix, dot, log_sum_exp, sum};

/// `q` is `[G][M][D]`, `k` and `v` are `[T][D]`. Returns outputs `[G][M·D]` and log-sum-exp `[G][M]`.
pub fn attend<F: Float>(
    scale: F,
    q: &[Matrix<F>],
    k: &Matrix<F>,
    v: &Matrix<F>,
) -> (Matrix<F>, Matrix<F>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for queries in q {
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (i, query) in queries.iter().enumerate() {
            let seen = k.len() - (queries.len() - 1 - i);
            let z: Vec<Option<F>> = k[..seen].iter().map(|k| Some(dot(query, k) * scale)).collect();
            let total = log_sum_exp(&z);
            let p: Vec<F> = z.iter().flatten().map(|&z| (z - total).exp()).collect();
            out.extend((0..query.len()).map(|d| sum((0..seen).map(|t| p[t] * v[t][d]))));
            lse.push(total);
        }
        outs.push(out);
        lses.push(lse);
    }
    (outs, lses)
}
