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

pub(super) fn run(cuda: &Cuda, op: &Pool<'_>, rows: &mut Floats) -> Result<()> {
    check::pool(op, rows)?;
    let radius = op.kernel / 2;
    if radius > RADIUS {
        let (got, limit) = (op.kernel.into(), u64::from(2 * RADIUS + 1));
        return Err(Error::TooLarge { what: "pooling kernel on CUDA", got, limit });
    }
    // What takes part is pooled into a copy; the rest of each row is already there.
    let out = rows.slice(cuda, 0..rows.lens().len())?;
    let mut table = super::floats::Table::default();
    let lens = table.push(op.lens);
    let sent = table.send(cuda)?;
    let longest = op.lens.iter().copied().max().unwrap_or(0);
    let grid = Grid::new(longest.div_ceil(TILE) as usize, op.lens.len(), 256);
    let variant = match op.kind {
        Pooling::Avg => "avg",
        Pooling::Max => "max",
    };
    let arguments = (rows.rows(), out.rows(), sent.at(lens), radius as i32);
    POOL.launch(&cuda.driver, variant, grid, arguments)?;
    *rows = out;
    Ok(())
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&POOL).into()]
}
