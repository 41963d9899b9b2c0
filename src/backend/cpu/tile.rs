//! What the tensor operations share: tiles widened to f32, the matrix product, vector code, `exp`.
//!
//! Storage types end here: an operation widens a tile of rows into scratch that stays in L2 and computes
//! in f32. Widening costs one pass over elements that are then used tens to hundreds of times.
//!
//! The only `unsafe` of the CPU backend is in this file and in `amx.rs`: the `gemm` crate takes raw pointers, and a function
//! compiled for some instructions may only be called where the machine has them.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

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
    let (m, n) = (a.len() / k, b.len() / k);
    assert!(a.len() == m * k && b.len() == n * k && c.len() == m * n, "shapes of a tile product");
    product([m, n, k], a, [1, k], b, [k, 1], c);
}

/// `c[n, n] = a[k, n]ᵀ · a`, as [`matmul_nt`].
pub(super) fn gram(n: usize, a: &[f32], c: &mut [f32]) {
    let k = a.len() / n;
    assert!(a.len() == k * n && c.len() == n * n, "shapes of a Gram matrix");
    product([n, n, k], a, [n, 1], a, [1, n], c);
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
) {
    #[allow(unsafe_code, reason = "the matrix product's crate has no safe interface")]
    // SAFETY: the operands are m×k, k×n and m×n elements at the given strides, all inside their slices
    // by the assertions of the callers; `c` is borrowed exclusively, so it overlaps neither operand; f32 is one
    // of the types the crate supports; without `read_dst` nothing of `c` is read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
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

/// `a · b + c`, rounded once or twice.
pub(super) trait Arithmetic {
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// With the machine's fused multiply-add.
struct Fused;
impl Arithmetic for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// Without: a call for each would cost more than all the rest.
#[cfg(not(target_arch = "aarch64"))]
struct Plain;
#[cfg(not(target_arch = "aarch64"))]
impl Arithmetic for Plain {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// A loop to be compiled for several instruction sets. It and what it calls must be `#[inline(always)]`, or they stay
/// portable code.
pub(super) trait Kernel {
    type Output;
    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// What of the machine's instructions is used. Each level has those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the target is compiled for.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The tile unit for bf16.
    Amx,
}

impl Isa {
    /// The best that the machine has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if !(has!("avx2") && has!("fma")) {
                return Self::Portable;
            }
            if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
                return Self::Avx2;
            }
            if super::amx::available() { Self::Amx } else { Self::Avx512 }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Portable
    }

    /// Runs a kernel compiled for these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
            fn avx512<K: Kernel>(kernel: K) -> K::Output {
                kernel.run::<Fused>()
            }
            #[target_feature(enable = "avx2,fma")]
            fn avx2<K: Kernel>(kernel: K) -> K::Output {
                kernel.run::<Fused>()
            }
            // Not trusted: the value may have been made by hand.
            match self.min(Self::best()) {
                Self::Portable => kernel.run::<Plain>(),
                #[allow(unsafe_code, reason = "measured: see benches/README.md")]
                // SAFETY: the machine has the features; the function asks for nothing else.
                Self::Avx2 => unsafe { avx2(kernel) },
                #[allow(unsafe_code, reason = "measured: see benches/README.md")]
                // SAFETY: as above.
                Self::Avx512 | Self::Amx => unsafe { avx512(kernel) },
            }
        }
        #[cfg(target_arch = "aarch64")]
        return kernel.run::<Fused>();
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        kernel.run::<Plain>()
    }
}

/// `2ˣ` to about one ulp below 2^127.5; 0 below the least normal f32, NaN stays NaN.
#[inline(always)]
pub(super) fn exp2<A: Arithmetic>(x: f32) -> f32 {
    const LOW: f32 = -126.0;
    // 1.5 · 2²³: adding it rounds to an integer, which then sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // Written so that NaN passes both.
    let c = if x < LOW { LOW } else { x };
    let c = if c > 128.0 { 128.0 } else { c };
    let t = c + ROUND;
    let f = c - (t - ROUND);
    // Minimax on |f| <= 1/2 by Remez' algorithm, relative error 1.9e-9.
    let p = A::mul_add(1.534_581_2e-4, f, 1.339_993_1e-3);
    let p = A::mul_add(p, f, 9.618_489e-3);
    let p = A::mul_add(p, f, 5.550_328_6e-2);
    let p = A::mul_add(p, f, 2.402_264_6e-1);
    let p = A::mul_add(p, f, 6.931_472e-1);
    let p = A::mul_add(p, f, 1.0);
    let n = t.to_bits().wrapping_sub(ROUND.to_bits());
    let y = p * f32::from_bits(n.wrapping_add(127) << 23);
    if x < LOW { 0.0 } else { y }
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

/// Lanes of sums and products: enough independent chains for any vector width, and a fixed order.
pub(super) const LANES: usize = 16;

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

    /// All that were asked for at once so far.
    pub(super) fn all(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
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

/// Keys that [`compress`] takes at most.
pub(super) const BLOCK: usize = 1024;

/// What [`compress`] writes to: a block, and a vector more, whose lanes beyond the last kept value mean nothing.
pub(super) type Kept = [u32; BLOCK + LANES];

/// Writes those of `values` whose keys are in `low ..= low + width` to the start of `out`, in order; their number.
pub(super) fn compress(
    isa: Isa,
    keys: &[u32],
    (low, width): (u32, u32),
    values: &[u32],
    out: &mut Kept,
) -> usize {
    assert!(keys.len() <= BLOCK && keys.len() <= values.len(), "a block of keys");
    let mut done = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if isa.min(Isa::best()) >= Isa::Avx512 && std::arch::is_x86_feature_detected!("popcnt") {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: the machine has the features; blocks and `out` are as long as asked for by the assertion.
        let kept = unsafe { compress_avx512(keys, (low, width), values, out) };
        done = (keys.len() / LANES * LANES, kept);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    let (start, mut next) = done;
    for (&key, &value) in keys[start..].iter().zip(&values[start..]) {
        // No branch depends on a key; fewer than a block are kept before the last one, so the mask changes nothing.
        out[next & (BLOCK - 1)] = value;
        next += usize::from(key.wrapping_sub(low) <= width);
    }
    next
}

/// [`compress`] of whole vectors.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "measured: see benches/README.md")]
#[target_feature(enable = "avx512f,popcnt")]
// SAFETY: asks for no more than a block of keys, and as many values.
unsafe fn compress_avx512(
    keys: &[u32],
    (low, width): (u32, u32),
    values: &[u32],
    out: &mut Kept,
) -> usize {
    use std::arch::x86_64::*;
    let (low, width) = (_mm512_set1_epi32(low as i32), _mm512_set1_epi32(width as i32));
    let mut next = 0;
    let values = values.as_chunks::<LANES>().0;
    for (keys, values) in keys.as_chunks::<LANES>().0.iter().zip(values) {
        // SAFETY: both chunks are as long as a vector.
        let (k, v) = unsafe {
            (_mm512_loadu_si512(keys.as_ptr().cast()), _mm512_loadu_si512(values.as_ptr().cast()))
        };
        let kept = _mm512_cmple_epu32_mask(_mm512_sub_epi32(k, low), width);
        let v = _mm512_maskz_compress_epi32(kept, v);
        // SAFETY: no more were kept than keys were seen before these, all but a vector's lanes of a block.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(next).cast(), v) };
        next += kept.count_ones() as usize;
    }
    next
}
