//! A GPU for one test: the simulator's, or with `SIMCUDA=0` the machine's.

use kvbudget::backend::cuda::{Cuda, DeviceSlice, Tensor};
use kvbudget_testkit::data::{Elements, TestDevice};
use simcuda::{CpAsync, MmaModel, Policy, Schedule, Streams};

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

/// Every schedule, both visibilities of asynchronous copies, all models of mma, exact and perturbed functions.
pub fn policies() -> [Policy; 6] {
    let policy = |schedule, cp_async, mma, perturb, streams, seed| Policy {
        schedule,
        cp_async,
        mma,
        perturb,
        streams,
        seed,
        ..Policy::default()
    };
    use {CpAsync::*, MmaModel::*, Schedule::*, Streams::*};
    [
        policy(InOrder, CpAsync::Late, Chain, false, Eager, 0),
        policy(Quantum(37), Early, Exact, true, Lazy, 1),
        policy(OneBlock, CpAsync::Late, Truncated, true, Eager, 2),
        policy(Random, Early, Truncated, false, Lazy, 3),
        policy(Random, CpAsync::Late, Exact, true, Eager, 4),
        policy(Quantum(1), CpAsync::Late, Chain, true, Eager, 5),
    ]
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
