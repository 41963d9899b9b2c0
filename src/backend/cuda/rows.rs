//! Elementwise and per-row operations on scores: launches `kernels/rows.cu`.

use std::ops::Range;

use super::driver::{Memory, Ptr};
use super::floats::{Sent, Slot, Table};
use super::launch::{Grid, Kernel};
use super::views::Positions;
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::NormScale;
use crate::error::Result;
use crate::ragged::Ragged;

/// Rows, lengths, counts.
const COUNT_NAN: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u32>)> = Kernel::new("rows", "count_nan");
/// Norms, rows, lengths, epsilon.
const WEIGH: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>, f32)> = Kernel::new("rows", "weigh");
/// Rows, by, lengths of the rows.
const RAISE: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>)> = Kernel::new("rows", "raise");
/// Rows, lengths, sums, partial sums, arrivals.
const SUM: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<f64>, Ptr<f64>, Ptr<u32>)> =
    Kernel::new("rows", "sum_rows");
/// Rows, lengths, sums.
const FLOOR_AT_MEAN: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<f64>)> =
    Kernel::new("rows", "floor_at_mean");
/// Norms, lengths, rows of each view, view of each row, sums.
const SCALE_BY_LAYER: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u32>, Ptr<u32>, Ptr<f64>)> =
    Kernel::new("rows", "scale_by_layer");
/// Norms, lengths, rows of each view, where each row's positions start, positions.
const SCALE_BY_HEADS: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u32>, Ptr<i64>, Ptr<u32>)> =
    Kernel::new("rows", "scale_by_heads");
/// Rows, lengths, rows of each view.
const SHARE_HEADS: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u32>)> = Kernel::new("rows", "share_heads");
/// Out, its lengths, rows, units, where each row's units start.
const COARSEN: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<Ptr<f32>>, Ptr<[u32; 2]>, Ptr<u64>)> =
    Kernel::new("rows", "coarsen");
/// Out, its lengths, rows, slots, where each row's slots start.
type Pick = (Ptr<Ptr<f32>>, Ptr<u32>, Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u64>);
const PICK: Kernel<Pick> = Kernel::new("rows", "pick");

/// Entries that a block of an elementwise kernel takes.
const TILE: u32 = 1024;
/// Entries that a block sums.
const SUM_TILE: u32 = 4096;
/// Threads of a block.
const THREADS: u32 = 256;

fn grid(rows: &Floats) -> Grid {
    tiles(rows.longest(), rows.lens().len())
}

/// Tiles of the longest of `rows` rows.
fn tiles(longest: u32, rows: usize) -> Grid {
    Grid::new(longest.div_ceil(TILE) as usize, rows, THREADS)
}

/// Sums of rows, on the device.
struct Sums(Memory);

impl Sums {
    /// Sums the first `lengths[r]` entries of each row, at most `longest`.
    fn new(cuda: &Cuda, rows: &Floats, lengths: Ptr<u32>, longest: u32) -> Result<Self> {
        let count = rows.lens().len();
        let chunks = longest.div_ceil(SUM_TILE).max(1) as usize;
        let wide = size_of::<f64>();
        let arrivals = (1 + chunks) * count * wide;
        let bytes = arrivals + size_of_val(rows.lens());
        let memory = Memory::new(&cuda.driver, "sums of rows", bytes)?;
        memory.clear(arrivals, bytes - arrivals)?;
        let arguments =
            (rows.rows(), lengths, memory.at(0), memory.at(count * wide), memory.at(arrivals));
        SUM.launch(&cuda.driver, "", Grid::new(chunks, count, THREADS), arguments)?;
        Ok(Self(memory))
    }

    fn at(&self) -> Ptr<f64> {
        self.0.at(0)
    }
}

/// First row of each view, and the end of the last.
fn views(heads: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut next = 0;
    let ends = heads.map(|n| {
        next += n as u32;
        next
    });
    std::iter::once(0).chain(ends).collect()
}

/// A number per row, on the device.
pub struct Counts {
    sent: Sent,
    counts: Slot<u32>,
    rows: usize,
}

impl Counts {
    pub(super) fn to_host(&self) -> Result<Vec<u64>> {
        Ok(self.sent.read(self.counts, self.rows)?.into_iter().map(u64::from).collect())
    }
}

pub(super) fn count_nan(cuda: &Cuda, rows: &Floats) -> Result<Counts> {
    let mut table = Table::default();
    let counts = table.push(&vec![0u32; rows.lens().len()]);
    let sent = table.send(cuda)?;
    let arguments = (rows.rows(), rows.lengths(), sent.at(counts));
    COUNT_NAN.launch(&cuda.driver, "", grid(rows), arguments)?;
    Ok(Counts { sent, counts, rows: rows.lens().len() })
}

