//! Seeded bugs in the shipped PTX: each must be caught, by the check whose class names its cause, by the reference, or
//! by a counter. The suite tries each until a policy catches it. The whole, each under every policy, takes minutes:
//! `cargo test --test cuda -- --ignored`, and MUTANTS.md must agree with it; `SIMCUDA_BLESS=1` writes it.
//!
//! A mutant is an edit of the PTX text that the backend is given in place of the shipped one. A pattern's blank matches
//! any white space, and `$1` to `$9` match one operand, so that an edit names no register. The number of its
//! occurrences is part of it: an edit that no longer fits the PTX fails loudly.

mod append;
mod attend;
mod attention_spread;
mod compact;
mod edit;
mod expected_attention;
mod gather;
mod key_scores;
mod lag;
mod pool;
mod projection;
mod rank;
mod residual;
mod rows;
mod saliency;
mod top_k;
mod value_gram;
mod value_norm;
mod window_attention;

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvbudget::backend::cuda::Cuda;
use simcuda::{Class, Counters, Installed, Policy};

use crate::device::{Gpu, policies};
use edit::Edit;

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

/// A bug, and what it is tried on: usually a case of the conformance suite, which panics where a result is wrong.
pub struct Mutant {
    pub file: &'static str,
    pub kernel: &'static str,
    pub bug: &'static str,
    pub drive: fn(&Gpu),
    pub edits: &'static [Edit],
    pub expected: &'static [Caught],
}

const MUTANTS: &[&[Mutant]] = &[
    append::MUTANTS,
    attend::MUTANTS,
    attention_spread::MUTANTS,
    compact::MUTANTS,
    expected_attention::MUTANTS,
    gather::MUTANTS,
    key_scores::MUTANTS,
    lag::MUTANTS,
    pool::MUTANTS,
    projection::MUTANTS,
    rank::MUTANTS,
    residual::MUTANTS,
    rows::MUTANTS,
    saliency::MUTANTS,
    top_k::MUTANTS,
    value_gram::MUTANTS,
    value_norm::MUTANTS,
    window_attention::MUTANTS,
];

/// `file, drive { kernel: "bug", [which, of] "find" => "with", …; expected, …; }` as a list of [`Mutant`]s.
macro_rules! mutants {
    ($($file:literal, $drive:expr => {
        $($kernel:literal: $bug:literal, $([$which:expr, $of:literal] $find:expr => $with:expr),+; $($expected:expr),+;)*
    })*) => {
        pub const MUTANTS: &[$crate::mutants::Mutant] = &[$($($crate::mutants::Mutant {
            file: $file,
            kernel: $kernel,
            bug: $bug,
            drive: $drive,
            edits: &[$($crate::mutants::edit::Edit {
                kernel: $kernel, find: $find, with: $with, which: $which, of: $of,
            }),+],
            expected: &[$($expected),+],
        },)*)*];
    };
}
use mutants;

// Names for the tables.
const UNINITIALISED: Caught = Caught::By(Class::Uninitialised);
const RACE: Caught = Caught::By(Class::Race);

/// Executes `bar.sync 0` in some lanes of the second warp only.
const PART_OF_A_WARP: &str = "{ .reg .pred %few; .reg .b32 %thread; mov.u32 %thread, %tid.x; \
    setp.lt.u32 %few, %thread, 40; @%few bar.sync 0; }";

fn shipped(file: &str) -> String {
    let path = format!("{}/kernels/ptx/{file}.ptx", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What catches a PTX on a device of its own: a thread's devices are its own.
fn run(mutant: &Mutant, ptx: &str, policy: Policy) -> Option<(Caught, String)> {
    let body = || {
        let ordinal = simcuda::device();
        simcuda::set_policy(ordinal, policy);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let cuda = Cuda::new(ordinal).expect("a device").with_ptx(mutant.file, ptx);
            let gpu = std::mem::ManuallyDrop::new(Gpu { cuda, ordinal });
            (mutant.drive)(&gpu);
            gpu.cuda.synchronize().expect("nothing fails after the results");
        }));
        if let Some(report) = simcuda::reports(ordinal).first() {
            // Edits are in the PTX, the place is still one of the CUDA source; but for what the host reads back.
            let source = report.source.as_deref().unwrap_or(".cu");
            assert!(
                source.contains(".cu"),
                "a line of a kernel expected, {source:?} came: {report}"
            );
            return Some((Caught::By(report.class), report.message.clone()));
        }
        if let Err(panic) = outcome {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            return Some((Caught::Reference, text));
        }
        let counts = mutant.expected.contains(&Caught::Counter);
        let waste =
            counts.then(|| waste(mutant.kernel, simcuda::counters(ordinal, mutant.kernel).1));
        waste.flatten().map(|waste| (Caught::Counter, waste))
    };
    std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What a kernel wastes: bank conflicts, or bytes of the sectors that it stores.
fn waste(kernel: &str, c: Counters) -> Option<String> {
    let kinds = [
        ("wavefronts of shared loads", c.shared_load.wavefronts, c.shared_load.ideal_wavefronts),
        ("wavefronts of shared stores", c.shared_store.wavefronts, c.shared_store.ideal_wavefronts),
        ("sectors stored", c.global_store.sectors, c.global_store.ideal_sectors),
    ];
    let wasted = kinds.into_iter().find(|(_, actual, ideal)| actual != ideal);
    wasted.map(|(what, actual, ideal)| format!("{kernel}: {actual} {what}, {ideal} would do"))
}

/// By what a mutant is caught, policy by policy, or until it is caught.
fn try_out(mutant: &Mutant, all: bool) -> Result<Vec<Option<Caught>>, String> {
    let ptx = edit::apply(&shipped(mutant.file), mutant.edits)?;
    let mut results = Vec::new();
    for (i, policy) in (1..).zip(policies()) {
        let caught = run(mutant, &ptx, policy);
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
fn try_each(all: bool) -> Vec<(&'static Mutant, Vec<Option<Caught>>)> {
    let mutants: Vec<&Mutant> = MUTANTS.iter().copied().flatten().collect();
    let results: Vec<_> = mutants.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((mutant, result)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    mutants.get(i).zip(results.get(i))
                } {
                    *result.lock().expect("no worker panics") = Some(try_out(mutant, all));
                }
            });
        }
    });
    let mut missed = Vec::new();
    let mut caught = Vec::new();
    for (mutant, result) in mutants.iter().zip(results) {
        match result.into_inner().expect("no worker panics").expect("every mutant ran") {
            Ok(by) => caught.push((*mutant, by)),
            Err(why) => missed.push(format!("{}, {}: {why}", mutant.kernel, mutant.bug)),
        }
    }
    assert!(missed.is_empty(), "{} of {}:\n{}", missed.len(), mutants.len(), missed.join("\n"));
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
        "# Seeded bugs and what caught them\n\nWritten by `SIMCUDA_BLESS=1 cargo test --test cuda -- --ignored`. The \
         columns are the policies of `tests/cuda/device.rs`.\n\n| kernel | bug | 1 | 2 | 3 | 4 | 5 | 6 \
         |\n|---|---|---|---|---|---|---|---|\n",
    );
    for (mutant, caught) in try_each(true) {
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

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda/MUTANTS.md");
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
    for mutant in MUTANTS.iter().copied().flatten() {
        if mutant.expected.contains(&Caught::Counter) {
            let caught = run(mutant, &shipped(mutant.file), Policy::default());
            assert_eq!(caught, None, "{}", mutant.kernel);
        }
    }
}
