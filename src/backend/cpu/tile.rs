//! What the tensor operations share: tiles widened to f32, the matrix product, vector code, `exp`.
//!
//! Storage types end here: an operation widens a tile of rows into scratch that stays in L2 and computes
//! in f32. Widening costs one pass over elements that are then used tens to hundreds of times.
//!
//! The only `unsafe` of the CPU backend is in this file and in `amx.rs`: the `gemm` crate takes raw pointers, and a function
//! compiled for some instructions may only be called where the machine has them.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use super::isa::LANES;
use super::{HostLayer, HostSlice};
use crate::dtype::Element;
use crate::view::Rows;

/// One KV head of one view, in the order in which segments are numbered.
pub(super) fn segments<'a, 'b>(
    layers: &'a [HostLayer<'b>],
) -> impl Iterator<Item = (&'a HostLayer<'b>, usize)> {
    layers.iter().flat_map(|layer| (0..layer.shape().kv_heads()).map(move |head| (layer, head)))
}

/// Widens `rows` of a head into consecutive rows of `dst`, which they fill.
pub(super) fn widen_rows(
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
pub(super) fn gram(n: usize, a: &[f32], c: &mut [f32]) {
    let k = a.len() / n;
    assert!(a.len() == k * n && c.len() == n * n, "shapes of a Gram matrix");
    product([n, n, k], a, [n, 1], a, [1, n], c, n);
}

/// `c[m, n] = a[m, k] · b[k, n]`, with the distances of columns and of rows in `a` and `b`. Checked by the two above: all
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

/// Runs `work` compiled for AVX2 where the machine has it. No fused multiply-add, so that the bits are those
/// of the portable code. `work` and what it calls must be `#[inline(always)]`, or they stay portable code.
#[inline(always)]
pub(super) fn simd<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            #[allow(unsafe_code, reason = "measured: see benches/attention.rs")]
            // SAFETY: the feature was detected on the line above; the function asks for nothing else.
            return unsafe { avx2(work) };
        }
    }
    work()
}

/// `eˣ` to about one ulp, without a call, so that loops over it vectorise (libm's is a call per element
/// and would cost more than the matrix product). Below e^-87.3, the last normal f32, it is 0; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.722_83;
    // 1.5 · 2²³: adding it rounds to an integer, which then sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Written so that NaN passes both.
    let c = if x < LOW { LOW } else { x };
    let c = if c > HIGH { HIGH } else { c };
    let t = c * std::f32::consts::LOG2_E + ROUND;
    let n = t - ROUND;
    let r = c - n * LN_2_HIGH - n * LN_2_LOW;
    // Cephes expf: a minimax polynomial on |r| <= ln 2 / 2.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // n reaches 128 at the top: 2ⁿ in two factors.
    let n = (t.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = p * power(n >> 1) * power(n.wrapping_sub(n >> 1));
    let y = if x < LOW { 0.0 } else { y };
    if x > HIGH { f32::INFINITY } else { y }
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
            self.0.resize(len.div_ceil(LANES), Line([0.0; LANES]));
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
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

/// Maximum, -∞ for no elements; NaN if one is.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] = max2(lanes[l], chunk[l]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = max2(*lane, x);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, max2)
}

/// `out[i] = Σ x[i]`: the lanes of as many vectors as one has lanes. Added by halves, whatever the vector's place.
#[inline(always)]
pub(super) fn folds<const L: usize>(x: &[[f32; L]; L], out: &mut [f32; L]) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(x), Some(out)) =
        (x.as_flattened().as_chunks().0.as_array(), out.as_mut_slice().as_mut_array())
        && std::arch::is_x86_feature_detected!("avx512f")
    {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: the feature was detected on the line above; the function asks for nothing else.
        return unsafe { folds_avx512(x, out) };
    }
    for (x, out) in x.iter().zip(out) {
        let (mut x, mut width) = (*x, L / 2);
        while width > 0 {
            for l in 0..width {
                x[l] += x[l + width];
            }
            width /= 2;
        }
        *out = x[0];
    }
}

/// Of two vectors, halves that belong together are shuffled into one vector each and added: 15 additions for 16 vectors. Loops do
/// not become this, but hundreds of moves of single lanes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn folds_avx512(x: &[[f32; 16]; 16], out: &mut [f32; 16]) {
    use std::arch::x86_64::*;
    // Where the tree's leaf `i` comes out, and as that is an involution, which vector it has to be.
    const LEAF: [usize; 16] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
    #[allow(unsafe_code, reason = "measured: see benches/README.md")]
    // SAFETY: reads the 16 elements of an array.
    let leaf = |i: usize| unsafe { _mm512_loadu_ps(x[LEAF[i]].as_ptr()) };
    let mut sums: [__m512; 8] = [_mm512_setzero_ps(); 8];
    for i in 0..8 {
        let (a, b) = (leaf(i), leaf(i + 8));
        sums[i] =
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    }
    for i in 0..4 {
        let (a, b) = (sums[i], sums[i + 4]);
        sums[i] =
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    }
    for i in 0..2 {
        let (a, b) = (sums[i], sums[i + 2]);
        sums[i] = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
    }
    let [a, b, ..] = sums;
    let sum = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
    #[allow(unsafe_code, reason = "measured: see benches/README.md")]
    // SAFETY: writes the 16 elements of an array.
    unsafe {
        _mm512_storeu_ps(out.as_mut_ptr(), sum);
    }
}

/// Asks for the cache line of a byte that is read soon.
#[inline(always)]
pub(super) fn prefetch(bytes: &[u8], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = bytes.as_ptr().wrapping_add(at);
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: a hint that reads nothing, at any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, at);
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
                HostSlice::F16(data) => widen_f16(&data[row][..to.len()], to),
                HostSlice::BF16(data) => bf16::widen(&data[row][..to.len()], to),
            }
        }
    }
}

/// Widens f16 elements.
#[inline(always)]
fn widen_f16(src: &[f16], dst: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: the feature was detected on the line above; the function asks for nothing else.
        return unsafe { widen_f16_avx512(src, dst) };
    }
    f16::widen(src, dst);
}

/// 16 at a time; `half` converts 8 and looks up what the machine has for each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn widen_f16_avx512(src: &[f16], dst: &mut [f32]) {
    use std::arch::x86_64::{__m256i, _mm512_cvtph_ps, _mm512_storeu_ps};
    let (src, src_rest) = src.as_chunks::<16>();
    let (dst, dst_rest) = dst.as_chunks_mut::<16>();
    for (src, dst) in src.iter().zip(dst) {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: reads and writes the 16 elements of an array each.
        unsafe {
            let x = src.as_ptr().cast::<__m256i>().read_unaligned();
            _mm512_storeu_ps(dst.as_mut_ptr(), _mm512_cvtph_ps(x));
        }
    }
    f16::widen(src_rest, dst_rest);
}
