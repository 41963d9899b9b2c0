//! Elementwise and per-row operations on scores: launches `kernels/rows.cu`.

use std::ops::Range;

use super::driver::Ptr;
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::NormScale;
use crate::error::{Error, Result};
use crate::ragged::Ragged;

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

/// Rows, lengths, counts.
const COUNT_NAN: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<u32>)> = Kernel::new("rows", "count_nan");
/// Norms, rows, lengths, epsilon.
const WEIGH: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>, f32)> = Kernel::new("rows", "weigh");
/// Rows, by, lengths of the rows.
const RAISE: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>)> = Kernel::new("rows", "raise");

/// Entries that a block of an elementwise kernel takes.
const TILE: u32 = 1024;

fn grid(rows: &Floats) -> Grid {
    Grid::new(rows.longest().div_ceil(TILE) as usize, rows.lens().len(), 256)
}

pub(super) fn count_nan(cuda: &Cuda, rows: &Floats) -> Result<Vec<u64>> {
    let mut table = Table::default();
    let counts = table.push(&vec![0u32; rows.lens().len()]);
    let sent = table.send(cuda)?;
    COUNT_NAN.launch(
        &cuda.driver,
        "",
        grid(rows),
        (rows.rows(), rows.lengths(), sent.at(counts)),
    )?;
    Ok(sent.read(counts, rows.lens().len())?.into_iter().map(u64::from).collect())
}

pub(super) fn scale_norms(
    _: &Cuda,
    _: NormScale,
    layers: &[DeviceLayer<'_>],
    norms: &mut Floats,
) -> Result<()> {
    check::segments(layers, norms)?;
    Err(UNDONE)
}

pub(super) fn floor_at_mean(_: &Cuda, lens: &[u32], rows: &mut Floats) -> Result<()> {
    check::floor_at_mean(lens, rows)?;
    Err(UNDONE)
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

pub(super) fn share_heads(_: &Cuda, heads: &[usize], rows: &mut Floats) -> Result<()> {
    check::share_heads(heads, rows)?;
    Err(UNDONE)
}

pub(super) fn coarsen(_: &Cuda, units: &Ragged<Range<u32>>, rows: &Floats) -> Result<Floats> {
    check::coarsen(units, rows)?;
    Err(UNDONE)
}

pub(super) fn pick(_: &Cuda, slots: &Ragged<u32>, rows: &Floats) -> Result<Floats> {
    check::pick(slots, rows)?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&COUNT_NAN).into(), (&WEIGH).into(), (&RAISE).into()]
}
