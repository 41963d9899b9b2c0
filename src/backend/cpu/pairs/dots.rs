//! Products by AVX-512's dot products of pairs (`vdpbf16ps`), twice what its f32 vectors do.
//!
//! `unsafe` because a function compiled for some instructions may only be called where the machine has them. Source: Intel SDM.

use std::arch::x86_64::*;

use half::bf16;

use super::{BLOCK, Line, TILE};

/// Rows whose sums stay in registers, two vectors each.
const ROWS: usize = 8;

pub(super) fn available() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// A pair of bf16.
type Pair = u32;

/// A block of the product: 32 rows of 32, `pitch` apart, from a block of rows and one of columns of as many steps.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn multiply(rows: &[bf16], columns: &[Line], c: &mut [f32], pitch: usize) {
    let (rows, _) = bytemuck::cast_slice::<bf16, Pair>(rows).as_chunks::<TILE>();
    let (columns, _) = columns.as_chunks::<BLOCK>();
    let steps = columns.len();
    for (rows, c) in rows.chunks_exact(ROWS * steps).zip(c.chunks_mut(ROWS * pitch)) {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (step, columns) in columns.iter().enumerate() {
            let rows: [&[Pair; TILE]; ROWS] = std::array::from_fn(|r| &rows[r * steps + step]);
            for pair in 0..TILE {
                let [left, right] = [columns[pair], columns[TILE + pair]].map(|line| {
                    // SAFETY: a vector of bf16 is as good as any 64 bytes.
                    unsafe { std::mem::transmute::<Line, __m512bh>(line) }
                });
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let both = _mm512_set1_epi32(row[pair].cast_signed());
                    // SAFETY: as above.
                    let both = unsafe { std::mem::transmute::<__m512i, __m512bh>(both) };
                    sums[0] = _mm512_dpbf16_ps(sums[0], both, left);
                    sums[1] = _mm512_dpbf16_ps(sums[1], both, right);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in c[r * pitch..][..BLOCK].chunks_exact_mut(TILE).zip(sums) {
                // SAFETY: stores a vector's lanes to as many elements.
                unsafe { _mm512_storeu_ps(half.as_mut_ptr(), *sum) };
            }
        }
    }
}
