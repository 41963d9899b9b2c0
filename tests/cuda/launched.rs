//! Every kernel that ships is launched by a test: what nothing launches is checked by nobody.

use std::collections::BTreeSet;

use kvbudget_testkit::suite;
use simcuda::{Checks, Installed, Policy};

use crate::cache::{decode, drives};
use crate::device::Gpu;
use crate::{pooled, speed};

/// What the suite does not reach: caches, and what is no operation of [`kvbudget::backend::Backend`].
const OTHERS: [fn(&Gpu); 7] = [
    drives::append,
    drives::gather,
    drives::slide,
    drives::fill,
    decode::step,
    pooled::averages,
    pooled::maxima,
];

#[test]
#[ignore = "minutes: every case of the suite once more"]
fn every_kernel_is_launched_by_a_case() {
    if simcuda::install() == Installed::RealDriver {
        return;
    }
    let mut missing: BTreeSet<String> = speed::manifest().into_keys().collect();
    let all = missing.len();
    // What the checks find is the cases' own business.
    let checks = Checks { init: false, race: false };
    let cases = suite::cases::<Gpu>().into_iter().map(|(_, case)| case).chain(OTHERS);
    for case in cases {
        // A thread's devices are its own, and come back with it.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let gpu = Gpu::under(Policy { checks, ..Policy::default() });
                case(&gpu);
                missing.retain(|kernel| simcuda::counters(gpu.ordinal, kernel).0 == 0);
            });
        });
    }
    assert!(missing.is_empty(), "of {all} kernels no case launches {missing:?}");
}
