//! Places in place of scores: launches `kernels/rank.cu`.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::selection::{Span, limit};
use super::{Cuda, Floats, check};
use crate::error::Result;
use crate::ragged::Ragged;

/// Rows, lengths, weights, spans, elements, counts, arrivals, pass.
const COUNT: Kernel<(
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    Ptr<Ranked>,
    Ptr<Span>,
    Ptr<u64>,
    Ptr<u32>,
    Ptr<u32>,
    u32,
)> = Kernel::new("rank", "rank_count");
/// Rows, lengths, weights, spans, elements from and to, counts, pass.
const PLACE: Kernel<(
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    Ptr<Ranked>,
    Ptr<Span>,
    Ptr<u64>,
    Ptr<u64>,
    Ptr<u32>,
    u32,
)> = Kernel::new("rank", "rank_place");

const THREADS: u32 = 256;
/// Elements of a tile, values of a digit, digits: as the kernels have them.
const TILE: u32 = 2048;
const DIGITS: usize = 512;
const PASSES: u32 = 4;
/// A slot is 31 bits of an element.
const LONGEST: u32 = i32::MAX as u32;

/// A row to rank, the twin of `Ranked` in `kernels/rank.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Ranked {
    first_tile: u64,
    protected_first: u32,
    protected_end: u32,
    weight: f32,
    unused: u32,
}

pub(super) fn run(
    cuda: &Cuda,
    protected: &Ragged<Range<u32>>,
    weights: &[f32],
    rows: &mut Floats,
) -> Result<()> {
    check::rank(protected, weights, rows)?;
    limit("slots of a ranked row on CUDA", rows.longest().into(), LONGEST)?;
    let (mut ranked, mut spans, mut tiles) = (Vec::new(), Vec::<Span>::new(), 0);
    for ((&len, ranges), &weight) in rows.lens().iter().zip(protected.iter()).zip(weights) {
        let protected_first = spans.len() as u32;
        spans.extend(ranges.iter().cloned().map(Span::from));
        let protected_end = spans.len() as u32;
        ranked.push(Ranked {
            first_tile: tiles,
            protected_first,
            protected_end,
            weight,
            unused: 0,
        });
        tiles += u64::from(len.div_ceil(TILE));
    }
    let mut table = Table::default();
    let (ranked, spans) = (table.push(&ranked), table.push(&spans));
    let arrivals = table.push(&vec![0u32; weights.len()]);
    let sent = table.send(cuda)?;

    let half = tiles as usize * TILE as usize * size_of::<u64>();
    let elements = Memory::new(&cuda.driver, "rows to rank", 2 * half)?;
    let counts = tiles as usize * DIGITS * size_of::<u32>();
    let counts = Memory::new(&cuda.driver, "digits of rows to rank", counts)?;
    let grid = Grid::new(rows.longest().div_ceil(TILE) as usize, weights.len(), THREADS);
    let (ranked, spans, counted) = (sent.at(ranked), sent.at(spans), counts.at(0));
    let (mut from, mut to) = (elements.at(0), elements.at(half));
    for pass in 0..PASSES {
        let (scores, lengths) = (rows.rows(), rows.lengths());
        let arguments = (scores, lengths, ranked, spans, from, counted, sent.at(arrivals), pass);
        COUNT.launch(&cuda.driver, "", grid, arguments)?;
        let arguments = (scores, lengths, ranked, spans, from, to, counted, pass);
        PLACE.launch(&cuda.driver, "", grid, arguments)?;
        std::mem::swap(&mut from, &mut to);
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&COUNT).into(), (&PLACE).into()]
}
