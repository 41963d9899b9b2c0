//! A GPU for one test: the simulator's, or with `SIMCUDA=0` the machine's.

use kvbudget::backend::cuda::{Cuda, DeviceSlice, Tensor};
use kvbudget_testkit::data::{Elements, TestDevice};
use simcuda::Policy;

/// A device that only this test has. Dropped, it fails if a check of the simulator has found something.
pub struct Gpu {
    pub cuda: Cuda,
    pub ordinal: usize,
}

impl Gpu {
    pub fn new() -> Self {
        Self::under(Policy::default())
    }

    /// A device whose work runs as `policy` says.
    pub fn under(policy: Policy) -> Self {
        simcuda::install();
        let ordinal = simcuda::device();
        simcuda::set_policy(ordinal, policy);
        let cuda = Cuda::new(ordinal).expect("a device");
        Self { cuda, ordinal }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What failed already says why, but for what a check knows better.
        let reports = simcuda::reports(self.ordinal);
        for report in &reports {
            eprintln!("{report}");
        }
        assert!(reports.is_empty() || std::thread::panicking(), "the checks found something");
    }
}

impl TestDevice for Gpu {
    type Backend = Cuda;
    type Memory = Tensor;
    fn backend(&self) -> &Cuda {
        &self.cuda
    }
    fn upload(&self, elements: &Elements) -> Tensor {
        let tensor = match elements {
            Elements::F32(e) => self.cuda.tensor(e),
            Elements::F16(e) => self.cuda.tensor(e),
            Elements::BF16(e) => self.cuda.tensor(e),
        };
        tensor.expect("a tensor can be copied")
    }
    fn lend<'a>(&self, memory: &'a Tensor) -> DeviceSlice<'a> {
        memory.lend()
    }
}
