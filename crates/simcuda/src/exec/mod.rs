//! Running a kernel: blocks and warps of one launch on one thread, so that a launch is deterministic and free of host
//! races; tests run in parallel instead.
//!
//! * [`grid`](self): which block runs when, under a [`Schedule`]; reports.
//! * `block`: warps of a block, barriers, shared memory.
//! * `warp`: the lanes of a warp: divergence, convergence and the instruction loop.
//! * `taint`: registers, and what of them was written.
//! * `moves`, `access`, `async_copy`, `atomic`, `sync`, `call`: what instructions do that are no table entry of `alu`.

mod access;
pub mod alu;
mod async_copy;
mod atomic;
mod block;
mod call;
mod grid;
mod moves;
pub mod registers;
mod sync;
mod taint;
mod warp;

pub use grid::run;

use crate::memory::OpOrder;
use crate::ptx::Kernel;
use crate::{Counters, Report};

/// Shared, local and parameter memory have windows in the generic address space; everything else is global. Device
/// addresses are host addresses below 2^47, so the windows cannot meet them. The low halves are zero: a generic
/// shared address cut to 32 bits is the shared address.
const SHARED_WINDOW: u64 = 1 << 56;
const LOCAL_WINDOW: u64 = 2 << 56;
const PARAM_WINDOW: u64 = 3 << 56;

/// A kernel launch.
#[derive(Debug)]
pub struct Launch<'a> {
    pub kernel: &'a Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_shared: u32,
    /// The parameter space, laid out as `kernel.params` says.
    pub params: &'a [u8],
    /// Its place in the order of stream work.
    pub op: OpOrder,
}

/// What a launch did.
#[derive(Debug)]
pub struct Outcome {
    pub counters: Counters,
    /// The first finding; the launch stopped there.
    pub report: Option<Report>,
    /// What `printf` wrote.
    pub printed: String,
}
