//! Matrix products by the tile unit of recent Xeons (AMX): `c[m, n] = a[m, k] · b[n, k]ᵀ`, bf16 in, f32 out.
//!
//! The unit multiplies tiles of 16 rows by 64 bytes and does an order of magnitude more than vector units can. It knows
//! bf16 only, so that other types go in as sums of bf16, their *planes*: an f16 is exactly two of them, an f32 three, 8
//! bits of the significand each. Products of planes below the last bit of an f32 are left out. Infinities do not
//! split: rows that have some go elsewhere.
//!
//! `unsafe` because the instructions have no stable intrinsics. Sources: Intel SDM, "Intel AMX"; the kernel's
//! Documentation/arch/x86/xstate.rst for the permission that a process has to ask for.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::isa::{Arithmetic, Isa, Kernel};
use super::{HostSlice, tile};
use crate::dtype::Dtype;
use crate::view::Rows;

/// Rows of a tile, and of a block of two.
const TILE: usize = 16;
pub(super) const BLOCK: usize = 2 * TILE;
/// bf16 in a row of a tile.
const STEP: usize = 32;

/// Whether the machine has the unit and the process may use it.
pub(super) fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(unit::permitted)
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// bf16 that an element is the sum of.
fn planes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::BF16 => 1,
        Dtype::F16 => 2,
        Dtype::F32 => 3,
    }
}

/// A row of a tile.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([bf16; STEP]);

const ZERO: Line = Line([bf16::ZERO; STEP]);

/// The left operand: rows of whole steps in whole blocks, one after the other, plane after plane; where they lie or packed.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    elements: &'a [bf16],
    rows: usize,
    steps: usize,
    planes: usize,
    /// Whether what follows may be the next operand.
    in_place: bool,
}

impl<'a> Left<'a> {
    /// Rows of a head in place: bf16 in whole blocks and steps, from a cache line on.
    pub(super) fn in_place(
        src: &Rows<'_, HostSlice<'a>>,
        head: usize,
        rows: Range<usize>,
    ) -> Option<Self> {
        let HostSlice::BF16(data) = src.storage() else { return None };
        let (len, dim) = (rows.len(), src.dim());
        let mut runs = src.runs(head, rows.start, rows.end);
        let (Some(run), None) = (runs.next(), runs.next()) else { return None };
        // Rows that lie across cache lines, or far apart, are read slowly for every block of columns: packing costs less.
        if !len.is_multiple_of(BLOCK) || !dim.is_multiple_of(STEP) || run.stride != dim {
            return None;
        }
        let elements = &data[run.start..][..len * dim];
        let aligned = elements.as_ptr().addr().is_multiple_of(align_of::<Line>());
        aligned.then_some(Self {
            elements,
            rows: len,
            steps: dim / STEP,
            planes: 1,
            in_place: true,
        })
    }
}

/// Packed rows: `[plane][row][step]`, padded with zeros to whole blocks, their elements to whole steps.
#[derive(Default)]
pub(super) struct Packed {
    lines: Vec<Line>,
    rows: usize,
    steps: usize,
    planes: usize,
    widened: Vec<f32>,
}

impl Packed {
    pub(super) fn left(&self) -> Left<'_> {
        let Self { rows, steps, planes, .. } = *self;
        let elements = bytemuck::cast_slice(&self.lines);
        Left { elements, rows, steps, planes, in_place: false }
    }

    /// Loads rows of a head. False if one does not split.
    pub(super) fn load(
        &mut self,
        src: &Rows<'_, HostSlice<'_>>,
        head: usize,
        rows: Range<usize>,
    ) -> bool {
        let dim = src.dim();
        self.planes = planes(src.dtype());
        self.rows = rows.len().next_multiple_of(BLOCK);
        self.steps = dim.div_ceil(STEP);
        self.lines.clear();
        self.lines.resize(self.planes * self.rows * self.steps, ZERO);
        if let HostSlice::BF16(data) = src.storage() {
            let mut lines = self.lines.chunks_exact_mut(self.steps);
            for run in src.runs(head, rows.start, rows.end) {
                for (i, lines) in lines.by_ref().take(run.rows).enumerate() {
                    let row = &data[run.start + i * run.stride..][..dim];
                    for (line, part) in lines.iter_mut().zip(row.chunks(STEP)) {
                        line.0[..part.len()].copy_from_slice(part);
                    }
                }
            }
            return true;
        }
        self.widened.resize(rows.len() * dim, 0.0);
        tile::widen_rows(src, head, rows, &mut self.widened);
        let shape = [self.planes, self.rows, self.steps];
        Isa::Amx.run(Split { dim, from: &self.widened, lines: &mut self.lines, shape })
    }
}

