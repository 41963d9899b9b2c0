//! Smoothing of scores: launches `kernels/pool.cu`.

use super::driver::Ptr;
use super::launch::{Grid, Kernel};
use super::{Cuda, Floats, check};
use crate::backend::ops::{Pool, Pooling};
use crate::error::{Error, Result};

/// `pool_avg`, `pool_max`: in, out, lengths, radius.
const POOL: Kernel<(Ptr<Ptr<f32>>, Ptr<Ptr<f32>>, Ptr<u32>, u32)> = Kernel::new("pool", "pool");
/// Slots of a tile, and the largest radius: what the kernel's shared memory holds.
const TILE: u32 = 1024;
const RADIUS: u32 = 64;

pub(super) fn run(cuda: &Cuda, op: &Pool<'_>, rows: &mut Floats) -> Result<()> {
    check::pool(op, rows)?;
    let radius = radius(op.kernel)?;
    // What takes part is pooled into a copy; the rest of each row is already there.
    let out = rows.slice(cuda, 0..rows.lens().len())?;
    let mut table = super::floats::Table::default();
    let lens = table.push(op.lens);
    let sent = table.send(cuda)?;
    let longest = op.lens.iter().copied().max().unwrap_or(0);
    let grid = Grid::new(longest.div_ceil(TILE) as usize, op.lens.len(), 256);
    let arguments = (rows.rows(), out.rows(), sent.at(lens), radius);
    POOL.launch(&cuda.driver, variant(op.kind), grid, arguments)?;
    *rows = out;
    Ok(())
}

/// Slots to either side that a pooling kernel sees.
pub(super) fn radius(kernel: u32) -> Result<u32> {
    match kernel / 2 {
        radius if radius > RADIUS => {
            let (got, limit) = (kernel.into(), u64::from(2 * RADIUS + 1));
            Err(Error::TooLarge { what: "pooling kernel on CUDA", got, limit })
        }
        radius => Ok(radius),
    }
}

/// What kernels that pool are called.
pub(super) fn variant(kind: Pooling) -> &'static str {
    match kind {
        Pooling::Avg => "avg",
        Pooling::Max => "max",
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&POOL).into()]
}
