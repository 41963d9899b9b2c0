//! What loops do not become: shuffles that fold, compress or convert vectors, prefetch, and stores that go past the caches.
//!
//! Each has a portable form, which gives the same bits. `unsafe` because intrinsics of instructions may only be reached
//! where the machine has them; benches/README.md has what they gain.

use std::ops::Range;

use half::f16;

use super::isa::{Isa, LANES};
use crate::dtype::Element;

/// `out[i] = Σ x[i]`: the lanes of as many vectors as one has lanes. Added by halves, whatever the vector's place.
#[inline(always)]
pub(super) fn folds<const L: usize>(x: &[[f32; L]; L], out: &mut [f32; L]) {
    #[cfg(target_arch = "x86_64")]
    if let (Ok(x), Ok(out)) =
        (x.as_flattened().as_chunks().0.try_into(), <&mut [f32; 16]>::try_from(&mut out[..]))
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
    for (i, sum) in sums.iter_mut().enumerate() {
        let (a, b) = (leaf(i), leaf(i + 8));
        *sum =
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

/// Asks for the cache line of a byte that is read soon; one beyond the end may be another operand's, or nothing's. It is brought to
/// L2, which waits for more lines at a time than L1 does.
#[inline(always)]
pub(crate) fn prefetch(bytes: &[u8], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let address = bytes.as_ptr().wrapping_add(at);
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: a hint that reads nothing, at any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(address.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, at);
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Memory that is written and not read soon: whole vectors go past the caches, which saves reading the lines that they fill.
pub(crate) struct Streamed<'b>(&'b mut [u8]);

impl<'b> Streamed<'b> {
    pub(crate) fn new(bytes: &'b mut [u8]) -> Self {
        Self(bytes)
    }

    /// Fills the bytes from `at` on.
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        stream(from, &mut self.0[at..at + from.len()]);
    }

    /// Moves bytes to other places of the same memory.
    pub(crate) fn slide(&mut self, from: Range<usize>, to: usize) {
        match self.0.get_disjoint_mut([from.clone(), to..to + from.len()]) {
            Ok([from, to]) => stream(from, to),
            // They overlap.
            Err(_) => self.0.copy_within(from, to),
        }
    }

    /// As it is.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0
    }
}

/// Copies; what is written may be there for this thread only, before a fence. Half a line at a time would be no faster than stores.
#[inline(always)]
fn stream(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if to.as_ptr().addr().is_multiple_of(LINE)
        && to.len().is_multiple_of(LINE)
        && std::arch::is_x86_feature_detected!("avx512f")
    {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: the feature was detected on the line above, whole lines before; the fence is in `drop`, before which
        // nobody else has the memory.
        return unsafe { stream_avx512(from.as_chunks().0, to.as_chunks_mut().0) };
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "measured: see benches/README.md")]
#[target_feature(enable = "avx512f")]
// SAFETY: asks for lines at lines' places to write to.
unsafe fn stream_avx512(from: &[[u8; LINE]], to: &mut [[u8; LINE]]) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    for (from, to) in from.iter().zip(to) {
        // SAFETY: a line each, the second aligned as asked for.
        unsafe {
            _mm512_stream_si512(to.as_mut_ptr().cast(), _mm512_loadu_si512(from.as_ptr().cast()))
        };
    }
}

impl Drop for Streamed<'_> {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: every such machine has the instruction.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// Widens f16 elements.
#[inline(always)]
pub(super) fn widen_f16(src: &[f16], dst: &mut [f32]) {
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
    #[cfg(target_arch = "x86_64")]
    let fast = isa.min(Isa::best()) >= Isa::Avx512 && std::arch::is_x86_feature_detected!("popcnt");
    #[cfg(target_arch = "x86_64")]
    let (start, mut next) = if fast {
        #[allow(unsafe_code, reason = "measured: see benches/README.md")]
        // SAFETY: the machine has the features; blocks are as long as asked for by the assertion.
        let kept = unsafe { compress_avx512(keys, (low, width), values, out) };
        (keys.len() / LANES * LANES, kept)
    } else {
        (0, 0)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (start, mut next) = {
        let _ = isa;
        (0, 0)
    };
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
