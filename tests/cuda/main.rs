//! The CUDA backend on a GPU or the simulator: everything the contract says, and what only a device can get wrong.

mod bits;
mod cache;
mod device;
mod errors;
mod informed;
mod launched;
mod mutants;
mod planner;
mod pooled;
mod projection;
mod reference;
mod speed;
mod window_attention;

use device::Gpu;
use kvbudget_testkit::{conformance, suite};

conformance!(cuda, Gpu::new());
// Each case once more as the hardware is free to run it otherwise.
conformance!(cuda_otherwise, Gpu::under(one_of_the_policies()));

/// The same for a test every time, another for the next.
fn one_of_the_policies() -> simcuda::Policy {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or_default();
    device::policies()[name.bytes().map(usize::from).sum::<usize>() % 6]
}

/// Every case under every policy.
#[test]
#[ignore = "minutes"]
fn every_case_under_every_policy() {
    for (name, case) in suite::cases::<Gpu>() {
        for policy in device::policies() {
            println!("{name} under {policy:?}");
            case(&Gpu::under(policy));
        }
    }
}
