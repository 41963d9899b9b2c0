//! Every backend does what the contract says: the suite of the test kit, one line per backend.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kvbudget::backend::cpu::{Cpu, Isa};
use kvbudget_testkit::mutate::{Mutation, Tampered};
use kvbudget_testkit::{conformance, suite};

conformance!(cpu, Cpu::new());
// What other machines have, as far as this one does.
conformance!(cpu_avx512, Cpu::new().with_isa(Isa::Avx512));
conformance!(cpu_avx2_three_threads, threads(3).with_isa(Isa::Avx2));
conformance!(cpu_portable_one_thread, threads(1).with_isa(Isa::Portable));

fn threads(n: usize) -> Cpu {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
    Cpu::with_pool(Arc::new(pool.expect("threads can be started")))
}

/// Not a tolerance: whatever the number of threads, each result of the whole suite has the same bits.
#[test]
fn results_do_not_depend_on_threads() {
    for (name, case) in suite::cases::<Tampered>() {
        let notes = [1, 3].map(|n| {
            let cpu = Tampered::honest(threads(n));
            case(&cpu);
            cpu.notes()
        });
        for (i, other) in notes.iter().enumerate() {
            assert!(*other == notes[0], "{name}: bits differ on {} threads", [1, 3][i]);
        }
    }
}

/// The judge on trial: each case, with one result wrong in one element, must fail.
#[test]
fn every_case_notices_one_wrong_element() {
    let mut blind = Vec::new();
    for (name, case) in suite::cases::<Tampered>() {
        let honest = Tampered::honest(Cpu::new());
        case(&honest);
        let possible = Mutation::ALL.into_iter().filter(|&m| honest.chances(m) > 0);
        let mut tried = 0;
        for mutation in possible {
            let chances = honest.chances(mutation);
            for at in BTreeSet::from([0, chances / 2, chances - 1]) {
                tried += 1;
                let wrong = Tampered::new(Cpu::new(), mutation, at);
                if catch_unwind(AssertUnwindSafe(|| case(&wrong))).is_ok() {
                    blind.push(format!("{name}: {mutation:?} of result {at} of {chances}"));
                }
            }
        }
        assert!(tried > 0, "{name} compares nothing");
    }
    assert!(blind.is_empty(), "passed though wrong:\n{}", blind.join("\n"));
}
