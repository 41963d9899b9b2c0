//! Scores of one head from its keys.

use super::{Float, Matrix, dot, ratio, sum};

/// `-‖k‖₂`.
pub fn key_norm<F: Float>(k: &Matrix<F>) -> Vec<F> {
    k.iter().map(|k| -dot(k, k).sqrt()).collect()
}

/// `-cos(k, mean of the head's unit keys)`; 0 where either has no direction.
pub fn key_diff<F: Float>(k: &Matrix<F>) -> Vec<F> {
    let unit = |k: &Vec<F>| -> Vec<F> {
        let norm = dot(k, k).sqrt();
        k.iter().map(|&x| ratio(x, norm)).collect()
    };
    let units: Vec<Vec<F>> = k.iter().map(unit).collect();
    let dim = k.first().map_or(0, Vec::len);
    // The mean's length does not matter to a cosine: the sum points the same way.
    let anchor = unit(&(0..dim).map(|d| sum(units.iter().map(|u| u[d]))).collect());
    units.iter().map(|u| -dot(u, &anchor)).collect()
}
