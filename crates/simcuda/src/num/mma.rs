//! `mma.sync.m16n8k16` (and `k8`): the fragments of the PTX ISA, and three ways to add what hardware adds in a way
//! that is not documented.
//!
//! With `group = lane / 4` and `pair = lane % 4 * 2`, a register of A holds columns `pair` and `pair + 1` of row
//! `group`; the second register is 8 rows further down, the third and fourth 8 columns to the right of those. A
//! register of B holds rows `pair` and `pair + 1` of column `group`, the second 8 rows further down. C and D have an
//! f32 per register: columns `pair` and `pair + 1` of row `group`, then of row `group + 8`.

#![allow(unsafe_code, reason = "a loop compiled for CPU features")]

use super::half::{bf16_to_f32, f16_to_f32};
use super::round::{Round, to_f32, to_odd};
use crate::MmaModel;

/// Type of the elements of A and B. The accumulator is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MmaKind {
    F16,
    BF16,
}

/// Products in an element's sum.
const K: usize = 16;

/// Lanes of a register.
type Row = [u32; 32];

/// D = A * B + C for m16n8k16.
pub fn m16n8k16(
    kind: MmaKind,
    model: MmaModel,
    a: [&Row; 4],
    b: [&Row; 2],
    c: [&Row; 4],
) -> [Row; 4] {
    #[cfg(target_arch = "x86_64")]
    if super::has_avx2() {
        // SAFETY: the CPU has the features.
        return unsafe { multiply_avx2(kind, model, a, b, c) };
    }
    multiply(kind, model, a, b, c)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
fn multiply_avx2(
    kind: MmaKind,
    model: MmaModel,
    a: [&Row; 4],
    b: [&Row; 2],
    c: [&Row; 4],
) -> [Row; 4] {
    multiply(kind, model, a, b, c)
}

#[inline(always)]
fn multiply(kind: MmaKind, model: MmaModel, a: [&Row; 4], b: [&Row; 2], c: [&Row; 4]) -> [Row; 4] {
    // Four lanes hold eight consecutive elements, so in the order of lanes and halves a register is a block of eight
    // by eight: rows of A, columns of B.
    let (mut left, mut right) = ([[0.0; K]; 16], [[0.0; 8]; K]);
    for (i, register) in a.iter().enumerate() {
        for (row, eight) in elements(kind, register).chunks_exact(8).enumerate() {
            left[row + i % 2 * 8][i / 2 * 8..][..8].copy_from_slice(eight);
        }
    }
    for (i, register) in b.iter().enumerate() {
        for (column, eight) in elements(kind, register).chunks_exact(8).enumerate() {
            for (row, value) in eight.iter().enumerate() {
                right[row + i * 8][column] = *value;
            }
        }
    }
    let mut sum = [0.0; 128];
    for (block, c) in sum.chunks_exact_mut(64).zip(c.chunks_exact(2)) {
        for lane in 0..32 {
            (block[2 * lane], block[2 * lane + 1]) =
                (f32::from_bits(c[0][lane]), f32::from_bits(c[1][lane]));
        }
    }
    let rows = sum.as_chunks_mut().0;
    match model {
        MmaModel::Chain => chain(&left, &right, rows),
        MmaModel::Exact => each(&left, &right, rows, exact),
        MmaModel::Truncated => each(&left, &right, rows, |a, b, c| truncated(kind, a, b, c)),
    }
    let bits = sum.map(|value| if value.is_nan() { 0x7fff_ffff } else { value.to_bits() });
    std::array::from_fn(|i| std::array::from_fn(|lane| bits[i / 2 * 64 + lane * 2 + i % 2]))
}

/// The elements of a register: the low half of a lane, then its high half.
#[inline(always)]
fn elements(kind: MmaKind, register: &Row) -> [f32; 64] {
    let (mut halves, mut values) = ([0; 64], [0.0; 64]);
    for (lane, word) in register.iter().enumerate() {
        (halves[2 * lane], halves[2 * lane + 1]) = (*word as u16, (*word >> 16) as u16);
    }
    let pairs = values.iter_mut().zip(halves);
    match kind {
        MmaKind::F16 => pairs.for_each(|(value, half)| *value = f16_to_f32(half)),
        MmaKind::BF16 => pairs.for_each(|(value, half)| *value = bf16_to_f32(half)),
    }
    values
}

/// Fused multiply-adds in the order of k; four rows at a time, to hide their latency.
#[inline(always)]
fn chain(left: &[[f32; K]; 16], right: &[[f32; 8]; K], sum: &mut [[f32; 8]]) {
    for (rows, sums) in left.chunks_exact(4).zip(sum.chunks_exact_mut(4)) {
        let mut totals = [sums[0], sums[1], sums[2], sums[3]];
        for k in 0..K {
            for (row, total) in rows.iter().zip(&mut totals) {
                for n in 0..8 {
                    total[n] = row[k].mul_add(right[k][n], total[n]);
                }
            }
        }
        sums.copy_from_slice(&totals);
    }
}

/// Every element by a function of a row, a column and the accumulator.
#[inline(always)]
fn each(
    left: &[[f32; K]; 16],
    right: &[[f32; 8]; K],
    sum: &mut [[f32; 8]],
    element: impl Fn(&[f32; K], &[f32; K], f32) -> f32,
) {
    let columns: [[f32; K]; 8] = std::array::from_fn(|n| right.map(|row| row[n]));
    for (row, sums) in left.iter().zip(sum) {
        for (column, value) in columns.iter().zip(sums) {
            *value = element(row, column, *value);
        }
    }
}

/// The products and the accumulator, exact in f64.
fn terms<'a>(a: &'a [f32; K], b: &'a [f32; K], c: f32) -> impl Iterator<Item = f64> + Clone + 'a {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).chain([c.into()])
}

