//! Selections as the host asks for them, and their slots pinned or dropped in other rows.

use std::ops::Range;

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::selection::{self, Cut, Problem, Smoothing, Span};
use super::{Cuda, Floats, check, pool};
use crate::backend::check::Lens;
use crate::backend::ops::{Contest, Pool, TopK};
use crate::error::Result;
use crate::ragged::Ragged;

/// Rows, cuts, positions.
const PIN: Kernel<(Ptr<Ptr<f32>>, Ptr<Cut>, Ptr<u32>)> = Kernel::new("top_k_emit", "top_k_pin");
/// Rows, by, cuts, positions.
const DROP: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<Cut>, Ptr<u32>)> =
    Kernel::new("top_k_emit", "top_k_drop");
/// Slots that a block marks.
const MARKS: u32 = 1024;

/// Selected slots of every segment, on the device.
pub struct Selection {
    /// A [`Cut`] per segment, then the positions.
    memory: Memory,
    /// Slots of each segment, and how many it keeps at most.
    segments: Vec<(u32, u32)>,
    /// Positions that there is room for.
    positions: usize,
}

impl Selection {
    /// For segments of so many slots, which keep so many at most.
    pub(super) fn new(cuda: &Cuda, segments: Vec<(u32, u32)>, positions: usize) -> Result<Self> {
        let bytes = segments.len() * size_of::<Cut>() + positions * size_of::<u32>();
        let memory = Memory::new(&cuda.driver, "a selection", bytes)?;
        Ok(Self { memory, segments, positions })
    }

    /// What is kept of each segment: where its positions start, and how many there are.
    pub(super) fn cuts(&self) -> Ptr<Cut> {
        self.memory.at(0)
    }
    /// Positions of all segments.
    pub(super) fn positions(&self) -> Ptr<u32> {
        self.memory.at(self.segments.len() * size_of::<Cut>())
    }

    /// Slots of each segment, and how many it keeps at most: what the host knows without asking.
    pub(super) fn segments(&self) -> &[(u32, u32)] {
        &self.segments
    }

    /// Slots that each segment keeps at most: what caches must have room for, as far as the host knows.
    pub fn bounds(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.segments.iter().map(|&(_, most)| most)
    }

    /// Of each segment, the slots that score NaN, which rank below all others: waits for the stream. Protected slots are
    /// not looked at: they are kept whatever they score.
    pub fn nan_scores(&self) -> Result<Vec<u32>> {
        let cuts: Vec<Cut> = self.memory.read(0, self.segments.len())?;
        Ok(cuts.iter().map(|cut| cut.nan).collect())
    }

    pub(super) fn counts(&self) -> Result<Vec<u32>> {
        let cuts: Vec<Cut> = self.memory.read(0, self.segments.len())?;
        Ok(cuts.iter().map(|cut| cut.count).collect())
    }
    pub(super) fn to_host(&self) -> Result<Ragged<u32>> {
        let cuts: Vec<Cut> = self.memory.read(0, self.segments.len())?;
        let start = self.segments.len() * size_of::<Cut>();
        let positions: Vec<u32> = self.memory.read(start, self.positions)?;
        let of = |cut: &Cut| positions[cut.start as usize..][..cut.count as usize].to_vec();
        Ok(cuts.iter().map(of).collect())
    }
}

impl Lens for Vec<u32> {
    fn rows(&self) -> usize {
        self.len()
    }
    fn len(&self, row: usize) -> usize {
        self[row] as usize
    }
}

pub(super) fn run(
    cuda: &Cuda,
    op: &TopK<'_>,
    parts: &[(&Floats, Range<usize>)],
) -> Result<Selection> {
    let (mut rows, mut lens) = (Vec::new(), Vec::new());
    for (part, range) in parts {
        check::within("rows of a part", part.lens().len(), range.end)?;
        rows.extend(range.clone().map(|row| part.row(row).address));
        lens.extend(range.clone().map(|row| part.lens()[row]));
    }
    check::top_k(op, &lens)?;
    select(cuda, op, &rows, &lens, None)
}

