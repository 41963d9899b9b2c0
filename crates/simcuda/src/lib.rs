//! A CUDA driver without a GPU: PTX runs on the CPU behind the driver API.
//!
//! Built as `libcuda.so`, which unmodified cudarc code opens after [`install`], and as this Rust library, which
//! tests use to install it and to ask for reports and counters. README.md says what is simulated, what is not, and
//! how to add an instruction.
//!
//! ```
//! use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
//!
//! simcuda::install();
//! let device = simcuda::device();
//! let context = CudaContext::new(device)?;
//! let module = context.load_module(cudarc::nvrtc::Ptx::from_src(
//!     ".version 8.0
//! .target sm_80
//! .address_size 64
//! .visible .entry double(.param .u64 numbers)
//! {
//!     .reg .b32 %r<3>;
//!     .reg .b64 %rd<4>;
//!     ld.param.u64 %rd1, [numbers];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     add.s32 %r2, %r2, %r2;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }",
//! ))?;
//! let (stream, kernel) = (context.default_stream(), module.load_function("double")?);
//! let mut numbers = stream.clone_htod(&[1u32, 2, 3, 4])?;
//! let launch = |threads| LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
//!
//! // SAFETY: four threads, four numbers.
//! unsafe { stream.launch_builder(&kernel).arg(&mut numbers).launch(launch(4)) }?;
//! assert_eq!(stream.clone_dtoh(&numbers)?, [2, 4, 6, 8]);
//! simcuda::assert_clean(device);
//!
//! # if simcuda::install() == simcuda::Installed::RealDriver { return Ok(()) }
//! // One thread too many. A GPU might not notice.
//! unsafe { stream.launch_builder(&kernel).arg(&mut numbers).launch(launch(5)) }?;
//! stream.synchronize().unwrap_err();
//! assert_eq!(simcuda::reports(device)[0].class, simcuda::Class::OutOfBounds);
//! # Ok::<(), cudarc::driver::DriverError>(())
//! ```

mod counters;
mod decode;
mod driver;
mod exec;
mod host;
mod memory;
mod num;
mod policy;
mod ptx;
mod report;
mod roofline;

pub use counters::Counters;
pub use host::{
    Installed, assert_clean, clear_counters, counters, device, install, printed, reports,
    set_policy, waits,
};
pub use policy::{Checks, CpAsync, MmaModel, Policy, Schedule, Streams};
pub use report::{Class, Report};
pub use roofline::{A100_SXM, Bound, Device, H100_SXM, Resource, Roofline};
