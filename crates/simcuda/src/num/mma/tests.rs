//! Fragments after the formulas of the PTX ISA, sums after long integers.

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
        let mut integer = || (random.draw() % 31) as f32 - 15.0;
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
            let exponent = (random.draw() % span) as i32 - span as i32 / 2;
            let x = ((random.draw() % 511) as f32 - 255.0) * 2f32.powi(exponent.max(-126) / 2);
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
        let mut register = || std::array::from_fn(|_| random.draw() as u32);
        let registers: [Row; 10] = std::array::from_fn(|_| register());
        let r = registers.each_ref();
        for (kind, model) in [F16, BF16].into_iter().flat_map(|k| MODELS.map(|m| (k, m))) {
            let (a, b) = ([r[0], r[1], r[2], r[3]], [r[4], r[5]]);
            let c = [r[6], r[7], r[8], r[9]];
            let best = m16n8k16(kind, model, a, b, c);
            let baseline = super::multiply(kind, model, a, b, c);
            assert_eq!(best, baseline);
        }
    }
}
