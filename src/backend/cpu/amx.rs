//! Matrix products by the tile unit of recent Xeons (AMX): `c[m, n] = a[m, k] · b[n, k]ᵀ`, bf16 in, f32 out.
//!
//! The unit multiplies tiles of 16 rows by 64 bytes and does an order of magnitude more than vector units can. It knows
//! bf16 only, so that other types go in as sums of bf16, their *planes*: an f16 is exactly two of them, an f32 three, 8
//! bits of the significand each. Products of planes below the last bit of an f32 are left out. Infinities do not
//! split: rows that have some go elsewhere.
//!
//! `unsafe` because the instructions have no stable intrinsics. Sources: Intel SDM, "Intel AMX"; the kernel's
//! Documentation/arch/x86/xstate.rst for the permission that a process has to ask for.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::HostSlice;
use super::tile::{self, Arithmetic, Isa, Kernel};
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

/// The left operand: rows in blocks, where they lie or packed.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    elements: &'a [bf16],
    /// Elements from a row to the next, and from a plane to the next.
    stride: usize,
    plane: usize,
    rows: usize,
    steps: usize,
    planes: usize,
}

impl<'a> Left<'a> {
    /// Rows of a head in place: bf16 in whole blocks and steps at a constant stride.
    pub(super) fn in_place(
        src: &Rows<'_, HostSlice<'a>>,
        head: usize,
        rows: Range<usize>,
    ) -> Option<Self> {
        let HostSlice::BF16(data) = src.storage() else { return None };
        let (len, dim) = (rows.len(), src.dim());
        let mut runs = src.runs(head, rows.start, rows.end);
        let (Some(run), None) = (runs.next(), runs.next()) else { return None };
        if !len.is_multiple_of(BLOCK)
            || !dim.is_multiple_of(STEP)
            || !run.stride.is_multiple_of(STEP)
        {
            return None;
        }
        let elements = &data[run.start..][..(len - 1) * run.stride + dim];
        // Rows that lie across cache lines are read twice for every block of columns: packing costs less.
        if !elements.as_ptr().addr().is_multiple_of(align_of::<Line>()) {
            return None;
        }
        let (stride, steps) = (run.stride, dim / STEP);
        Some(Self { elements, stride, plane: 0, rows: len, steps, planes: 1 })
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
        let stride = steps * STEP;
        Left { elements, stride, plane: rows * stride, rows, steps, planes }
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

/// The right operand, two elements of a column side by side: `[plane][step][tile of columns][pair][column][2]`.
#[derive(Default)]
pub(super) struct Right {
    lines: Vec<Line>,
    columns: usize,
    steps: usize,
    planes: usize,
}

impl Right {
    /// Packs rows of `dim` elements, all of them values of `dtype`: the columns of the product, padded with zeros to
    /// whole blocks. False if one does not split.
    pub(super) fn load(&mut self, dtype: Dtype, dim: usize, rows: &[f32]) -> bool {
        self.planes = planes(dtype);
        self.columns = (rows.len() / dim).next_multiple_of(BLOCK);
        self.steps = dim.div_ceil(STEP);
        let tiles = self.columns / TILE;
        let plane = self.steps * tiles * TILE;
        self.lines.clear();
        self.lines.resize(self.planes * plane, ZERO);
        let mut finite = true;
        for (n, row) in rows.chunks_exact(dim).enumerate() {
            for (s, part) in row.chunks(STEP).enumerate() {
                let mut rest = [0f32; STEP];
                rest[..part.len()].copy_from_slice(part);
                finite &= rest.iter().fold(true, |all, x| all & x.is_finite());
                let first = (s * tiles + n / TILE) * TILE;
                for p in 0..self.planes {
                    let mut elements = [bf16::ZERO; STEP];
                    split(&mut rest, &mut elements);
                    let lines = self.lines[p * plane + first..][..TILE].iter_mut();
                    for (line, pair) in lines.zip(elements.as_chunks::<2>().0) {
                        line.0[n % TILE * 2..][..2].copy_from_slice(pair);
                    }
                }
            }
        }
        finite || self.planes == 1
    }
}

/// `c[row][column]`, padding included; on the calling thread. Only where the unit is [`available`].
pub(super) fn multiply(a: &Left<'_>, b: &Right, c: &mut [f32]) {
    assert!(available(), "no tile unit");
    assert!(a.steps == b.steps && a.steps > 0, "operands of one product");
    let last = (a.planes - 1) * a.plane + (a.rows - 1) * a.stride;
    assert!(a.elements.len() >= last + a.steps * STEP, "rows of the left operand");
    assert!(c.len() >= a.rows * b.columns, "room for the product");
    // Planes whose product reaches the last bit of an f32.
    const LAST: usize = 2;
    let mut steps = Vec::with_capacity(6 * a.steps);
    for (p, q) in (0..a.planes).flat_map(|p| (0..b.planes.min(LAST + 1 - p)).map(move |q| (p, q))) {
        for s in 0..a.steps {
            let left = (p * a.plane + s * STEP) * size_of::<bf16>();
            let right = (q * a.steps + s) * b.columns * size_of::<Line>();
            steps.push([left, right]);
        }
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    unit::product(a, b, &steps, c);
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code, reason = "instructions without intrinsics")]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _MM_HINT_T0, _mm_prefetch, _xgetbv};

