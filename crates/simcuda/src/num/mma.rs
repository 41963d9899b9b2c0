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
    dispatch::<16>(kind, model, &a, &b, c)
}

fn dispatch<const K: usize>(
    kind: MmaKind,
    model: MmaModel,
    a: &[&Row],
    b: &[&Row],
    c: [&Row; 4],
) -> [Row; 4] {
    #[cfg(target_arch = "x86_64")]
    if super::has_avx2() {
        // SAFETY: the CPU has the features.
        return unsafe { multiply_avx2::<K>(kind, model, a, b, c) };
    }
    multiply::<K>(kind, model, a, b, c)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
fn multiply_avx2<const K: usize>(
    kind: MmaKind,
    model: MmaModel,
    a: &[&Row],
    b: &[&Row],
    c: [&Row; 4],
) -> [Row; 4] {
    multiply::<K>(kind, model, a, b, c)
}

#[inline(always)]
fn multiply<const K: usize>(
    kind: MmaKind,
    model: MmaModel,
    a: &[&Row],
    b: &[&Row],
    c: [&Row; 4],
) -> [Row; 4] {
    let (mut left, mut right, mut sum) = ([[0.0; K]; 16], [[0.0; 8]; K], [[0.0; 8]; 16]);
    for (i, register) in a.iter().enumerate() {
        let [low, high] = elements(kind, register);
        for lane in 0..32 {
            let (row, column) = (lane / 4 + i % 2 * 8, lane % 4 * 2 + i / 2 * 8);
            (left[row][column], left[row][column + 1]) = (low[lane], high[lane]);
        }
    }
    for (i, register) in b.iter().enumerate() {
        let [low, high] = elements(kind, register);
        for lane in 0..32 {
            let (row, column) = (lane % 4 * 2 + i * 8, lane / 4);
            (right[row][column], right[row + 1][column]) = (low[lane], high[lane]);
        }
    }
    for (i, register) in c.iter().enumerate() {
        for lane in 0..32 {
            sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = f32::from_bits(register[lane]);
        }
    }
    match model {
        MmaModel::Chain => chain(&left, &right, &mut sum),
        MmaModel::Exact => each(&left, &right, &mut sum, exact),
        MmaModel::Truncated => each(&left, &right, &mut sum, |a, b, c| truncated(kind, a, b, c)),
    }
    std::array::from_fn(|i| {
        std::array::from_fn(|lane| {
            let value = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
            if value.is_nan() { 0x7fff_ffff } else { value.to_bits() }
        })
    })
}

/// The low and the high halves of a register.
#[inline(always)]
fn elements(kind: MmaKind, register: &Row) -> [[f32; 32]; 2] {
    let half = |h: u32| match kind {
        MmaKind::F16 => f16_to_f32(h as u16),
        MmaKind::BF16 => bf16_to_f32(h as u16),
    };
    [register.map(half), register.map(|word| half(word >> 16))]
}

/// Fused multiply-adds in the order of k; four rows at a time, to hide their latency.
#[inline(always)]
fn chain<const K: usize>(left: &[[f32; K]; 16], right: &[[f32; 8]; K], sum: &mut [[f32; 8]; 16]) {
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
fn each<const K: usize>(
    left: &[[f32; K]; 16],
    right: &[[f32; 8]; K],
    sum: &mut [[f32; 8]; 16],
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
fn terms<'a, const K: usize>(
    a: &'a [f32; K],
    b: &'a [f32; K],
    c: f32,
) -> impl Iterator<Item = f64> + Clone + 'a {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).chain([c.into()])
}

/// The exact sum, rounded once: as a sum of f64 that do not overlap, of which the largest, made odd if anything is
/// left, stands for all.
fn exact<const K: usize>(a: &[f32; K], b: &[f32; K], c: f32) -> f32 {
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
fn truncated<const K: usize>(kind: MmaKind, a: &[f32; K], b: &[f32; K], c: f32) -> f32 {
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
mod tests {
    use super::*;
    use crate::num::half::{bf16_from_f32, f16_from_f32};
    use crate::num::matrix::ldmatrix;
    use crate::num::oracle::{Exact, F32, Random};
    use MmaKind::{BF16, F16};

    const MODELS: [MmaModel; 3] = [MmaModel::Chain, MmaModel::Exact, MmaModel::Truncated];

    type Matrix<const R: usize, const C: usize> = [[f32; C]; R];

    fn half(kind: MmaKind, x: f32) -> u16 {
        match kind {
            F16 => f16_from_f32(x, Round::Nearest),
            BF16 => bf16_from_f32(x, Round::Nearest),
        }
    }

    fn fill<const R: usize, const C: usize>(mut f: impl FnMut() -> f32) -> Matrix<R, C> {
        std::array::from_fn(|_| std::array::from_fn(|_| f()))
    }

    /// The element formulas of the PTX ISA, one element `i` of a fragment at a time.
    fn multiply(
        kind: MmaKind,
        model: MmaModel,
        a: &Matrix<16, 16>,
        b: &Matrix<16, 8>,
        c: &Matrix<16, 8>,
    ) -> Matrix<16, 8> {
        let (mut ra, mut rb, mut rc) = ([[0; 32]; 4], [[0; 32]; 2], [[0; 32]; 4]);
        for lane in 0..32 {
            let (group, in_group) = (lane >> 2, lane % 4);
            for i in 0..8 {
                let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
                let column = in_group * 2 + (i & 1) + if i < 4 { 0 } else { 8 };
                ra[i / 2][lane] |= u32::from(half(kind, a[row][column])) << (i % 2 * 16);
            }
            for i in 0..4 {
                let row = in_group * 2 + (i & 1) + if i < 2 { 0 } else { 8 };
                rb[i / 2][lane] |= u32::from(half(kind, b[row][group])) << (i % 2 * 16);
            }
            for i in 0..4 {
                let row = if i < 2 { group } else { group + 8 };
                rc[i][lane] = c[row][in_group * 2 + (i & 1)].to_bits();
            }
        }
        let d = m16n8k16(kind, model, ra.each_ref(), rb.each_ref(), rc.each_ref());
        let mut result = [[0.0; 8]; 16];
        for lane in 0..32 {
            for i in 0..4 {
                let row = if i < 2 { lane >> 2 } else { (lane >> 2) + 8 };
                result[row][lane % 4 * 2 + (i & 1)] = f32::from_bits(d[i][lane]);
            }
        }
        result
    }

    /// Small integers: nothing rounds, so all models give the product.
    #[test]
    fn products_of_integers() {
        let mut random = Random(1);
        for kind in [F16, BF16] {
            let mut integer = || (random.next() % 31) as f32 - 15.0;
            let (a, b, c) = (fill(&mut integer), fill(&mut integer), fill(&mut integer));
            for model in MODELS {
                let d = multiply(kind, model, &a, &b, &c);
                for (m, row) in d.iter().enumerate() {
                    for (n, got) in row.iter().enumerate() {
                        let want = c[m][n] + (0..16).map(|k| a[m][k] * b[k][n]).sum::<f32>();
                        assert_eq!(*got, want, "{kind:?} {model:?} {m} {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn chain_and_exact_follow_their_definitions() {
        let mut random = Random(2);
        for (kind, span) in [(F16, 16), (BF16, 16), (BF16, 200)] {
            let mut value = || {
                let exponent = (random.next() % span) as i32 - span as i32 / 2;
                let x = ((random.next() % 511) as f32 - 255.0) * 2f32.powi(exponent.max(-126) / 2);
                match kind {
                    F16 => f16_to_f32(half(kind, x)),
                    BF16 => bf16_to_f32(half(kind, x)),
                }
            };
            for _ in 0..20 {
                let (a, b, c) = (fill(&mut value), fill(&mut value), fill(&mut value));
                let chain = multiply(kind, MmaModel::Chain, &a, &b, &c);
                let exact = multiply(kind, MmaModel::Exact, &a, &b, &c);
                for m in 0..16 {
                    for n in 0..8 {
                        let want = (0..16).fold(c[m][n], |sum, k| a[m][k].mul_add(b[k][n], sum));
                        assert_eq!(chain[m][n], want);
                        let want = (0..16).fold(Exact::new(c[m][n].into()), |sum, k| {
                            sum.add(&Exact::product(a[m][k].into(), b[k][n].into()))
                        });
                        assert_eq!(exact[m][n], want.round(F32, Round::Nearest) as f32);
                    }
                }
            }
        }
    }

    /// What is more than 25 places below the largest exponent is lost, term by term, and the sum is cut off.
    #[test]
    fn truncation() {
        let element = |products: &[(f32, f32)], c: f32| {
            let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
            for (k, (x, y)) in products.iter().enumerate() {
                (a[0][k], b[k][0]) = (*x, *y);
            }
            multiply(BF16, MmaModel::Truncated, &a, &b, &[[c; 8]; 16])[0][0]
        };
        let p = |exponent| 2f32.powi(exponent);
        assert_eq!(element(&[(p(-25), 1.0); 16], 1.0), 1.0 + p(-21));
        assert_eq!(element(&[(p(-26), 1.0); 16], 1.0), 1.0);
        assert_eq!(element(&[(-p(-26), 1.0); 16], 1.0), 1.0);
        assert_eq!(element(&[(-p(-25), 1.0)], 1.0), 1.0f32.next_down());
        assert_eq!(
            element(&[(1.5, 1.5), (p(-25), 1.0)], 0.0),
            2.25,
            "exponent 0, although above 2; then cut"
        );
        assert_eq!(element(&[(1.5 * p(-24), 1.0)], 1.0), 1.0, "cut towards zero, not rounded");
        assert_eq!(element(&[(1.5 * p(-24), -1.0)], -1.0), -1.0);
        assert_eq!(element(&[(p(100), p(100))], 0.0), f32::INFINITY);
        assert_eq!(element(&[], 0.0), 0.0);
    }

    #[test]
    fn infinities_and_nan() {
        for model in MODELS {
            let (mut a, b, mut c) = (fill(|| 1.0), fill(|| 1.0), fill(|| 0.0));
            (a[0][3], a[1][2], c[1][0], c[2][0]) =
                (f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY, f32::NAN);
            let d = multiply(F16, model, &a, &b, &c);
            assert_eq!([d[0][0], d[1][1], d[3][0]], [f32::INFINITY, f32::NEG_INFINITY, 16.0]);
            assert_eq!([d[1][0], d[2][0]].map(f32::to_bits), [0x7fff_ffff; 2]);
        }
    }

    /// A through ldmatrix.x4, B through ldmatrix.x2 from `[n][k]` rows or with `.trans` from `[k][n]` rows; by the
    /// identity each comes out as it went in.
    #[test]
    fn ldmatrix_feeds_mma() {
        let block = |m: &dyn Fn(usize, usize) -> f32, row, column| -> [[u16; 8]; 8] {
            std::array::from_fn(|r| std::array::from_fn(|c| half(BF16, m(row + r, column + c))))
        };
        let value = |row: usize, column: usize| (row * 16 + column) as f32;
        let identity = |row, column| if row == column { 1.0 } else { 0.0 };
        let zero = [0; 32];
        let a = |m: &dyn Fn(usize, usize) -> f32| {
            [(0, 0), (8, 0), (0, 8), (8, 8)].map(|(r, c)| ldmatrix(&block(m, r, c), false))
        };
        let at = |d: &[Row; 4], row: usize, column: usize| {
            f32::from_bits(d[row / 8 * 2 + column % 2][row % 8 * 4 + column / 2])
        };
        for shift in [0, 8] {
            // B[k][n] = 1 where k = n + shift: picks columns of A.
            let b = [0, 8].map(|k| ldmatrix(&block(&|n, k| identity(n + shift, k), 0, k), false));
            let d = m16n8k16(BF16, MmaModel::Chain, a(&value).each_ref(), b.each_ref(), [&zero; 4]);
            for (row, column) in (0..16).flat_map(|r| (0..8).map(move |c| (r, c))) {
                assert_eq!(at(&d, row, column), value(row, column + shift));
            }
        }
        let b = [0, 8].map(|k| ldmatrix(&block(&value, k, 0), true));
        let d = m16n8k16(BF16, MmaModel::Chain, a(&identity).each_ref(), b.each_ref(), [&zero; 4]);
        for (row, column) in (0..16).flat_map(|r| (0..8).map(move |c| (r, c))) {
            assert_eq!(at(&d, row, column), value(row, column));
        }
    }

    #[test]
    fn levels_agree() {
        let mut random = Random(4);
        for _ in 0..50 {
            let mut register = || std::array::from_fn(|_| random.next() as u32);
            let registers: [Row; 10] = std::array::from_fn(|_| register());
            let r = registers.each_ref();
            for (kind, model) in [F16, BF16].into_iter().flat_map(|k| MODELS.map(|m| (k, m))) {
                let best = dispatch::<16>(kind, model, &r[..4], &r[4..6], [r[6], r[7], r[8], r[9]]);
                let baseline =
                    super::multiply::<16>(kind, model, &r[..4], &r[4..6], [r[6], r[7], r[8], r[9]]);
                assert_eq!(best, baseline);
            }
        }
    }
}
