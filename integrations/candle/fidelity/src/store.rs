//! The folder of results: JSON lines, only ever appended to, by as many runs as it takes.
//!
//! A run that is cut off leaves at most one broken line at the end of its file; what it held is measured again.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::record::{Item, Mode, Order, Record};
use crate::variant::Variant;

/// All records of a folder, in the order of file names and lines.
pub fn load(folder: &Path) -> Result<Vec<Record>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|suffix| suffix == "jsonl") {
            files.push(path);
        }
    }
    files.sort();
    let mut records = Vec::new();
    for path in files {
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        parse(&text, &mut records).with_context(|| path.display().to_string())?;
    }
    Ok(records)
}

/// Adds the records of a file. A last line that does not end was being written when its run was cut off.
fn parse(text: &str, records: &mut Vec<Record>) -> Result<()> {
    for (number, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with('\n') => {}
            Err(error) => bail!("line {}: {error}", number + 1),
        }
    }
    Ok(())
}

/// A new file of the folder, for the records of one run.
pub fn create(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    for number in 0.. {
        let path = folder.join(format!("run-{number:03}.jsonl"));
        match File::create_new(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            result => return result.with_context(|| format!("creating {}", path.display())),
        }
    }
    bail!("no name is left for a file in {}", folder.display())
}

/// Appends a record in one write, so that it is there or not.
pub fn append(file: &mut File, record: &Record) -> Result<()> {
    let mut line = serde_json::to_string(record)?;
    line.push('\n');
    file.write_all(line.as_bytes()).context("writing results")
}

/// What is left of `items` in `modes` with `variants`, given what is there.
pub fn missing(
    records: &[Record],
    items: &[Item],
    modes: &[Mode],
    variants: &[Variant],
) -> Vec<Order> {
    let mut done: HashMap<(Item, Mode), HashSet<&Variant>> = HashMap::new();
    for record in records {
        let variants = record.outcomes.iter().map(|outcome| &outcome.variant);
        done.entry((record.item, record.mode)).or_default().extend(variants);
    }
    let mut orders = Vec::new();
    for &item in items {
        let mut runs = Vec::new();
        for &mode in item.task.modes(modes) {
            let there = done.get(&(item, mode));
            let left = variants.iter().filter(|v| !there.is_some_and(|set| set.contains(v)));
            let left: Vec<Variant> = left.cloned().collect();
            if !left.is_empty() {
                runs.push((mode, left));
            }
        }
        if !runs.is_empty() {
            orders.push(Order { item, runs });
        }
    }
    orders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Measured, Outcome, Seconds};
    use crate::tasks::Task;

    const BOTH: [Mode; 2] = [Mode::Agnostic, Mode::Aware];

    fn variant(policy: &str) -> Variant {
        Variant { policy: policy.to_owned(), budget: "5%".to_owned() }
    }

    fn record(seed: u64, mode: Mode, policies: &[&str]) -> Record {
        let outcome = |policy: &&str| Outcome {
            variant: variant(policy),
            slots: 7,
            measured: Measured::Answer { correct: true, text: " 1\n".to_owned() },
        };
        Record {
            item: Item { task: Task::Needle, length: 64, seed },
            mode,
            tokens: 64,
            outcomes: policies.iter().map(outcome).collect(),
            seconds: Seconds::default(),
        }
    }

    #[test]
    fn a_broken_last_line_is_dropped_and_any_other_named() {
        let line = serde_json::to_string(&record(1, Mode::Aware, &["tova"])).unwrap();
        let mut records = Vec::new();
        parse(&format!("{line}\n{}", &line[..40]), &mut records).unwrap();
        assert_eq!(records, [record(1, Mode::Aware, &["tova"])]);
        let error = parse(&format!("{}\n{line}\n", &line[..40]), &mut records).unwrap_err();
        assert!(error.to_string().starts_with("line 1"), "{error}");
    }

    #[test]
    fn only_what_is_missing_is_ordered() {
        let records = [
            record(0, Mode::Agnostic, &["tova", "knorm"]),
            record(0, Mode::Aware, &["tova"]),
            record(1, Mode::Agnostic, &["tova"]),
            record(1, Mode::Agnostic, &["knorm"]),
            record(1, Mode::Aware, &["knorm", "tova", "h2o"]),
        ];
        let items = [0, 1, 2].map(|seed| Item { task: Task::Needle, length: 64, seed });
        let variants = [variant("tova"), variant("knorm")];
        let orders = missing(&records, &items, &BOTH, &variants);
        assert_eq!(orders.len(), 2);
        assert_eq!((orders[0].item.seed, orders[1].item.seed), (0, 2));
        assert_eq!(orders[0].runs, [(Mode::Aware, vec![variant("knorm")])]);
        assert_eq!(orders[1].runs.len(), 2);
    }

    #[test]
    fn continuation_has_no_question_to_be_aware_of() {
        let items = [Item { task: Task::Continuation, length: 64, seed: 0 }];
        let orders = missing(&[], &items, &BOTH, &[variant("tova")]);
        assert_eq!(orders[0].runs.len(), 1);
    }

    #[test]
    fn files_are_never_overwritten() {
        let folder = std::env::temp_dir().join(format!("fidelity-store-{}", std::process::id()));
        for seed in 0..2 {
            append(&mut create(&folder).unwrap(), &record(seed, Mode::Aware, &["tova"])).unwrap();
        }
        let seeds: Vec<u64> = load(&folder).unwrap().iter().map(|r| r.item.seed).collect();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(seeds, [0, 1]);
    }
}