    use half::bf16;

    use super::{BLOCK, Left, Line, Right, STEP, TILE};

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

    pub(super) fn product(a: &Left<'_>, b: &Right, steps: &[[usize; 2]], c: &mut [f32]) {
        let pitch = b.columns * size_of::<f32>();
        let stride = a.stride * size_of::<bf16>();
        // SAFETY: the unit is there and permitted, as `multiply` asserts. Tiles are configured before they are used and
        // released after, on one thread, with nothing in between that could touch them. Every load lies in a block of
        // 32 rows of `a`, `stride` apart, or in two tiles of `b` next to each other, for the offsets that
        // `multiply` computes from the operands' shapes; every store in a block of 32 by 32 of `c`, rows `pitch` apart,
        // which has `a.rows * b.columns` elements, both multiples of 32.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const TILES, options(nostack, readonly));
            for m in (0..a.rows).step_by(BLOCK) {
                let left = a.elements.as_ptr().add(m * a.stride);
                for n in (0..b.columns).step_by(BLOCK) {
                    // A share of the rows of the next block: loads of tiles are not foreseen by the machine. It may be the
                    // next tile's, or nothing's.
                    for row in (n / BLOCK..BLOCK).step_by(b.columns / BLOCK) {
                        for step in 0..a.steps {
                            let ahead = left.wrapping_add((BLOCK + row) * a.stride + step * STEP);
                            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        }
                    }
                    let right = b.lines.as_ptr().add(n);
                    let to = c.as_mut_ptr().add(m * b.columns + n);
                    asm!(
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "2:",
                        "mov {p}, [{step}]",
                        "mov {q}, [{step} + 8]",
                        "add {p}, {left}",
                        "add {q}, {right}",
                        "tileloadd tmm4, [{p} + {stride} * 1]",
                        "tileloadd tmm6, [{q} + {line} * 1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{q} + {line} * 1 + 1024]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "add {p}, {down}",
                        "tileloadd tmm5, [{p} + {stride} * 1]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        "add {step}, 16",
                        "dec {count}",
                        "jnz 2b",
                        "mov {p}, {to}",
                        "tilestored [{p} + {pitch} * 1], tmm0",
                        "tilestored [{p} + {pitch} * 1 + 64], tmm1",
                        "add {p}, {below}",
                        "tilestored [{p} + {pitch} * 1], tmm2",
                        "tilestored [{p} + {pitch} * 1 + 64], tmm3",
                        p = out(reg) _,
                        q = out(reg) _,
                        step = inout(reg) steps.as_ptr() => _,
                        count = inout(reg) steps.len() => _,
                        left = in(reg) left,
                        right = in(reg) right,
                        stride = in(reg) stride,
                        line = in(reg) size_of::<Line>(),
                        down = in(reg) TILE * stride,
                        to = in(reg) to,
                        pitch = in(reg) pitch,
                        below = in(reg) TILE * pitch,
                        options(nostack),
                    );
                }
            }
            asm!("tilerelease", options(nostack, nomem));
        }
    }
}
