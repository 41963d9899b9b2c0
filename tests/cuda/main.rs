//! The CUDA backend on a GPU or the simulator: everything the contract says, and what only a device can get wrong.

mod device;

use device::Gpu;
use kvbudget_testkit::conformance;

conformance!(cuda, Gpu::new());
