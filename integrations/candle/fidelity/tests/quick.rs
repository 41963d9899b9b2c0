//! The quick mode end to end on the real model: what must hold whatever the numbers are.
//!
//! Needs the weights, so it is ignored unless asked for:
//! `KVBUDGET_SMOLLM2=<gguf> cargo test --release -- --ignored`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kvbudget_fidelity::record::{Measured, Record};
use kvbudget_fidelity::store;

/// Removed when the test is through, whatever its end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn quick(folder: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fidelity"))
        .args(["run", "--quick", "--out"])
        .arg(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs KVBUDGET_SMOLLM2, see scripts/fetch-smollm2"]
fn quick_mode() {
    assert!(std::env::var_os("KVBUDGET_SMOLLM2").is_some(), "KVBUDGET_SMOLLM2 names no GGUF file");
    let folder =
        Folder(std::env::temp_dir().join(format!("fidelity-quick-{}", std::process::id())));
    let start = Instant::now();
    quick(&folder.0);
    let took = start.elapsed();
    eprintln!("quick mode: {took:?}");
    assert!(took < Duration::from_secs(180), "{took:?}");

    let records = store::load(&folder.0).unwrap();
    a_budget_of_everything_changes_nothing(&records);
    compression_costs_something(&records);
    every_sample_is_reported(&folder.0, &records);

    // Done is done: no worker starts, no file is added.
    let files = || fs::read_dir(&folder.0).unwrap().count();
    let before = files();
    assert!(quick(&folder.0).contains("0 with work left"));
    assert_eq!(files(), before);

    // What was cut off is measured again, and nothing else.
    let path = folder.0.join("run-000.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 100]).unwrap();
    assert!(quick(&folder.0).contains("1 with work left"));
    assert_eq!(store::load(&folder.0).unwrap().len(), records.len());
}

fn a_budget_of_everything_changes_nothing(records: &[Record]) {
    for record in records {
        let full = record.outcomes.iter().find(|o| o.variant.is_full()).unwrap();
        let everything = record.outcomes.iter().filter(|o| o.variant.budget == "100%");
        assert_eq!(everything.clone().count(), 4);
        for outcome in everything {
            assert_eq!(outcome.slots, full.slots);
            match (&outcome.measured, &full.measured) {
                (Measured::Answer { text, .. }, Measured::Answer { text: expected, .. }) => {
                    assert_eq!(text, expected, "{:?}", outcome.variant);
                }
                (
                    Measured::Continuation { loss, errors },
                    Measured::Continuation { loss: expected, .. },
                ) => {
                    // The same numbers in the same order, up to the shape of the batch's matrix products.
                    assert!((loss - expected).abs() < 1e-4, "{:?}: {loss}", outcome.variant);
                    assert!(errors.iter().all(|&e| e < 1e-5), "{:?}: {errors:?}", outcome.variant);
                }
                (one, other) => panic!("{one:?} beside {other:?}"),
            }
        }
    }
}

fn compression_costs_something(records: &[Record]) {
    let losses: Vec<(f64, f64)> = records
        .iter()
        .flat_map(|record| {
            let loss = |budget: &str| {
                let of = record.outcomes.iter().find(|o| {
                    o.variant.budget == budget
                        && matches!(o.variant.policy.as_str(), "full" | "streaming")
                });
                match of.map(|o| &o.measured) {
                    Some(Measured::Continuation { loss, .. }) => Some(*loss),
                    _ => None,
                }
            };
            loss("100%").zip(loss("20%"))
        })
        .collect();
    assert_eq!(losses.len(), 3);
    assert!(losses.iter().all(|(full, streaming)| streaming > full), "{losses:?}");
}

fn every_sample_is_reported(folder: &Path, records: &[Record]) {
    // 3 seeds of 3 tasks in 2 modes and of the continuation; the full cache and 3 policies at 2 budgets.
    assert_eq!(records.len(), 3 * (3 * 2 + 1));
    assert!(records.iter().all(|r| r.outcomes.len() == 7));
    let text = fs::read_to_string(folder.join("results.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let samples: Vec<Record> = serde_json::from_value(report["samples"].clone()).unwrap();
    assert_eq!(samples, records);
    for name in ["results.md", "answers-256-agnostic.svg", "answers-256-aware.png", "loss-256.svg"]
    {
        assert!(fs::metadata(folder.join(name)).unwrap().len() > 500, "{name}");
    }
}