/// Smooths rows into new ones and selects of those.
pub(super) fn pool_and_select(
    cuda: &Cuda,
    pool: &Pool<'_>,
    op: &TopK<'_>,
    rows: &Floats,
) -> Result<(Floats, Selection)> {
    check::pool(pool, rows)?;
    check::top_k(op, &rows.lens().to_vec())?;
    let radius = pool::radius(pool.kernel)?;
    // The kernel writes every slot; what is behind a row's end stays zero.
    let pooled = Floats::zeroed(cuda, rows.lens())?;
    let addresses: Vec<_> = (0..rows.lens().len()).map(|row| pooled.row(row).address).collect();
    let smooth = (pool, radius, rows.rows());
    let selection = select(cuda, op, &addresses, rows.lens(), Some(smooth))?;
    Ok((pooled, selection))
}

/// Selects of rows at these addresses, of these lengths, that are those of others smoothed or there already.
fn select(
    cuda: &Cuda,
    op: &TopK<'_>,
    rows: &[u64],
    lens: &[u32],
    smooth: Option<(&Pool<'_>, u32, Ptr<Ptr<f32>>)>,
) -> Result<Selection> {
    let spans = |row: &[Range<u32>]| row.iter().cloned().map(Span::from).collect::<Vec<_>>();
    let protected = op.protected.iter().map(spans).collect();
    let segments = bounds(op.contests, lens);
    let problem = Problem::new(cuda, op.contests, &protected, lens)?;
    let shape = problem.shape;
    let mut table = Table::default();
    let (rows, lens) = (table.push(rows), table.push(lens));
    let pooled = smooth.map(|(pool, ..)| table.push(pool.lens));
    let slots = problem.into_table(&mut table);
    let sent = table.send(cuda)?;
    let mut inputs = slots.inputs(&sent, Ptr::at(sent.at(rows).address), sent.at(lens));
    if let (Some((pool, radius, from)), Some(pooled)) = (smooth, pooled) {
        let lengths = sent.at(pooled);
        inputs.smoothing = Some(Smoothing { kind: pool.kind, radius, from, lengths });
    }
    let bytes = selection::workspace_bytes(&shape);
    let workspace = Memory::new(&cuda.driver, "workspace of a selection", bytes)?;
    let chosen = Selection::new(cuda, segments, shape.positions)?;
    selection::launch(cuda, &shape, inputs, chosen.cuts(), chosen.positions(), workspace.at(0))?;
    Ok(chosen)
}

/// Slots of each segment, and how many it keeps at most: the budget less what the others keep at least.
pub(super) fn bounds(contests: &[Contest], lens: &[u32]) -> Vec<(u32, u32)> {
    let mut bounds = Vec::with_capacity(lens.len());
    for contest in contests {
        let contested = contest.budget - contest.floors.iter().sum::<u64>();
        for (s, floor) in contest.segments.clone().zip(&contest.floors) {
            let most = (contested + floor).min(lens[s].into());
            bounds.push((lens[s], most as u32));
        }
    }
    bounds
}

pub(super) fn pin_top(cuda: &Cuda, counts: &[u32], by: &Floats, rows: &mut Floats) -> Result<()> {
    let (pinned, grid) = marked(cuda, counts, by, rows)?;
    PIN.launch(&cuda.driver, "", grid, (rows.rows(), pinned.cuts(), pinned.positions()))
}

pub(super) fn drop_top(cuda: &Cuda, counts: &[u32], by: &Floats, rows: &mut Floats) -> Result<()> {
    let (dropped, grid) = marked(cuda, counts, by, rows)?;
    let arguments = (rows.rows(), by.rows(), dropped.cuts(), dropped.positions());
    DROP.launch(&cuda.driver, "", grid, arguments)
}

/// The `counts[s]` best slots of each row of `by`, and a grid over them.
fn marked(cuda: &Cuda, counts: &[u32], by: &Floats, rows: &Floats) -> Result<(Selection, Grid)> {
    check::marked_top(counts, by, rows)?;
    let contest = |(s, &count): (usize, &u32)| Contest {
        segments: s..s + 1,
        budget: u64::from(count),
        floors: vec![0],
    };
    let contests: Vec<Contest> = counts.iter().enumerate().map(contest).collect();
    let protected = Ragged::filled(counts.iter().map(|_| 0), 0..0);
    let op = TopK { contests: &contests, protected: &protected };
    let marked = run(cuda, &op, &[(by, 0..by.lens().len())])?;
    let most = counts.iter().copied().max().unwrap_or(0);
    Ok((marked, Grid::new(most.div_ceil(MARKS) as usize, counts.len(), 256)))
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&PIN).into(), (&DROP).into()]
}
