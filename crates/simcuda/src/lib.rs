//! A CUDA driver without a GPU: PTX runs on the CPU behind the driver API.
//!
//! Built as `libcuda.so`, which unmodified cudarc code opens after [`install`], and as this Rust library, which
//! tests use to install it and to ask for reports and counters. README.md says what is simulated, what is not, and
//! how to add an instruction.

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
    set_policy,
};
pub use policy::{Checks, CpAsync, MmaModel, Policy, Schedule, Streams};
pub use report::{Class, Report};
pub use roofline::{A100_SXM, Bound, Device, H100_SXM, Resource, Roofline};
