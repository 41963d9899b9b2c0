//! What is left of keys outside subspaces, and the keys that subspaces are made of: launches `kernels/residual.cu`.

use std::ops::Range;

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads, Uniform};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Residuals;
use crate::error::Result;
use crate::ragged::Ragged;

/// `keys_T`: out, place of each row's first key, ranges, heads, pages, chunks of a key.
const KEYS: Kernel<(Ptr<f32>, Ptr<u64>, Ptr<[u32; 2]>, Ptr<HeadRows>, Ptr<u32>, u32)> =
    Kernel::new("residual", "keys");
/// `residual_norms_T_D`: out, lengths, heads, pages, chunks of a key, bases, where each row's basis starts, its rank, ranges,
/// first range of each row.
type Norms = (
    Ptr<Ptr<f32>>,
    Ptr<u32>,
    Ptr<HeadRows>,
    Ptr<u32>,
    u32,
    Ptr<f32>,
    Ptr<u64>,
    Ptr<u32>,
    Ptr<[u32; 2]>,
    Ptr<u32>,
);
const NORMS: Kernel<Norms> = Kernel::new("residual", "residual_norms");

/// Slots of a block.
const SLOTS: u32 = 128;
const THREADS: u32 = 256;

pub(super) fn keys(
    cuda: &Cuda,
    slots: &[Range<u32>],
    layers: &[DeviceLayer<'_>],
) -> Result<Ragged<f32>> {
    check::keys(slots, layers)?;
    let parts = Uniform::of(layers)?;
    let mut table = Table::default();
    let heads = Heads::keys(layers)?.into_table(&mut table);
    let ranges = table.push(&slots.iter().map(pair).collect::<Vec<_>>());
    // Keys of one part have one length: their places count from its start.
    let mut places = Vec::with_capacity(slots.len());
    let mut starts = Vec::with_capacity(parts.len());
    let mut words = 0;
    for Uniform { dim, segments, .. } in &parts {
        starts.push(words);
        let mut place = 0;
        for range in &slots[segments.clone()] {
            places.push(place);
            place += range.len() as u64;
        }
        words += place as usize * dim;
    }
    let places = table.push(&places);
    let sent = table.send(cuda)?;
    let memory = Memory::new(&cuda.driver, "keys", words * size_of::<f32>())?;
    for (Uniform { dtype, chunks, segments, .. }, start) in parts.iter().zip(starts) {
        let first = segments.start;
        let most = slots[segments.clone()].iter().map(|range| range.len()).max().unwrap_or(0);
        let arguments = (
            memory.at(start * size_of::<f32>()),
            sent.at(places).add(first),
            sent.at(ranges).add(first),
            sent.at(heads.rows).add(first),
            sent.at(heads.pages),
            *chunks,
        );
        let grid = Grid::new(most.div_ceil(SLOTS as usize), segments.len(), THREADS);
        KEYS.launch(&cuda.driver, dtype, grid, arguments)?;
    }
    let words: Vec<f32> = memory.read(0, words)?;
    let mut words = words.as_slice();
    let dims = parts.iter().flat_map(|part| part.segments.clone().map(|_| part.dim));
    let rows = dims.zip(slots).map(|(dim, range)| {
        let (row, rest) = words.split_at(range.len() * dim);
        words = rest;
        row.to_vec()
    });
    Ok(rows.collect())
}

pub(super) fn norms(
    cuda: &Cuda,
    op: &Residuals<'_>,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::residual_norms(op, layers, out)?;
    let parts = Uniform::of(layers)?;
    let mut table = Table::default();
    let heads = Heads::keys(layers)?.into_table(&mut table);
    let dims = parts.iter().flat_map(|part| part.segments.clone().map(|_| part.dim));
    let ranks = op.bases.lens().zip(dims).map(|(len, dim)| (len / dim) as u32);
    let ranks = table.push(&ranks.collect::<Vec<_>>());
    let starts: Vec<u64> = op.bases.offsets().iter().map(|&n| n as u64).collect();
    let (starts, bases) = (table.push(&starts), table.push(op.bases.data()));
    let firsts: Vec<u32> = op.slots.offsets().iter().map(|&n| n as u32).collect();
    let firsts = table.push(&firsts);
    let ranges = table.push(&op.slots.data().iter().map(pair).collect::<Vec<_>>());
    let sent = table.send(cuda)?;
    for Uniform { dtype, dim, chunks, segments, .. } in parts {
        let first = segments.start;
        let longest = out.lens()[segments.clone()].iter().copied().max().unwrap_or(0);
        let room = if dim <= 128 { 128 } else { 256 };
        let arguments = (
            out.rows().add(first),
            out.lengths().add(first),
            sent.at(heads.rows).add(first),
            sent.at(heads.pages),
            chunks,
            sent.at(bases),
            sent.at(starts).add(first),
            sent.at(ranks).add(first),
            sent.at(ranges),
            sent.at(firsts).add(first),
        );
        let grid = Grid::new(longest.div_ceil(SLOTS) as usize, segments.len(), THREADS);
        NORMS.launch(&cuda.driver, &format!("{dtype}_{room}"), grid, arguments)?;
    }
    Ok(())
}

fn pair(range: &Range<u32>) -> [u32; 2] {
    [range.start, range.end]
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&KEYS).into(), (&NORMS).into()]
}
