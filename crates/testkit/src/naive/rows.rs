//! Elementwise and per-row operations.

use std::ops::Range;

use kvbudget::backend::ops::NormScale;

use super::{Float, Matrix, num, ratio, sum};

/// Norms of one layer's heads, divided as asked.
pub fn scale_norms<F: Float>(
    op: NormScale,
    norms: &Matrix<F>,
    positions: &[Vec<u32>],
) -> Matrix<F> {
    let slots = || (0..norms.len()).flat_map(|h| (0..norms[h].len()).map(move |t| (h, t)));
    let divisor = |position: u32| match op {
        NormScale::None => F::one(),
        NormScale::Layer => sum(slots().map(|(h, t)| norms[h][t])),
        NormScale::Heads => {
            sum(slots().filter(|&(h, t)| positions[h][t] == position).map(|(h, t)| norms[h][t]))
        }
    };
    let scaled = |h: usize| {
        (0..norms[h].len()).map(|t| ratio(norms[h][t], divisor(positions[h][t]))).collect()
    };
    (0..norms.len()).map(scaled).collect()
}

/// Raises the first `len` entries to their mean.
pub fn floor_at_mean<F: Float>(len: usize, row: &mut [F]) {
    let mean = sum(row[..len].iter().copied()) / num(len);
    for x in &mut row[..len] {
        if *x < mean {
            *x = mean;
        }
    }
}

/// `(x + epsilon) · norm`.
pub fn weigh<F: Float>(epsilon: f32, norms: &[F], row: &mut [F]) {
    for t in 0..row.len() {
        row[t] = (row[t] + num(epsilon)) * norms[t];
    }
}

/// The larger of the two, NaN if either is.
pub fn raise<F: Float>(by: &[F], row: &mut [F]) {
    for (x, &by) in row.iter_mut().zip(by) {
        if !x.is_nan() && (by.is_nan() || by > *x) {
            *x = by;
        }
    }
}

/// `weight / place`, places counted from 1 by how many slots come first.
pub fn rank<F: Float>(protected: &[Range<u32>], weight: f32, row: &mut [F]) {
    let scores = row.to_vec();
    let first = |t: usize| protected.iter().any(|r| r.contains(&(t as u32)));
    let beats = |a: usize, b: usize| {
        if first(a) != first(b) {
            return first(a);
        }
        let (x, y) = (scores[a], scores[b]);
        match (x.is_nan(), y.is_nan()) {
            (false, false) => x > y || (x == y && a < b),
            (x, y) => !x || (y && a < b),
        }
    };
    for t in 0..row.len() {
        if !scores[t].is_nan() && scores[t] != F::infinity() {
            let place = 1 + (0..row.len()).filter(|&s| s != t && beats(s, t)).count();
            row[t] = num::<F>(weight) / num(place);
        }
    }
}

/// One row: the sum of all.
pub fn share_heads<F: Float>(rows: &[Vec<F>]) -> Vec<F> {
    (0..rows[0].len()).map(|t| sum(rows.iter().map(|row| row[t]))).collect()
}

/// Mean of each unit.
pub fn coarsen<F: Float>(units: &[Range<u32>], row: &[F]) -> Vec<F> {
    let mean = |u: &Range<u32>| sum(u.clone().map(|t| row[t as usize])) / num(u.len());
    units.iter().map(mean).collect()
}

/// The entries at `slots`.
pub fn pick<F: Float>(slots: &[u32], row: &[F]) -> Vec<F> {
    slots.iter().map(|&t| row[t as usize]).collect()
}
