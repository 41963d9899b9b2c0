//! Subspaces of keys: which directions stand for a set of them.
//!
//! On the host, in f64: a set has a few thousand rows of `D`. What is measured against a subspace, `‖k - BᵀB k‖`, does not
//! depend on the signs, the order or the choice of the orthonormal vectors that span it.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::parameters::named;

/// Part of a key's norm (or of the largest singular value) below which nothing new is left of it.
const NOTHING: f64 = 1e-6;

/// How directions are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Subspace {
    /// The first keys, as an unpivoted QR of them all has it.
    First,
    /// Keys, each the one with most left outside those before: QR with column pivoting.
    Pivoted,
    /// The principal directions: right singular vectors of the largest singular values.
    #[default]
    Svd,
}
named!(Subspace { First => "first", Pivoted => "pivoted", Svd => "svd" });

impl Subspace {
    /// Orthonormal rows `[r, dim]` for keys `[n, dim]`, `r <= min(rank, n, dim)`: fewer where the keys span less. A key that is
    /// not finite leaves no direction: the answer is then one row of NaN. Empty for `dim` 0.
    pub fn basis(self, keys: &[f32], dim: usize, rank: usize) -> Vec<f32> {
        if keys.iter().any(|x| !x.is_finite()) {
            return vec![f32::NAN; dim];
        }
        let rows = keys.chunks_exact(dim.max(1)).map(|key| key.iter().map(|&x| x.into()).collect());
        let rows: Vec<Vec<f64>> = rows.collect();
        let rank = rank.min(rows.len()).min(dim);
        let basis = match self {
            Self::First => gram_schmidt(rows[..rank].to_vec(), rank, |_| 0),
            Self::Pivoted => gram_schmidt(rows, rank, longest),
            Self::Svd => principal(&rows, dim, rank),
        };
        basis.concat().into_iter().map(|x| x as f32).collect()
    }
}

/// Orthonormalises up to `rank` of `rows`: each the one that `pick` names among what is left of those that have anything left.
fn gram_schmidt(
    rows: Vec<Vec<f64>>,
    rank: usize,
    pick: impl Fn(&[(Vec<f64>, f64)]) -> usize,
) -> Vec<Vec<f64>> {
    let with_least = |row: Vec<f64>| {
        let least = NOTHING * norm(&row);
        (row, least)
    };
    let mut left: Vec<(Vec<f64>, f64)> = rows.into_iter().map(with_least).collect();
    let mut basis = Vec::<Vec<f64>>::new();
    loop {
        left.retain(|(row, least)| norm(row) > *least);
        if left.is_empty() || basis.len() == rank {
            return basis;
        }
        let (mut next, _) = left.remove(pick(&left));
        // Once more: what is left of a key close to the others is mostly rounding.
        basis.iter().for_each(|b| subtract(&mut next, b));
        let length = norm(&next);
        next.iter_mut().for_each(|x| *x /= length);
        left.iter_mut().for_each(|(row, _)| subtract(row, &next));
        basis.push(next);
    }
}

/// The longest row, the first of those as long.
fn longest(rows: &[(Vec<f64>, f64)]) -> usize {
    let norms: Vec<f64> = rows.iter().map(|(row, _)| norm(row)).collect();
    (1..norms.len()).fold(0, |best, i| if norms[i] > norms[best] { i } else { best })
}

/// Eigenvectors of the keys' Gram matrix `[dim, dim]`, the largest eigenvalues first: in f64 its squared condition is harmless.
fn principal(rows: &[Vec<f64>], dim: usize, rank: usize) -> Vec<Vec<f64>> {
    let keys = DMatrix::from_iterator(dim, rows.len(), rows.iter().flatten().copied());
    let SymmetricEigen { eigenvectors, eigenvalues } =
        SymmetricEigen::new(&keys * keys.transpose());
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|&a, &b| eigenvalues[b].total_cmp(&eigenvalues[a]));
    let least = order.first().map_or(0.0, |&i| eigenvalues[i] * NOTHING * NOTHING);
    let some = order.into_iter().take(rank).filter(|&i| eigenvalues[i] > least);
    some.map(|i| eigenvectors.column(i).iter().copied().collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Removes the part along the unit vector `b`.
fn subtract(x: &mut [f64], b: &[f64]) {
    let along = dot(x, b);
    x.iter_mut().zip(b).for_each(|(x, b)| *x -= along * b);
}
