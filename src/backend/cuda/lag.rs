//! LagKV scores: launches `kernels/lag.cu`.

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads, Uniform};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Lag;
use crate::error::Result;

/// `lag_T`: out, lengths, heads of keys and of values, pages, chunks of a row, scratch, where each row's scratch starts,
/// sinks, slots of a partition, whether raw scores are wanted.
type Arguments =
    (Ptr<Ptr<f32>>, Ptr<u32>, Ptr<HeadRows>, Ptr<u32>, u32, Ptr<f64>, Ptr<u64>, u32, u32, u32);
const LAG: Kernel<Arguments> = Kernel::new("lag", "lag");

const THREADS: u32 = 256;
const WARPS: usize = 8;
/// Rows that a warp has in shared memory.
const GROUP: usize = 4;

pub(super) fn run(
    cuda: &Cuda,
    op: &Lag,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::lag(op, layers, out)?;
    let parts = Uniform::of(layers)?;
    // Partitions of a row that are scored: each but the last full one.
    let scored = |&len: &u32| (len.saturating_sub(op.sinks) / op.lag).saturating_sub(1);

    let mut table = Table::default();
    let mut heads = Heads::default();
    let mut starts = Vec::new();
    let mut scratch = 0;
    for Uniform { segments, layers: alike, .. } in &parts {
        let layers = &layers[alike.clone()];
        layers.iter().try_for_each(|layer| heads.push("keys", layer.k()).map(drop))?;
        layers.iter().try_for_each(|layer| heads.push("values", layer.v()).map(drop))?;
        for len in &out.lens()[segments.clone()] {
            starts.push(scratch);
            scratch += 2 * u64::from(scored(len)) * u64::from(op.lag);
        }
    }
    let heads = heads.into_table(&mut table);
    let starts = table.push(&starts);
    let sent = table.send(cuda)?;
    let scratch =
        Memory::new(&cuda.driver, "deviations of slots", scratch as usize * size_of::<f64>())?;

    for Uniform { dtype, dim, chunks, segments, .. } in parts {
        let first = segments.start;
        let most = out.lens()[segments.clone()].iter().map(scored).max().unwrap_or(0);
        let extremes = WARPS * 2 * dim;
        let rows = WARPS * GROUP * (dim.next_multiple_of(32) + 8);
        let shared = (2 * dim + extremes.max(rows)) * size_of::<f32>();
        let grid =
            Grid { shared: shared as u32, ..Grid::new(most as usize + 1, segments.len(), THREADS) };
        let arguments = (
            out.rows().add(first),
            out.lengths().add(first),
            sent.at(heads.rows).add(2 * first),
            sent.at(heads.pages),
            chunks,
            scratch.at(0),
            sent.at(starts).add(first),
            op.sinks,
            op.lag,
            op.cross_scoring.into(),
        );
        LAG.launch(&cuda.driver, dtype, grid, arguments)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&LAG).into()]
}
