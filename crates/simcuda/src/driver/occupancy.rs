//! How many blocks of a kernel an H100's multiprocessor holds: the occupancy rules of compute capability 9.0.

use super::abi::Out;
use super::attributes::{
    BLOCKS_PER_MULTIPROCESSOR, MULTIPROCESSORS, REGISTERS, SHARED_OPT_IN,
    SHARED_PER_MULTIPROCESSOR, SHARED_RESERVED, THREADS_PER_BLOCK, THREADS_PER_MULTIPROCESSOR,
};
use super::device;
use super::handle::{Handle, Kind};
use super::status::{Cu, Status};
use crate::ptx::Kernel;

/// Registers go to warps in units of 256, and to each of the four partitions on its own.
const REGISTER_UNIT: u32 = 256;
const PARTITIONS: u32 = 4;
const SHARED_UNIT: u32 = 128;

/// Warps of a kernel that fit into the registers of one multiprocessor.
pub fn warps_by_registers(kernel: &Kernel) -> u32 {
    let per_warp = (kernel.registers.max(1) * 32).next_multiple_of(REGISTER_UNIT);
    REGISTERS / PARTITIONS / per_warp * PARTITIONS
}

/// Threads of a kernel's largest block, by its `.maxntid` and registers.
pub fn max_threads(kernel: &Kernel) -> u32 {
    let declared = kernel.max_threads.map_or(THREADS_PER_BLOCK, |max| max.iter().product());
    declared.min(warps_by_registers(kernel) * 32).min(THREADS_PER_BLOCK)
}

/// Blocks that one multiprocessor holds at once.
pub(crate) fn resident_blocks(kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
    let warps = threads.div_ceil(32).max(1);
    let shared = kernel.shared_bytes.saturating_add(dynamic_shared).saturating_add(SHARED_RESERVED);
    if threads > max_threads(kernel) || shared - SHARED_RESERVED > SHARED_OPT_IN {
        return 0;
    }
    BLOCKS_PER_MULTIPROCESSOR
        .min(THREADS_PER_MULTIPROCESSOR / 32 / warps)
        .min(warps_by_registers(kernel) / warps)
        .min(SHARED_PER_MULTIPROCESSOR / shared.next_multiple_of(SHARED_UNIT))
}

/// Blocks that the device holds at once.
pub(crate) fn device_blocks(kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
    resident_blocks(kernel, threads, dynamic_shared) * MULTIPROCESSORS
}

/// CUoccupancyB2DSize.
type SharedOfThreads = extern "C" fn(i32) -> usize;

fn blocks(
    blocks: &Out<i32>,
    function: Handle,
    threads: i32,
    dynamic_shared: usize,
    flags: u32,
) -> Cu {
    let threads =
        u32::try_from(threads).ok().filter(|&threads| threads > 0).ok_or(Status::INVALID_VALUE)?;
    if flags > 1 {
        return Err(Status::INVALID_VALUE);
    }
    let device = device::owner(function, Kind::Function)?;
    let kernel = device.function(function)?.kernel();
    let dynamic_shared = u32::try_from(dynamic_shared).unwrap_or(u32::MAX);
    blocks.set(resident_blocks(kernel, threads, dynamic_shared) as i32)
}

/// The block size, a multiple of a warp, that keeps most threads resident; of equals, the largest.
fn best_block(
    grid: &Out<i32>,
    block: &Out<i32>,
    function: Handle,
    shared_of: Option<SharedOfThreads>,
    dynamic_shared: usize,
    limit: i32,
    flags: u32,
) -> Cu {
    let limit = u32::try_from(limit).map_err(|_| Status::INVALID_VALUE)?;
    if flags > 1 {
        return Err(Status::INVALID_VALUE);
    }
    let module = {
        let device = device::owner(function, Kind::Function)?;
        let found = device.function(function)?;
        (found.module.clone(), found.kernel)
    };
    // The callback is the caller's code: the lock is not held.
    let kernel = &module.0.module.kernels[module.1];
    let most = max_threads(kernel).min(if limit == 0 { THREADS_PER_BLOCK } else { limit });
    let mut best = (0, 0, 0);
    for threads in (1..=most.div_ceil(32)).rev().map(|warps| (warps * 32).min(most)) {
        let shared = shared_of.map_or(dynamic_shared, |shared_of| shared_of(threads as i32));
        let resident = resident_blocks(kernel, threads, u32::try_from(shared).unwrap_or(u32::MAX));
        if resident * threads > best.0 {
            best = (resident * threads, resident, threads);
        }
    }
    grid.set((best.1 * MULTIPROCESSORS) as i32)?;
    block.set(best.2 as i32)
}

entries! {
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        count: Out<i32>, function: Handle, threads: i32, dynamic_shared: usize
    ) {
        blocks(&count, function, threads, dynamic_shared, 0)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        count: Out<i32>, function: Handle, threads: i32, dynamic_shared: usize, flags: u32
    ) {
        blocks(&count, function, threads, dynamic_shared, flags)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(
        bytes: Out<usize>, function: Handle, blocks: i32, threads: i32
    ) {
        if blocks <= 0 || threads <= 0 {
            return Err(Status::INVALID_VALUE);
        }
        let device = device::owner(function, Kind::Function)?;
        let kernel = device.function(function)?.kernel();
        if resident_blocks(kernel, threads as u32, 0) < blocks as u32 {
            return Err(Status::INVALID_VALUE);
        }
        let share = SHARED_PER_MULTIPROCESSOR / blocks as u32 / SHARED_UNIT * SHARED_UNIT;
        let room = share.saturating_sub(SHARED_RESERVED).min(SHARED_OPT_IN);
        bytes.set(room.saturating_sub(kernel.shared_bytes) as usize)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<i32>, block: Out<i32>, function: Handle, shared_of: Option<SharedOfThreads>,
        dynamic_shared: usize, limit: i32
    ) {
        best_block(&grid, &block, function, shared_of, dynamic_shared, limit, 0)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<i32>, block: Out<i32>, function: Handle, shared_of: Option<SharedOfThreads>,
        dynamic_shared: usize, limit: i32, flags: u32
    ) {
        best_block(&grid, &block, function, shared_of, dynamic_shared, limit, flags)
    }
}