pub(super) fn scale_norms(
    cuda: &Cuda,
    op: NormScale,
    layers: &[DeviceLayer<'_>],
    norms: &mut Floats,
) -> Result<()> {
    check::segments(layers, norms)?;
    let heads = || layers.iter().map(|layer| layer.shape().kv_heads());
    let mut table = Table::default();
    let views = table.push(&views(heads()));
    match op {
        NormScale::None => Ok(()),
        NormScale::Layer => {
            let of_row = (0u32..).zip(heads()).flat_map(|(view, n)| std::iter::repeat_n(view, n));
            let of_row = table.push(&of_row.collect::<Vec<_>>());
            let sent = table.send(cuda)?;
            let sums = Sums::new(cuda, norms, norms.lengths(), norms.longest())?;
            let arguments =
                (norms.rows(), norms.lengths(), sent.at(views), sent.at(of_row), sums.at());
            SCALE_BY_LAYER.launch(&cuda.driver, "", grid(norms), arguments)
        }
        NormScale::Heads => {
            let positions = Positions::new(layers);
            let grid = tiles(positions.end(), layers.len());
            let positions = positions.into_table(&mut table);
            let sent = table.send(cuda)?;
            let (starts, positions) = (sent.at(positions.starts), sent.at(positions.all));
            let arguments = (norms.rows(), norms.lengths(), sent.at(views), starts, positions);
            SCALE_BY_HEADS.launch(&cuda.driver, "", grid, arguments)
        }
    }
}

pub(super) fn floor_at_mean(cuda: &Cuda, lens: &[u32], rows: &mut Floats) -> Result<()> {
    check::floor_at_mean(lens, rows)?;
    let longest = lens.iter().copied().max().unwrap_or(0);
    let mut table = Table::default();
    let lens = table.push(lens);
    let sent = table.send(cuda)?;
    let sums = Sums::new(cuda, rows, sent.at(lens), longest)?;
    let grid = tiles(longest, rows.lens().len());
    FLOOR_AT_MEAN.launch(&cuda.driver, "", grid, (rows.rows(), sent.at(lens), sums.at()))
}

pub(super) fn weigh(cuda: &Cuda, epsilon: f32, rows: &Floats, norms: &mut Floats) -> Result<()> {
    check::weigh(rows, norms)?;
    WEIGH.launch(
        &cuda.driver,
        "",
        grid(norms),
        (norms.rows(), rows.rows(), rows.lengths(), epsilon),
    )
}

pub(super) fn raise(cuda: &Cuda, by: &Floats, rows: &mut Floats) -> Result<()> {
    check::raise(by, rows)?;
    RAISE.launch(&cuda.driver, "", grid(rows), (rows.rows(), by.rows(), rows.lengths()))
}

pub(super) fn share_heads(cuda: &Cuda, heads: &[usize], rows: &mut Floats) -> Result<()> {
    check::share_heads(heads, rows)?;
    let mut table = Table::default();
    let views = table.push(&views(heads.iter().copied()));
    let sent = table.send(cuda)?;
    let grid = tiles(rows.longest(), heads.len());
    SHARE_HEADS.launch(&cuda.driver, "", grid, (rows.rows(), rows.lengths(), sent.at(views)))
}

pub(super) fn coarsen(cuda: &Cuda, units: &Ragged<Range<u32>>, rows: &Floats) -> Result<Floats> {
    check::coarsen(units, rows)?;
    let pairs: Vec<[u32; 2]> = units.data().iter().map(|unit| [unit.start, unit.end]).collect();
    let out = Floats::zeroed(cuda, &lens(units))?;
    let grid = Grid::new(out.longest().div_ceil(THREADS) as usize, out.lens().len(), THREADS);
    let mut table = Table::default();
    let (pairs, offsets) = (table.push(&pairs), table.push(&offsets(units)));
    let sent = table.send(cuda)?;
    let arguments = (out.rows(), out.lengths(), rows.rows(), sent.at(pairs), sent.at(offsets));
    COARSEN.launch(&cuda.driver, "", grid, arguments)?;
    Ok(out)
}

pub(super) fn pick(cuda: &Cuda, slots: &Ragged<u32>, rows: &Floats) -> Result<Floats> {
    check::pick(slots, rows)?;
    let out = Floats::zeroed(cuda, &lens(slots))?;
    let mut table = Table::default();
    let (all, offsets) = (table.push(slots.data()), table.push(&offsets(slots)));
    let sent = table.send(cuda)?;
    let arguments = (out.rows(), out.lengths(), rows.rows(), sent.at(all), sent.at(offsets));
    launch_pick(cuda, out.longest(), out.lens().len(), arguments)?;
    Ok(out)
}

/// Picks words of `rows` rows, `longest` at most of each: a launch and nothing else.
pub(super) fn launch_pick(cuda: &Cuda, longest: u32, rows: usize, arguments: Pick) -> Result<()> {
    PICK.launch(&cuda.driver, "", tiles(longest, rows), arguments)
}

fn lens<T>(rows: &Ragged<T>) -> Vec<u32> {
    rows.lens().map(|n| n as u32).collect()
}

fn offsets<T>(rows: &Ragged<T>) -> Vec<u64> {
    rows.offsets().iter().map(|&n| n as u64).collect()
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![
        (&COUNT_NAN).into(),
        (&WEIGH).into(),
        (&RAISE).into(),
        (&SUM).into(),
        (&FLOOR_AT_MEAN).into(),
        (&SCALE_BY_LAYER).into(),
        (&SCALE_BY_HEADS).into(),
        (&SHARE_HEADS).into(),
        (&COARSEN).into(),
        (&PICK).into(),
    ]
}