/// Splits rows into planes.
struct Split<'a> {
    dim: usize,
    from: &'a [f32],
    lines: &'a mut [Line],
    shape: [usize; 3],
}

impl Kernel for Split<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> bool {
        let Self { dim, from, lines, shape: [planes, rows, steps] } = self;
        let mut finite = true;
        for (r, row) in from.chunks_exact(dim).enumerate() {
            for (s, part) in row.chunks(STEP).enumerate() {
                let mut rest = [0f32; STEP];
                rest[..part.len()].copy_from_slice(part);
                for x in rest {
                    finite &= x.is_finite();
                }
                for p in 0..planes {
                    split(&mut rest, &mut lines[(p * rows + r) * steps + s].0);
                }
            }
        }
        finite
    }
}

/// Moves the first eight bits of each element's significand to `plane`.
#[inline(always)]
fn split(rest: &mut [f32; STEP], plane: &mut [bf16; STEP]) {
    for (x, part) in rest.iter_mut().zip(plane) {
        let bits = x.to_bits() & 0xffff_0000;
        *part = bf16::from_bits((bits >> 16) as u16);
        *x -= f32::from_bits(bits);
    }
}

/// The right operand, two elements of a column side by side: `[block of columns][plane][step][tile][pair][column][2]`.
#[derive(Default)]
pub(super) struct Right {
    lines: Vec<Line>,
    steps: usize,
    planes: usize,
}

impl Right {
    /// Packs rows of `dim` elements, all of them values of `dtype`: the columns of the product, padded with zeros to
    /// whole blocks. False if one does not split.
    pub(super) fn load(&mut self, dtype: Dtype, dim: usize, rows: &[f32]) -> bool {
        self.clear(planes(dtype), dim, rows.len() / dim);
        let mut finite = true;
        for (n, row) in rows.chunks_exact(dim).enumerate() {
            for (s, part) in row.chunks(STEP).enumerate() {
                let mut rest = [0f32; STEP];
                rest[..part.len()].copy_from_slice(part);
                finite &= rest.iter().fold(true, |all, x| all & x.is_finite());
                for p in 0..self.planes {
                    let mut elements = [bf16::ZERO; STEP];
                    split(&mut rest, &mut elements);
                    self.place(p, s, n, &elements);
                }
            }
        }
        finite || self.planes == 1
    }

    /// Packs some columns of some rows of a matrix, as [`load`](Self::load).
    pub(super) fn load_columns(
        &mut self,
        src: &Rows<'_, HostSlice<'_>>,
        rows: Range<usize>,
        columns: Range<usize>,
        widened: &mut Vec<f32>,
    ) -> bool {
        let dim = columns.len();
        if let HostSlice::BF16(data) = src.storage() {
            self.clear(1, dim, rows.len());
            let runs = src.runs(0, rows.start, rows.end);
            let starts =
                runs.flat_map(|run| (0..run.rows).map(move |i| run.start + i * run.stride));
            for (n, start) in starts.enumerate() {
                let row = &data[start + columns.start..][..dim];
                for (s, part) in row.chunks(STEP).enumerate() {
                    self.place(0, s, n, part);
                }
            }
            return true;
        }
        widened.resize(rows.len() * dim, 0.0);
        tile::widen_columns(src, 0, rows, columns, widened);
        self.load(src.dtype(), dim, widened)
    }

