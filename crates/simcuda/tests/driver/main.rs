//! The driver through unmodified cudarc: what it does, and what it refuses.
#![allow(unsafe_code, reason = "launches and the raw driver API")]

mod exports;
mod graphs;
mod refusals;
mod streams;
mod tour;

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use simcuda::{Class, Installed, Policy, Streams};

const PTX: &str = include_str!("kernels.ptx");

/// Calls a driver function.
macro_rules! cu {
    ($function:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: the arguments are what the function documents, or values that it must refuse: null, out of range,
        // handles of destroyed objects. Pointers are to locals that outlive the call.
        unsafe { cudarc::driver::sys::$function($($arg),*) }
    };
}
pub(crate) use cu;

/// A context on a device of this test's own.
fn context() -> (usize, Arc<CudaContext>) {
    simcuda::install();
    let device = simcuda::device();
    (device, CudaContext::new(device).unwrap())
}

/// Whether this crate is the driver. What only it can answer is not asked of a real one.
fn simulated() -> bool {
    let simulated = simcuda::install() == Installed::Simulated;
    if !simulated {
        eprintln!(
            "real driver: the part of this test about the simulator's own findings did not run"
        );
    }
    simulated
}

/// A context whose work runs late, in the order of this seed.
fn lazy(seed: u64) -> (usize, Arc<CudaContext>) {
    let (device, context) = context();
    simcuda::set_policy(device, Policy { streams: Streams::Lazy, seed, ..Policy::default() });
    (device, context)
}

fn function(context: &Arc<CudaContext>, name: &str) -> CudaFunction {
    context.load_module(Ptx::from_src(PTX)).unwrap().load_function(name).unwrap()
}

/// Launches a kernel without parameters.
fn launch_bare(
    stream: &CudaStream,
    function: &CudaFunction,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared: u32,
) -> Result<(), DriverError> {
    let config = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: shared };
    // SAFETY: the kernel has no parameters and touches no global memory.
    unsafe { stream.launch_builder(function).launch(config) }.map(drop)
}

/// Adds 1 to each number.
fn increment(
    stream: &CudaStream,
    function: &CudaFunction,
    data: &mut cudarc::driver::CudaSlice<u32>,
) {
    let n = data.len() as u32;
    let config = LaunchConfig {
        grid_dim: (n.div_ceil(128), 1, 1),
        block_dim: (128, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: a pointer to n numbers, and n.
    unsafe { stream.launch_builder(function).arg(data).arg(&n).launch(config) }.unwrap();
}

/// The classes of what was found.
fn classes(device: usize) -> Vec<Class> {
    simcuda::reports(device).iter().map(|report| report.class).collect()
}

/// The error of a call that must fail.
fn refused<T>(result: Result<T, DriverError>) -> CUresult {
    result.err().map_or(CUresult::CUDA_SUCCESS, |error| error.0)
}
