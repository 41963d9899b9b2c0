//! Exact selection on device pointers: tables that the host makes once, and launches of `kernels/top_k.cu` and
//! `kernels/top_k_emit.cu` that allocate nothing and wait for nothing.

use bytemuck::{Pod, Zeroable};

use super::driver::Ptr;
use super::floats::{Sent, Slot, Table};
use super::launch::{Grid, Kernel};
use super::{Cuda, pool};
use crate::backend::ops::{Contest, Pooling};
use crate::error::{Error, Result};
use crate::ragged::Ragged;

/// Rows, lengths, segments, spans, contests, tallies, contest tallies, steps, histograms, marks, candidates, cuts, tiles
/// of a block.
type Level = (
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    Ptr<Segment>,
    Ptr<Span>,
    Ptr<Group>,
    Ptr<u8>,
    Ptr<u8>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<Cut>,
    u32,
);
const LEVEL: Kernel<Level> = Kernel::new("top_k", "top_k_level");
/// The level of the first digit, pooled: raw rows, how many slots of each are pooled, radius; then as a level's, whose rows it writes.
type Pooled = (
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    u32,
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    Ptr<Segment>,
    Ptr<Span>,
    Ptr<Group>,
    Ptr<u8>,
    Ptr<u8>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<Cut>,
    u32,
);
const POOLED: Kernel<Pooled> = Kernel::new("top_k", "top_k_pooled");
/// Lengths, segments, cuts, tallies, marks, candidates, status of tiles, positions.
type Emit = (Ptr<u32>, Ptr<Segment>, Ptr<Cut>, Ptr<u8>, Ptr<u32>, Ptr<u32>, Ptr<u64>, Ptr<u32>);
const EMIT: Kernel<Emit> = Kernel::new("top_k_emit", "top_k_emit");

const THREADS: u32 = 256;
/// Slots of a tile, bins of a histogram, words of marks per tile, bytes of a tally: as the kernels have them.
const TILE: u32 = 4096;
const BINS: usize = 2048;
const MARKS: usize = 256;
const TALLY: usize = 32;
/// A segment's counts share a word with flags.
const LONGEST: u32 = i32::MAX as u32;

/// A range of slots; below zero, `x` stands for the segment's length `+ 1 + x` at the time of the launch: -1 is its end.
/// What lies outside the segment is ignored. The twin of `Span` in `kernels/scores.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Span {
    pub start: i64,
    pub end: i64,
}

impl From<std::ops::Range<u32>> for Span {
    fn from(range: std::ops::Range<u32>) -> Self {
        Self { start: range.start.into(), end: range.end.into() }
    }
}

/// The twin of `Segment` in `kernels/top_k.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Segment {
    first_tile: u64,
    floor: u32,
    contest: u32,
    protected_first: u32,
    protected_end: u32,
}

/// The twin of `Contest` in `kernels/top_k.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Group {
    positions: u64,
    budget: u32,
    first: u32,
    end: u32,
    steps: u32,
}

/// What is kept of a segment: `count` slots, ascending, from `start` on among the positions of all. The twin of `Cut` in
/// `kernels/device.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Cut {
    pub start: u64,
    pub count: u32,
    /// Keys above this are kept,
    threshold: u32,
    /// and so many that equal it.
    ties: u32,
    /// Slots, of those that are not protected, that score NaN.
    pub nan: u32,
}

impl Cut {
    /// Slots that the host chose.
    pub(super) fn chosen(start: usize, count: usize) -> Self {
        Self { start: start as u64, count: count as u32, threshold: 0, ties: 0, nan: 0 }
    }
}

/// What the host knows of a selection: it sizes memory and grids.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub segments: usize,
    /// Positions that are written at most: the sum of the budgets.
    pub positions: usize,
    contests: usize,
    /// Contests of several segments.
    shared: usize,
    /// Tiles of all segments, and of the longest one.
    tiles: usize,
    longest: usize,
    /// Tiles that a block counts.
    per_block: usize,
}

