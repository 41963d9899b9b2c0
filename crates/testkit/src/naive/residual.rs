//! What is left of keys outside a subspace.

use super::{Float, Matrix, dot, sum};

/// `‖k - Σ (b · k) b‖` of each key, for orthonormal rows `b`.
pub fn residual_norms<F: Float>(basis: &Matrix<F>, keys: &Matrix<F>) -> Vec<F> {
    let of_key = |key: &Vec<F>| {
        let along: Vec<F> = basis.iter().map(|b| dot(b, key)).collect();
        let inside = |d: usize| sum((0..basis.len()).map(|i| along[i] * basis[i][d]));
        let left: Vec<F> = (0..key.len()).map(|d| key[d] - inside(d)).collect();
        dot(&left, &left).sqrt()
    };
    keys.iter().map(of_key).collect()
}
