//! Matrix products of bf16, which machines multiply in pairs: `c[m, n] = a[m, k] · b[n, k]ᵀ`, f32 out.
//!
//! The tile unit of recent Xeons (AMX) multiplies tiles of 16 rows by 64 bytes and does an order of magnitude more than vector
//! units can; the dot products of AVX-512 do twice what its f32 vectors can. Both want the right operand in the same order.
//! For the tile unit other types go in as sums of bf16, their *planes*: an f16 is exactly two of them, an f32 three, 8
//! bits of the significand each. Products of planes below the last bit of an f32 are left out. Infinities do not
//! split: rows that have some go elsewhere. With dot products, planes would cost more than f32 does.
//!
//! Source: Intel SDM, "Intel AMX".

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "measured: see benches/README.md")]
mod dots;
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "pairs/absent.rs")]
mod tiles;

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::isa::{Arithmetic, Isa, Kernel};
use super::{HostSlice, intrinsics, tile};
use crate::dtype::Dtype;
use crate::view::Rows;

/// Rows of a tile, and of a block of two.
const TILE: usize = 16;
pub(super) const BLOCK: usize = 2 * TILE;
/// bf16 in a row of a tile.
const STEP: usize = 32;

/// Instructions that multiply pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum With {
    Tiles,
    Dots,
}

/// The best of the machine's instruction sets that multiply pairs.
pub(super) fn best() -> Option<Isa> {
    static BEST: OnceLock<Option<Isa>> = OnceLock::new();
    *BEST.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let dots = dots::available();
        #[cfg(not(target_arch = "x86_64"))]
        let dots = false;
        dots.then(|| if tiles::permitted() { Isa::Amx } else { Isa::Avx512Bf16 })
    })
}

/// Whether pairs are the way to multiply matrices of these types.
pub(super) fn suit(isa: Isa, left: Dtype, right: Dtype) -> bool {
    match isa {
        Isa::Amx => true,
        Isa::Avx512Bf16 => left == Dtype::BF16 && right == Dtype::BF16,
        Isa::Avx512 | Isa::Avx2 | Isa::Portable => false,
    }
}

/// bf16 that an element is the sum of.
pub(super) fn planes(dtype: Dtype) -> usize {
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
        let from = tile::f32_rows(src, head, rows, &mut self.widened);
        let shape = [self.planes, self.rows, self.steps];
        Isa::Amx.run(Split { dim, from, lines: &mut self.lines, shape })
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

/// The instructions, ready on this thread until this is dropped.
pub(super) struct Unit(With, PhantomData<*const ()>);

thread_local! {
    /// How many [`Unit`]s of tiles there are.
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

impl Unit {
    /// Only where pairs [`suit`].
    pub(super) fn open(isa: Isa) -> Self {
        assert!(Some(isa) <= best(), "no instructions for pairs");
        let with = if isa == Isa::Amx { With::Tiles } else { With::Dots };
        if with == With::Tiles && OPEN.replace(OPEN.get() + 1) == 0 {
            tiles::configure();
        }
        Self(with, PhantomData)
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
        let columns = &b.lines[block * b.planes * b.steps * BLOCK..][..b.planes * b.steps * BLOCK];
        for m in 0..a.rows / BLOCK {
            let c = &mut c[m * BLOCK * pitch..];
            match self.0 {
                With::Tiles => by_tiles(a, columns, m, block..blocks, c, pitch),
                With::Dots => {
                    let bytes = bytemuck::cast_slice(a.elements);
                    next_lines(a, m, block..blocks).for_each(|at| intrinsics::prefetch(bytes, at));
                    by_dots(a, columns, m, c, pitch);
                }
            }
        }
    }
}

/// A block of the product, of the `m`-th block of rows. `turn` says which of how many blocks of columns it is.
fn by_tiles(
    a: &Left<'_>,
    columns: &[Line],
    m: usize,
    turn: Range<usize>,
    c: &mut [f32],
    pitch: usize,
) {
    let bytes = bytemuck::cast_slice(a.elements);
    let plane = a.rows * a.steps * STEP;
    let pairs = plane_pairs(a.planes, columns.len() / (a.steps * BLOCK));
    let first = m * BLOCK * a.steps * STEP;
    // With each step, a share of the rows of the next operand.
    let mut lines = next_lines(a, m, turn.clone());
    tiles::zero();
    for step in 0..a.steps {
        for at in lines.by_ref().take(BLOCK.div_ceil(turn.end)) {
            intrinsics::prefetch(bytes, at);
        }
        let (mut left, mut right) = (None, None);
        for &(p, q) in pairs {
            if left != Some(p) {
                let rows = &a.elements[p * plane + first..][..BLOCK * a.steps * STEP];
                tiles::load_left(a.steps, step, rows);
            }
            if right != Some(q) {
                tiles::load_right(&columns[(q * a.steps + step) * BLOCK..][..BLOCK]);
            }
            (left, right) = (Some(p), Some(q));
            tiles::multiply();
        }
    }
    tiles::store(c, pitch);
}

/// Bytes, of the left operand on, at which lines start that may be the next one's: of its `m`-th block of rows, those whose turn it is.
/// The machine does not foresee loads of tiles, nor those of several rows at once.
fn next_lines(a: &Left<'_>, m: usize, turn: Range<usize>) -> impl Iterator<Item = usize> {
    let block = BLOCK * a.steps;
    let first = size_of_val(a.elements) + m * block * size_of::<Line>();
    let lines = if a.in_place { turn.start..block } else { 0..0 };
    lines.step_by(turn.end).map(move |line| first + line * size_of::<Line>())
}

#[cfg(target_arch = "x86_64")]
fn by_dots(a: &Left<'_>, columns: &[Line], m: usize, c: &mut [f32], pitch: usize) {
    let length = BLOCK * a.steps * STEP;
    assert!(a.planes == 1 && columns.len() == a.steps * BLOCK, "bf16");
    #[allow(unsafe_code, reason = "measured: see benches/README.md")]
    // SAFETY: `Unit::open` has asserted that the machine has the instructions.
    unsafe {
        dots::multiply(&a.elements[m * length..][..length], columns, c, pitch)
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn by_dots(_: &Left<'_>, _: &[Line], _: usize, _: &mut [f32], _: usize) {}

impl Drop for Unit {
    fn drop(&mut self) {
        if self.0 == With::Tiles && OPEN.replace(OPEN.get() - 1) == 1 {
            tiles::release();
        }
    }
}

/// Pairs of planes whose product reaches the last bit of an f32, in an order in which most share one with the pair before.
fn plane_pairs(left: usize, right: usize) -> &'static [(usize, usize)] {
    match (left, right) {
        (1, 1) => &[(0, 0)],
        (1, 2) => &[(0, 1), (0, 0)],
        (1, _) => &[(0, 2), (0, 1), (0, 0)],
        (2, 1) => &[(1, 0), (0, 0)],
        (2, 2) => &[(0, 1), (1, 1), (1, 0), (0, 0)],
        (2, _) => &[(0, 2), (0, 1), (1, 1), (1, 0), (0, 0)],
        (_, 1) => &[(2, 0), (1, 0), (0, 0)],
        (_, 2) => &[(0, 1), (1, 1), (1, 0), (0, 0), (2, 0)],
        _ => &[(0, 2), (0, 1), (1, 1), (1, 0), (0, 0), (2, 0)],
    }
}