/// A selection problem, on its way to the device.
pub(super) struct Problem {
    pub shape: Shape,
    segments: Vec<Segment>,
    spans: Vec<Span>,
    contests: Vec<Group>,
}

/// Where a [`Problem`] will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slots {
    segments: Slot<Segment>,
    spans: Slot<Span>,
    contests: Slot<Group>,
}

/// A [`Problem`] on the device, and the rows that it is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inputs {
    /// Scores of each segment.
    pub rows: Ptr<Ptr<f32>>,
    /// Slots of each segment: at most what the problem was made for.
    pub lengths: Ptr<u32>,
    /// Where the scores come from, if not from the rows.
    pub smoothing: Option<Smoothing>,
    segments: Ptr<Segment>,
    spans: Ptr<Span>,
    contests: Ptr<Group>,
}

/// Rows to smooth into the rows of a selection, while their digits are counted. What is not pooled is copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Smoothing {
    pub kind: Pooling,
    pub radius: u32,
    pub from: Ptr<Ptr<f32>>,
    /// First slots of each row that are pooled.
    pub lengths: Ptr<u32>,
}

impl Problem {
    /// For segments of at most `longest` slots each. Floors and budgets above what there is at the time of the launch
    /// stand for all of it. Contests are consecutive and cover all segments; `protected` has a row per segment.
    ///
    /// Errors: segments of 2^31 slots, contests of 2^32.
    pub(super) fn new(
        cuda: &Cuda,
        contests: &[Contest],
        protected: &Ragged<Span>,
        longest: &[u32],
    ) -> Result<Self> {
        let most = longest.iter().copied().max().unwrap_or(0);
        limit("slots of a segment on CUDA", most.into(), LONGEST)?;
        let (mut segments, mut spans, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tiles, mut positions, mut shared) = (0u64, 0u64, 0u32);
        for contest in contests {
            let longest = &longest[contest.segments.clone()];
            let slots: u64 = longest.iter().map(|&n| u64::from(n)).sum();
            limit("slots of a contest on CUDA", slots, u32::MAX)?;
            let budget = contest.budget.min(slots);
            for ((s, &n), &floor) in contest.segments.clone().zip(longest).zip(&contest.floors) {
                let protected_first = spans.len() as u32;
                spans.extend_from_slice(protected.row(s));
                segments.push(Segment {
                    first_tile: tiles,
                    floor: floor.min(n.into()) as u32,
                    contest: groups.len() as u32,
                    protected_first,
                    protected_end: spans.len() as u32,
                });
                tiles += u64::from(n.div_ceil(TILE));
            }
            groups.push(Group {
                positions,
                budget: budget as u32,
                first: contest.segments.start as u32,
                end: contest.segments.end as u32,
                steps: shared,
            });
            positions += budget;
            shared += u32::from(longest.len() > 1);
        }
        // Four blocks for each multiprocessor, if there are as many tiles; then longer ones, with less to merge.
        let per_block = (tiles as usize).div_ceil(4 * cuda.driver.processors as usize).clamp(1, 8);
        let shape = Shape {
            segments: segments.len(),
            positions: positions as usize,
            contests: groups.len(),
            shared: shared as usize,
            tiles: tiles as usize,
            longest: most.div_ceil(TILE) as usize,
            per_block,
        };
        Ok(Self { shape, segments, spans, contests: groups })
    }

    pub(super) fn into_table(self, table: &mut Table) -> Slots {
        Slots {
            segments: table.push(&self.segments),
            spans: table.push(&self.spans),
            contests: table.push(&self.contests),
        }
    }
}

impl Slots {
    pub(super) fn inputs(self, sent: &Sent, rows: Ptr<Ptr<f32>>, lengths: Ptr<u32>) -> Inputs {
        let Self { segments, spans, contests } = self;
        Inputs {
            rows,
            lengths,
            smoothing: None,
            segments: sent.at(segments),
            spans: sent.at(spans),
            contests: sent.at(contests),
        }
    }
}

