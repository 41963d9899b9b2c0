//! Seeded bugs in the shipped PTX: each must be caught, by the check whose class names its cause, by the reference, or
//! by a counter. The suite tries each until a policy catches it. The whole, each under every policy, takes minutes:
//! `cargo test -p simcuda --test kernels -- --ignored`, and MUTANTS.md must agree with it; `SIMCUDA_BLESS=1` writes it.
//!
//! A mutant is an edit of the PTX text. A pattern's blank matches any white space, and `$1` to `$9` match one operand,
//! so that an edit names no register. The number of its occurrences is part of it: an edit that no longer fits the
//! PTX fails loudly.

mod edit;
mod table;

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use simcuda::{Class, Installed, Policy};

use crate::gpu::{self, Drive, Gpu};
use crate::patterns;
use table::{MUTANTS, Mutant};

/// What stopped a mutant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caught {
    /// A check.
    By(Class),
    /// The result was wrong.
    Reference,
    /// The result was right, memory was touched wastefully.
    Counter,
}

/// Runs a mutant's tests on a device of its own: a thread's devices are its own.
fn run(ptx: &str, drive: Drive, policy: Policy, count: bool) -> Option<(Caught, String)> {
    let body = || {
        let device = simcuda::device();
        let outcome = Gpu::new(device, ptx, policy)
            .and_then(|gpu| drive(&gpu).and_then(|()| Ok(gpu.stream.synchronize()?)));
        if let Some(report) = simcuda::reports(device).first() {
            // Edits are in the PTX, the place is still one of the CUDA source.
            let source = report.source.as_deref().unwrap_or_default();
            assert!(
                source.contains(".cu"),
                "a line of a kernel expected, {source:?} came: {report}"
            );
            return Some((Caught::By(report.class), report.message.clone()));
        }
        match outcome {
            Err(gpu::Failure::Wrong(difference)) => Some((Caught::Reference, difference)),
            Err(failure) => panic!("no report, but {failure}"),
            Ok(()) if !count => None,
            Ok(()) => {
                let waste =
                    patterns::waste(|kernel| simcuda::counters(device, kernel)).unwrap_or_default();
                waste.map(|waste| (Caught::Counter, waste))
            }
        }
    };
    std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// By what a mutant is caught, policy by policy, or until it is caught.
fn try_out(mutant: &Mutant, all: bool) -> Result<Vec<Option<Caught>>, String> {
    let ptx = edit::apply(mutant.ptx, mutant.edits)?;
    let count = mutant.expected.contains(&Caught::Counter);
    let mut results = Vec::new();
    for (i, policy) in (1..).zip(gpu::policies()) {
        let caught = run(&ptx, mutant.drive, policy, count);
        if let Some((caught, message)) = &caught
            && !mutant.expected.contains(caught)
        {
            let expected = mutant.expected;
            return Err(format!(
                "{expected:?} expected, {caught:?} came under policy {i}: {message}"
            ));
        }
        results.push(caught.map(|(caught, _)| caught));
        if !all && results.last().is_some_and(Option::is_some) {
            break;
        }
    }
    if results.iter().all(Option::is_none) {
        return Err(format!("{:?} expected, nothing came", mutant.expected));
    }
    Ok(results)
}

/// What caught each mutant, in their order; fails if one was not, or not for its cause.
fn try_each(all: bool) -> Vec<Vec<Option<Caught>>> {
    let results: Vec<_> = MUTANTS.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((mutant, result)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    MUTANTS.get(i).zip(results.get(i))
                } {
                    *result.lock().expect("no worker panics") = Some(try_out(mutant, all));
                }
            });
        }
    });
    let mut missed = Vec::new();
    let mut caught = Vec::new();
    for (mutant, result) in MUTANTS.iter().zip(results) {
        match result.into_inner().expect("no worker panics").expect("every mutant ran") {
            Ok(by) => caught.push(by),
            Err(why) => missed.push(format!("{}, {}: {why}", mutant.kernel, mutant.bug)),
        }
    }
    assert!(missed.is_empty(), "{} of {}:\n{}", missed.len(), MUTANTS.len(), missed.join("\n"));
    caught
}

#[test]
fn every_mutant_is_caught_for_its_cause() {
    if simcuda::install() == Installed::RealDriver {
        println!("mutants would only break a real device: not run");
        return;
    }
    try_each(false);
}

#[test]
#[ignore = "minutes: every mutant under every policy"]
fn every_mutant_under_every_policy() {
    assert_eq!(simcuda::install(), Installed::Simulated, "mutants would only break a real device");
    let mut table = String::from(
        "# Seeded bugs and what caught them\n\nWritten by `SIMCUDA_BLESS=1 cargo test -p simcuda --test kernels -- --ignored`.\nThe columns are the policies of `tests/kernels/gpu.rs`.\n\n| kernel \
         | bug | 1 | 2 | 3 | 4 | 5 | 6 |\n|---|---|---|---|---|---|---|---|\n",
    );
    for (mutant, caught) in MUTANTS.iter().zip(try_each(true)) {
        write!(table, "| {} | {} |", mutant.kernel, mutant.bug).expect("to a string");
        for caught in caught {
            match caught {
                Some(Caught::By(class)) => write!(table, " {class:?} |"),
                Some(other) => write!(table, " {other:?} |"),
                None => write!(table, " |"),
            }
            .expect("to a string");
        }
        table.push('\n');
    }

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/MUTANTS.md");
    if std::env::var_os("SIMCUDA_BLESS").is_some() {
        std::fs::write(path, &table).expect("MUTANTS.md can be written");
    }
    assert_eq!(
        std::fs::read_to_string(path).unwrap_or_default(),
        table,
        "MUTANTS.md; SIMCUDA_BLESS=1 rewrites it"
    );
}

/// Unedited, the PTX passes what its mutants must not.
#[test]
fn what_is_shipped_survives() {
    if simcuda::install() == Installed::RealDriver {
        return;
    }
    let counting = MUTANTS.iter().filter(|mutant| mutant.expected.contains(&Caught::Counter));
    for mutant in counting {
        assert_eq!(
            run(mutant.ptx, mutant.drive, Policy::default(), true),
            None,
            "{}",
            mutant.kernel
        );
    }
}
