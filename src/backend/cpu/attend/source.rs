//! Rows of keys and values, as the vector code takes them.
//!
//! f32 and bf16 rows are read where they lie, bf16 two at a time: an even element is the low half of a word, an odd one
//! the high half, so queries and outputs of such rows are [in that order](Order) too. What is left (f16, dims that are no
//! multiple of 32) is widened into a tile first.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use super::super::HostSlice;
use super::super::isa::Isa;
use super::super::{intrinsics, tile};
use super::scan::TILE;
use crate::view::Rows;

/// Elements of a tile of widened rows.
pub(super) const WIDENED: usize = 8192;
/// Rows take a multiple of this where they are widened, and are read where they lie if they have one.
pub(super) const UNIT: usize = 32;

/// How rows are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie.
    InPlace,
    /// As they lie, elements two by two: of `2 L` elements the even ones come first.
    Pairs,
    /// From a tile of f32.
    Widened,
}

impl Order {
    pub(super) fn of(rows: &Rows<'_, HostSlice<'_>>) -> Self {
        match rows.storage() {
            _ if !rows.dim().is_multiple_of(UNIT) => Self::Widened,
            HostSlice::F32(_) => Self::InPlace,
            HostSlice::BF16(_) => Self::Pairs,
            HostSlice::F16(_) => Self::Widened,
        }
    }

    /// Where an element of a row comes, with so many lanes.
    pub(super) fn place(self, element: usize, lanes: usize) -> usize {
        if self != Self::Pairs {
            return element;
        }
        // No division: lanes are a power of two.
        let i = element & (2 * lanes - 1);
        element - i + (i & 1) * lanes + (i >> 1)
    }
}

/// Lanes of a vector.
pub(super) fn lanes(isa: Isa) -> usize {
    if isa >= Isa::Avx512 { 16 } else { 8 }
}

/// Two vectors of elements.
pub(super) type Chunk<T, const L: usize> = [[T; 2]; L];

/// What rows are made of.
pub(super) trait Source: Pod {
    /// Widens two vectors.
    fn load<const L: usize>(chunk: &Chunk<Self, L>) -> [[f32; L]; 2];
}

impl Source for f32 {
    #[inline(always)]
    fn load<const L: usize>(chunk: &Chunk<f32, L>) -> [[f32; L]; 2] {
        let (x, mut lanes) = (chunk.as_flattened(), [[0.0; L]; 2]);
        lanes[0].copy_from_slice(&x[..L]);
        lanes[1].copy_from_slice(&x[L..]);
        lanes
    }
}

impl Source for bf16 {
    #[inline(always)]
    fn load<const L: usize>(chunk: &Chunk<bf16, L>) -> [[f32; L]; 2] {
        let mut lanes = [[0.0; L]; 2];
        for l in 0..L {
            let word: u32 = bytemuck::cast(chunk[l]);
            let word = if cfg!(target_endian = "little") { word } else { word.rotate_left(16) };
            lanes[0][l] = f32::from_bits(word << 16);
            lanes[1][l] = f32::from_bits(word & 0xffff_0000);
        }
        lanes
    }
}

/// Rows of a tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, T> {
    pub(super) data: &'a [T],
    /// Element at which each row starts.
    pub(super) starts: &'a [usize],
    pub(super) pitch: usize,
    /// As many rows that are read next: each chunk of this tile asks for its like of those.
    pub(super) next: &'a Next<'a>,
}

/// Rows to be asked for: the memory is to be busy while the arithmetic goes on, and lines that are asked for all at
/// once would stop both.
pub(super) struct Next<'a> {
    bytes: &'a [u8],
    /// Byte at which each row starts.
    starts: [usize; TILE],
    /// Bytes of a chunk.
    chunk: usize,
}

impl<'a> Next<'a> {
    #[inline(always)]
    pub(super) fn new<const L: usize>(
        rows: &Rows<'_, HostSlice<'a>>,
        head: usize,
        slots: Range<usize>,
    ) -> Self {
        let size = rows.dtype().size();
        let bytes = match rows.storage() {
            HostSlice::F32(data) => bytemuck::cast_slice(data),
            HostSlice::F16(data) => bytemuck::cast_slice(data),
            HostSlice::BF16(data) => bytemuck::cast_slice(data),
        };
        let mut starts = [0; TILE];
        find(rows, head, &slots, &mut starts[..slots.len()]);
        starts.iter_mut().for_each(|start| *start *= size);
        Self { bytes, starts, chunk: 2 * L * size }
    }

    #[inline(always)]
    pub(super) fn ask(&self, row: usize, chunk: usize) {
        let at = self.starts[row] + chunk * self.chunk;
        intrinsics::prefetch(self.bytes, at);
        if self.chunk > intrinsics::LINE {
            intrinsics::prefetch(self.bytes, at + intrinsics::LINE);
        }
    }
}

/// Elements at which rows start.
#[inline(always)]
fn find(rows: &Rows<'_, HostSlice<'_>>, head: usize, slots: &Range<usize>, starts: &mut [usize]) {
    let mut rest = starts;
    for run in rows.runs(head, slots.start, slots.end) {
        let (now, later) = rest.split_at_mut(run.rows);
        now.iter_mut().enumerate().for_each(|(i, start)| *start = run.start + i * run.stride);
        rest = later;
    }
}

impl<'a, T: Source> Tile<'a, T> {
    #[inline(always)]
    pub(super) fn row<const L: usize>(&self, i: usize) -> &'a [Chunk<T, L>] {
        self.data[self.starts[i]..][..self.pitch].as_chunks().0.as_chunks().0
    }
}

/// Elements that a tile's rows are in.
pub(super) enum Data<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
}

/// The slots from `first` on, and where their rows start.
#[inline(always)]
pub(super) fn read<'a>(
    rows: &Rows<'_, HostSlice<'a>>,
    head: usize,
    first: usize,
    starts: &mut [usize],
    widened: &'a mut [f32],
) -> Data<'a> {
    let (dim, slots) = (rows.dim(), first..first + starts.len());
    let data = match (Order::of(rows), rows.storage()) {
        (Order::InPlace, HostSlice::F32(data)) => Data::F32(data),
        (Order::Pairs, HostSlice::BF16(data)) => Data::BF16(data),
        _ => {
            let pitch = pitch(dim);
            starts.iter_mut().enumerate().for_each(|(i, start)| *start = i * pitch);
            // The padding stays zero.
            tile::widen_apart(rows, head, slots, pitch, widened);
            return Data::F32(widened);
        }
    };
    find(rows, head, &slots, starts);
    data
}

/// Elements of a widened row, padding included.
pub(super) fn pitch(dim: usize) -> usize {
    dim.next_multiple_of(UNIT)
}
