//! What the tensor operations share: tiles widened to f32, the matrix product, sums in a fixed order.
//!
//! Storage types end here: an operation widens a tile of rows into scratch that stays in L2 and computes
//! in f32. Widening costs one pass over elements that are then used tens to hundreds of times.
//!
//! `unsafe` because the `gemm` crate takes raw pointers; the CPU backend's other `unsafe` is in `amx.rs`, `isa.rs` and
//! `intrinsics.rs`.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::isa::LANES;
use super::{HostLayer, HostSlice, intrinsics};
use crate::dtype::Element;
use crate::view::Rows;

/// One KV head of one view, in the order in which segments are numbered.
pub(super) fn segments<'a, 'b>(
    layers: &'a [HostLayer<'b>],
) -> impl Iterator<Item = (&'a HostLayer<'b>, usize)> {
    layers.iter().flat_map(|layer| (0..layer.shape().kv_heads()).map(move |head| (layer, head)))
}

/// Widens `rows` of a head into consecutive rows of `dst`, which they fill.
pub(crate) fn widen_rows(
    src: &Rows<'_, HostSlice<'_>>,
    head: usize,
    rows: Range<usize>,
    dst: &mut [f32],
) {
    widen_columns(src, head, rows, 0..src.dim(), dst);
}

/// `rows` of a head as they lie, where they are f32 and consecutive; otherwise widened into `dst`.
pub(super) fn f32_rows<'a>(
    src: &Rows<'_, HostSlice<'a>>,
    head: usize,
    rows: Range<usize>,
    dst: &'a mut [f32],
) -> &'a [f32] {
    if let HostSlice::F32(data) = src.storage() {
        let len = rows.len() * src.dim();
        let mut runs = src.runs(head, rows.start, rows.end);
        if let (Some(run), None) = (runs.next(), runs.next())
            && run.stride == src.dim()
        {
            return &data[run.start..run.start + len];
        }
    }
    widen_rows(src, head, rows, dst);
    dst
}

/// Widens the given columns of `rows` of a head into consecutive rows of `dst`, which they fill.
pub(super) fn widen_columns(
    src: &Rows<'_, HostSlice<'_>>,
    head: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    dst: &mut [f32],
) {
    match src.storage() {
        HostSlice::F32(data) => widen(data, src, head, rows, columns, dst),
        HostSlice::F16(data) => widen(data, src, head, rows, columns, dst),
        HostSlice::BF16(data) => widen(data, src, head, rows, columns, dst),
    }
}

fn widen<T: Element>(
    data: &[T],
    src: &Rows<'_, HostSlice<'_>>,
    head: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    mut dst: &mut [f32],
) {
    debug_assert_eq!(dst.len(), rows.len() * columns.len());
    for run in src.runs(head, rows.start, rows.end) {
        let (now, later) = dst.split_at_mut(run.rows * columns.len());
        dst = later;
        let first = run.start + columns.start;
        if run.stride == columns.len() {
            T::widen(&data[first..first + now.len()], now);
            continue;
        }
        for (i, row) in now.chunks_exact_mut(columns.len()).enumerate() {
            let at = first + i * run.stride;
            T::widen(&data[at..at + row.len()], row);
        }
    }
}

/// `c[m, n] = a[m, k] · b[n, k]ᵀ`, all rows contiguous, on the calling thread: the bits depend on the
/// shape alone.
pub(super) fn matmul_nt(k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    matmul_nt_to(k, a, b, c, b.len() / k);
}

/// As [`matmul_nt`], rows of `c` `pitch` apart.
pub(super) fn matmul_nt_to(k: usize, a: &[f32], b: &[f32], c: &mut [f32], pitch: usize) {
    let (m, n) = (a.len() / k, b.len() / k);
    assert!(a.len() == m * k && b.len() == n * k, "operands of a tile product");
    product([m, n, k], a, [1, k], b, [k, 1], c, pitch);
}

/// `c[n, n] = a[k, n]ᵀ · a`, as [`matmul_nt`].
pub(crate) fn gram(n: usize, a: &[f32], c: &mut [f32]) {
    matmul_tn([n, n], a, a, c);
}

/// `c[m, n] = a[k, m]ᵀ · b[k, n]`, as [`matmul_nt`].
pub(super) fn matmul_tn([m, n]: [usize; 2], a: &[f32], b: &[f32], c: &mut [f32]) {
    let k = a.len() / m;
    assert!(a.len() == k * m && b.len() == k * n && c.len() == m * n, "operands of a product");
    product([m, n, k], a, [m, 1], b, [1, n], c, n);
}

/// `c[m, n] = a[m, k] · b[k, n]`, with the distances of columns and of rows in `a` and `b`. Checked by those above: all
/// elements lie inside their slices.
fn product(
    [m, n, k]: [usize; 3],
    a: &[f32],
    [a_columns, a_rows]: [usize; 2],
    b: &[f32],
    [b_columns, b_rows]: [usize; 2],
    c: &mut [f32],
    pitch: usize,
) {
    assert!(pitch >= n && (m == 0 || c.len() >= (m - 1) * pitch + n), "room for a tile product");
    #[allow(unsafe_code, reason = "the matrix product's crate has no safe interface")]
    // SAFETY: the operands are m×k, k×n and m×n elements at the given strides, all inside their slices
    // by the assertions here and of the callers; `c` is borrowed exclusively, so it overlaps neither operand; f32 is one
    // of the types the crate supports; without `read_dst` nothing of `c` is read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            pitch as isize,
            false,
            a.as_ptr(),
            a_columns as isize,
            a_rows as isize,
            b.as_ptr(),
            b_columns as isize,
            b_rows as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// As many f32 as a cache line holds.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// f32 from the start of a cache line on: vectors of lanes that lie across two cost twice.
#[derive(Default)]
pub(super) struct Aligned(Vec<Line>);

impl Aligned {
    /// The first `len`, whatever they hold.
    pub(super) fn first(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() * LANES < len {
            // New memory: nothing is to be copied.
            self.0 = vec![Line([0.0; LANES]); len.div_ceil(LANES)];
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }
}

/// Sum in a fixed order.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] += chunk[l];
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    fold(lanes)
}

/// Dot product in a fixed order.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += a[l] * b[l];
        }
    }
    let rest = a_rest.iter().zip(b_rest);
    lanes.iter_mut().zip(rest).for_each(|(lane, (a, b))| *lane += a * b);
    fold(lanes)
}

/// Sum of lanes by halves.
#[inline(always)]
pub(super) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Maximum of two; NaN if one is.
#[inline(always)]
pub(super) fn max2(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Widens `rows` of a head into rows of `dst`, `pitch` elements apart; for kernels, whose instructions it uses.
#[inline(always)]
pub(super) fn widen_apart(
    src: &Rows<'_, HostSlice<'_>>,
    head: usize,
    rows: Range<usize>,
    pitch: usize,
    dst: &mut [f32],
) {
    let mut to = dst.chunks_exact_mut(pitch);
    for run in src.runs(head, rows.start, rows.end) {
        for (i, to) in to.by_ref().take(run.rows).enumerate() {
            let (row, to) = (run.start + i * run.stride.., &mut to[..src.dim()]);
            match src.storage() {
                HostSlice::F32(data) => to.copy_from_slice(&data[row][..to.len()]),
                HostSlice::F16(data) => intrinsics::widen_f16(&data[row][..to.len()], to),
                HostSlice::BF16(data) => bf16::widen(&data[row][..to.len()], to),
            }
        }
    }
}