/// The exact sum, rounded once: as a sum of f64 that do not overlap, of which the largest, made odd if anything is
/// left, stands for all.
fn exact(a: &[f32; K], b: &[f32; K], c: f32) -> f32 {
    let terms = terms(a, b, c);
    if !terms.clone().all(f64::is_finite) {
        return terms.sum::<f64>() as f32;
    }
    // Mostly nothing is lost.
    let (mut total, mut lost) = (0.0, false);
    for term in terms.clone() {
        let (sum, error) = two_sum(total, term);
        (total, lost) = (sum, lost | (error != 0.0));
    }
    if !lost && total != 0.0 {
        return to_f32(total, Round::Nearest);
    }
    // At most one part per term.
    let (mut parts, mut count) = ([0.0; 17], 0);
    for mut term in terms {
        let mut kept = 0;
        for i in 0..count {
            let (sum, error) = two_sum(term, parts[i]);
            if error != 0.0 {
                parts[kept] = error;
                kept += 1;
            }
            term = sum;
        }
        parts[kept] = term;
        count = kept + 1;
    }
    let mut total = parts[count - 1];
    for part in parts[..count - 1].iter().rev() {
        let (sum, error) = two_sum(total, *part);
        total = to_odd(sum, error);
        if error != 0.0 {
            break;
        }
    }
    to_f32(total, Round::Nearest)
}

/// A sum and its rounding error.
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let from_b = sum - a;
    (sum, (a - (sum - from_b)) + (b - from_b))
}

/// The published model of H100: every term cut off 25 places below the largest exponent, the sum cut off to f32. The
/// exponent of a product is the sum of its factors' exponents.
fn truncated(kind: MmaKind, a: &[f32; K], b: &[f32; K], c: f32) -> f32 {
    /// Two places more than f32 has.
    const PLACES: i32 = 25;
    /// No term is aligned further up than this.
    const LOWEST: i32 = -133;
    let terms = terms(a, b, c);
    if !terms.clone().all(f64::is_finite) {
        return terms.sum::<f64>() as f32;
    }
    let subnormal = if kind == MmaKind::F16 { -14 } else { -126 };
    let exponent = |x: f32, lowest| ((x.to_bits() >> 23 & 0xff) as i32 - 127).max(lowest);
    let products = a.iter().zip(b).filter(|(a, b)| **a != 0.0 && **b != 0.0);
    let largest = products
        .map(|(a, b)| exponent(*a, subnormal) + exponent(*b, subnormal))
        .chain((c != 0.0).then(|| exponent(c, -126)))
        .fold(LOWEST, i32::max);
    let unit = f64::from_bits(((1023 + largest - PLACES) as u64) << 52);
    let sum: i64 = terms.map(|term| (term / unit) as i64).sum();
    let value = sum as f64 * unit;
    // The model overflows to infinity.
    if value.abs() < 2f64.powi(128) { to_f32(value, Round::Zero) } else { value as f32 }
}

#[cfg(test)]
mod tests;