    fn clear(&mut self, planes: usize, dim: usize, columns: usize) {
        (self.planes, self.steps) = (planes, dim.div_ceil(STEP));
        let blocks = columns.div_ceil(BLOCK);
        self.lines.clear();
        self.lines.resize(blocks * planes * self.steps * BLOCK, ZERO);
    }

    /// Puts a step's elements of a plane of column `n` where they belong.
    fn place(&mut self, plane: usize, step: usize, n: usize, elements: &[bf16]) {
        let block = n / BLOCK * self.planes + plane;
        let tile = (block * self.steps + step) * BLOCK + n % BLOCK / TILE * TILE;
        let (pairs, last) = elements.as_chunks::<2>();
        let lines = &mut self.lines[tile..][..TILE];
        for (line, pair) in lines.iter_mut().zip(pairs) {
            line.0[n % TILE * 2..][..2].copy_from_slice(pair);
        }
        if let &[last] = last {
            lines[pairs.len()].0[n % TILE * 2] = last;
        }
    }
}

/// The unit, ready on this thread until this is dropped.
pub(super) struct Unit(PhantomData<*const ()>);

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
thread_local! {
    /// How many [`Unit`]s there are.
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

impl Unit {
    /// Only where it is [`available`].
    pub(super) fn open() -> Self {
        assert!(available(), "no tile unit");
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if OPEN.replace(OPEN.get() + 1) == 0 {
            unit::configure();
        }
        Self(PhantomData)
    }

    /// `c[row][column]` of all rows of `a`, padding included, and a block of columns of `b`; rows of `c` are `pitch` apart.
    pub(super) fn multiply(
        &self,
        a: &Left<'_>,
        b: &Right,
        block: usize,
        c: &mut [f32],
        pitch: usize,
    ) {
        assert!(a.steps == b.steps, "operands of one product");
        let plane = a.rows * a.steps * STEP;
        assert!(a.elements.len() == a.planes * plane, "rows of the left operand");
        let blocks = b.lines.len() / (b.planes * b.steps * BLOCK);
        let b = &b.lines[block * b.planes * b.steps * BLOCK..][..b.planes * b.steps * BLOCK];
        let pairs = plane_pairs(a.planes, b.len() / (a.steps * BLOCK));
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        for m in 0..a.rows / BLOCK {
            let first = m * BLOCK * a.steps * STEP;
            // Loads of tiles are not foreseen by the machine: with each step, a share of the rows of the next operand.
            let ahead = a.elements.as_ptr_range().end.wrapping_add(first);
            let mut lines = (block..BLOCK * a.steps).step_by(blocks);
            unit::zero();
            for (p, q) in pairs.clone() {
                let left = &a.elements[p * plane + first..][..BLOCK * a.steps * STEP];
                let right = &b[q * a.steps * BLOCK..][..a.steps * BLOCK];
                for step in 0..a.steps {
                    if a.in_place {
                        for line in lines.by_ref().take(BLOCK.div_ceil(blocks)) {
                            unit::prefetch(ahead.wrapping_add(line * STEP));
                        }
                    }
                    unit::add(a.steps, step, left, right);
                }
            }
            unit::store(&mut c[m * BLOCK * pitch..], pitch);
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if OPEN.replace(OPEN.get() - 1) == 1 {
            unit::release();
        }
    }
}

/// Pairs of planes whose product reaches the last bit of an f32.
fn plane_pairs(left: usize, right: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    const LAST: usize = 2;
    (0..left).flat_map(move |p| (0..right.min(LAST + 1 - p)).map(move |q| (p, q)))
}

/// The instructions. Tiles 0 to 3 are a block of the product, 4 and 5 of the left operand, 6 and 7 of the right one.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code, reason = "instructions without intrinsics")]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _MM_HINT_T0, _mm_prefetch, _xgetbv};

    use half::bf16;

    use super::{BLOCK, Line, STEP, TILE};

    pub(super) fn permitted() -> bool {
        const TILE_BF16: u32 = 1 << 22 | 1 << 24;
        const OSXSAVE: u32 = 1 << 27;
        const TILE_STATE: u64 = 1 << 17 | 1 << 18;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XTILEDATA: libc::c_long = 18;
        #[target_feature(enable = "xsave")]
        fn enabled() -> u64 {
            // SAFETY: the caller has seen OSXSAVE.
            unsafe { _xgetbv(0) }
        }
        if __cpuid_count(0, 0).eax < 7
            || __cpuid_count(7, 0).edx & TILE_BF16 != TILE_BF16
            || __cpuid_count(1, 0).ecx & OSXSAVE == 0
        {
            return false;
        }
        // SAFETY: OSXSAVE says that the instruction is there.
        if unsafe { enabled() } & TILE_STATE != TILE_STATE {
            return false;
        }
        // SAFETY: asks the kernel for a larger signal frame and save area; takes no pointer.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
    }

    /// Eight tiles of 16 rows and 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    static TILES: Configuration = Configuration {
        palette: 1,
        start: 0,
        reserved: [0; 14],
        bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    pub(super) fn configure() {
        // SAFETY: `Unit::open` has asserted that the unit is there and permitted; reads 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const TILES, options(nostack, readonly)) };
    }

    pub(super) fn release() {
        // SAFETY: as above; touches no memory. No `Unit` is left on this thread, so nothing uses tiles after it.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    pub(super) fn zero() {
        // SAFETY: the caller has a `Unit`, so tiles are configured; touches no memory.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem)
            );
        }
    }

    /// Adds a step of the product of a block of rows and a block of columns.
    pub(super) fn add(steps: usize, step: usize, left: &[bf16], right: &[Line]) {
        assert!(left.len() == BLOCK * steps * STEP && right.len() == steps * BLOCK && step < steps);
        let stride = steps * size_of::<Line>();
        // SAFETY: as in `zero`. Rows of tiles are a `Line` each: of `left` 32, `stride` apart, from the step's on,
        // and of `right` 32 one after the other; all inside the slices by the assertion.
        unsafe {
            asm!(
                "tileloadd tmm4, [{left} + {stride} * 1]",
                "tileloadd tmm6, [{right} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {line} * 1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{below} + {stride} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                left = in(reg) left.as_ptr().add(step * STEP),
                below = in(reg) left.as_ptr().add((TILE * steps + step) * STEP),
                right = in(reg) right.as_ptr().add(step * BLOCK),
                stride = in(reg) stride,
                line = in(reg) size_of::<Line>(),
                options(nostack, readonly),
            );
        }
    }

    /// Writes the block: 32 rows of 32, `pitch` apart.
    pub(super) fn store(to: &mut [f32], pitch: usize) {
        assert!(pitch >= BLOCK && to.len() >= (BLOCK - 1) * pitch + BLOCK);
        // SAFETY: as in `zero`. Rows of tiles are 64 bytes; two by two tiles are 32 rows of 128 bytes, `pitch` elements
        // apart, inside `to` by the assertion.
        unsafe {
            asm!(
                "tilestored [{to} + {pitch} * 1], tmm0",
                "tilestored [{to} + {pitch} * 1 + 64], tmm1",
                "tilestored [{below} + {pitch} * 1], tmm2",
                "tilestored [{below} + {pitch} * 1 + 64], tmm3",
                to = in(reg) to.as_mut_ptr(),
                below = in(reg) to.as_mut_ptr().add(TILE * pitch),
                pitch = in(reg) pitch * size_of::<f32>(),
                options(nostack),
            );
        }
    }

    /// Has a cache line fetched; of no consequence where there is none.
    pub(super) fn prefetch(line: *const bf16) {
        // SAFETY: prefetches do not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
}