pub(super) fn limit(what: &'static str, got: u64, limit: u32) -> Result<()> {
    let limit = u64::from(limit);
    if got > limit { Err(Error::TooLarge { what, got, limit }) } else { Ok(()) }
}

/// Where the parts of the workspace start.
struct Layout {
    contest_tallies: usize,
    steps: usize,
    status: usize,
    histograms: usize,
    marks: usize,
    candidates: usize,
    /// What must be zero: from the start to here.
    zeroed: usize,
    bytes: usize,
}

impl Layout {
    fn of(shape: &Shape) -> Self {
        let mut bytes = shape.segments * TALLY;
        let mut part = |size: usize| {
            let start = bytes.next_multiple_of(32);
            bytes = start + size;
            start
        };
        let contest_tallies = part(shape.contests * TALLY);
        let steps = part(shape.shared * 3 * BINS * 4);
        let status = part(shape.tiles * 8);
        let merged = shape.longest > shape.per_block;
        // A block that has a segment and a contest to itself keeps its counts to itself.
        let histogram = if merged || shape.shared > 0 { shape.segments * BINS * 4 } else { 0 };
        let histograms = part(2 * histogram);
        let marks = part(shape.tiles * MARKS * 4);
        let candidates = part(shape.tiles * TILE as usize * 4);
        let zeroed = histograms + if merged { histogram } else { 0 };
        Self { contest_tallies, steps, status, histograms, marks, candidates, zeroed, bytes }
    }
}

/// Bytes that [`launch`] needs, at a multiple of 32. About 4.25 per slot, of which it touches few, and 16 KB per segment.
pub(super) fn workspace_bytes(shape: &Shape) -> usize {
    Layout::of(shape).bytes
}

/// Selects: a cut for each segment, and `shape.positions` positions at most. Five operations on the stream; what the
/// workspace holds before does not matter.
pub(super) fn launch(
    cuda: &Cuda,
    shape: &Shape,
    inputs: Inputs,
    cuts: Ptr<Cut>,
    positions: Ptr<u32>,
    workspace: Ptr<u8>,
) -> Result<()> {
    let layout = Layout::of(shape);
    let words = |offset: usize| Ptr::<u32>::at(workspace.add(offset).address);
    let Inputs { rows, lengths, smoothing, segments, spans, contests } = inputs;
    let (marks, candidates) = (words(layout.marks), words(layout.candidates));
    let blocks = shape.longest.div_ceil(shape.per_block).max(1);
    let level = Grid::new(blocks, shape.segments, THREADS);
    cuda.driver.clear(workspace, layout.zeroed)?;
    let (tallies, contest_tallies) = (workspace, workspace.add(layout.contest_tallies));
    let (steps, histograms) = (words(layout.steps), words(layout.histograms));
    let tiles = shape.per_block as u32;
    let digits = match smoothing {
        None => &["0", "1", "2"][..],
        Some(Smoothing { kind, radius, from, lengths: pooled }) => {
            #[rustfmt::skip]
            let arguments = (
                from, pooled, radius, rows, lengths, segments, spans, contests, tallies, contest_tallies, steps, histograms,
                marks, candidates, cuts, tiles,
            );
            POOLED.launch(&cuda.driver, pool::variant(kind), level, arguments)?;
            &["1", "2"]
        }
    };
    for digit in digits {
        #[rustfmt::skip]
        let arguments = (
            rows, lengths, segments, spans, contests, tallies, contest_tallies, steps, histograms, marks, candidates, cuts,
            tiles,
        );
        LEVEL.launch(&cuda.driver, digit, level, arguments)?;
    }
    let status = Ptr::at(workspace.add(layout.status).address);
    let arguments = (lengths, segments, cuts, workspace, marks, candidates, status, positions);
    EMIT.launch(&cuda.driver, "", Grid::new(shape.longest, shape.segments, THREADS), arguments)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&LEVEL).into(), (&POOLED).into(), (&EMIT).into()]
}

#[cfg(test)]
mod tests;
