//! Smoothing of scores: launches `kernels/pool.cu`.

use super::driver::Ptr;
use super::launch::{Grid, Kernel};
use super::{Cuda, Floats, check};
use crate::backend::ops::{Pool, Pooling};
use crate::error::{Error, Result};

/// `pool_avg`, `pool_max`: in, out, lengths, radius.
const POOL: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>, i32)> = Kernel::new("pool", "pool");
/// Slots of a tile, and the largest radius: what the kernel's shared memory holds.
const TILE: u32 = 1024;
const RADIUS: u32 = 64;

/// What a launch pools: tables of rows on the device, and how many there are. The output is not the input.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables {
    pub from: Ptr<Ptr<f32>>,
    pub to: Ptr<Ptr<f32>>,
    /// Slots that take part, the first ones of each row.
    pub lengths: Ptr<u32>,
    pub rows: usize,
    /// At least the largest of the lengths.
    pub longest: u32,
}

/// Pools what takes part; the rest of the output stays. Allocates nothing.
pub(super) fn launch(cuda: &Cuda, kind: Pooling, kernel: u32, tables: Tables) -> Result<()> {
    let radius = kernel / 2;
    if radius > RADIUS {
        let (got, limit) = (kernel.into(), u64::from(2 * RADIUS + 1));
        return Err(Error::TooLarge { what: "pooling kernel on CUDA", got, limit });
    }
    let Tables { from, to, lengths, rows, longest } = tables;
    let grid = Grid::new(longest.div_ceil(TILE) as usize, rows, 256);
    let variant = match kind {
        Pooling::Avg => "avg",
        Pooling::Max => "max",
    };
    POOL.launch(&cuda.driver, variant, grid, (from, to, lengths, radius as i32))
}

pub(super) fn run(cuda: &Cuda, op: &Pool<'_>, rows: &mut Floats) -> Result<()> {
    check::pool(op, rows)?;
    // What takes part is pooled into a copy; the rest of each row is already there.
    let out = rows.slice(cuda, 0..rows.lens().len())?;
    let mut table = super::floats::Table::default();
    let lens = table.push(op.lens);
    let sent = table.send(cuda)?;
    let tables = Tables {
        from: rows.rows(),
        to: out.rows(),
        lengths: sent.at(lens),
        rows: op.lens.len(),
        longest: op.lens.iter().copied().max().unwrap_or(0),
    };
    launch(cuda, op.kind, op.kernel, tables)?;
    *rows = out;
    Ok(())
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&POOL).into()]
}
