//! Retrieval: the share of answers found, mean over tasks, in settings where the full cache finds them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::samples::Samples;
use super::{Row, rows};
use crate::record::{Item, Measured, Mode};
use crate::tasks::Task;
use crate::variant::Variant;

/// The full cache must find at least this share of the answers, or a setting says nothing about compression.
const ABLE: f64 = 0.7;

/// One task at one length in one mode, under the full cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    pub length: usize,
    pub mode: Mode,
    pub task: Task,
    /// Share of answers that the full cache finds.
    pub full: f64,
    pub samples: usize,
    pub counts: bool,
}

/// All variants at one length in one mode.
#[derive(Debug, Serialize)]
pub struct Retrieval {
    pub length: usize,
    pub mode: Mode,
    /// One task alone, or none for the mean over the tasks that count.
    pub task: Option<Task>,
    pub rows: Vec<Row>,
}

pub fn settings(samples: &Samples<'_>) -> Vec<Setting> {
    let mut settings = Vec::new();
    for mode in [Mode::Agnostic, Mode::Aware] {
        let mut found: BTreeMap<(usize, Task), Vec<f64>> = BTreeMap::new();
        for (item, sample) in samples.of(mode, &Variant::full()) {
            if let Measured::Answer { correct, .. } = sample.measured {
                let key = (item.length, item.task);
                found.entry(key).or_default().push(f64::from(*correct));
            }
        }
        for ((length, task), found) in found {
            let full = found.iter().sum::<f64>() / found.len() as f64;
            let (samples, counts) = (found.len(), full >= ABLE);
            settings.push(Setting { length, mode, task, full, samples, counts });
        }
    }
    settings
}

pub fn retrieval(samples: &Samples<'_>, settings: &[Setting], baseline: &str) -> Vec<Retrieval> {
    let mut all = Vec::new();
    let blocks: BTreeSet<(usize, Mode)> = settings.iter().map(|s| (s.length, s.mode)).collect();
    for (length, mode) in blocks {
        let here = settings.iter().filter(|s| (s.length, s.mode) == (length, mode));
        let counting: Vec<Task> = here.clone().filter(|s| s.counts).map(|s| s.task).collect();
        let single = here.map(|s| (Some(s.task), vec![s.task]));
        for (task, tasks) in [(None, counting)].into_iter().chain(single) {
            let wanted = |item: &Item| item.length == length && tasks.contains(&item.task);
            let variants = samples.kept(mode, wanted);
            let strata = |variant: &Variant| -> Vec<BTreeMap<u64, f64>> {
                tasks.iter().map(|&task| found(samples, mode, variant, task, length)).collect()
            };
            all.push(Retrieval { length, mode, task, rows: rows(variants, baseline, strata) });
        }
    }
    all
}

/// Which seeds' answers were found.
fn found(
    samples: &Samples<'_>,
    mode: Mode,
    variant: &Variant,
    task: Task,
    length: usize,
) -> BTreeMap<u64, f64> {
    let these = samples.of(mode, variant).filter(|(i, _)| i.task == task && i.length == length);
    these
        .filter_map(|(item, sample)| match sample.measured {
            Measured::Answer { correct, .. } => Some((item.seed, f64::from(*correct))),
            Measured::Continuation { .. } => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Report;
    use super::*;
    use crate::record::{Outcome, Record, Seconds};

    /// Needles: the full cache finds all; keys2: it finds 6 of 10. Tova finds half of the needles, h2o none.
    fn records() -> Vec<Record> {
        let outcome = |policy: &str, budget: &str, slots, correct| Outcome {
            variant: Variant { policy: policy.to_owned(), budget: budget.to_owned() },
            slots,
            measured: Measured::Answer { correct, text: String::new() },
        };
        let record = |task, seed, outcomes| Record {
            item: Item { task, length: 64, seed },
            mode: Mode::Agnostic,
            tokens: 64,
            outcomes,
            seconds: Seconds::default(),
        };
        let needle = |seed| {
            let tova = outcome("tova", "25%", 16, seed % 2 == 0);
            let outcomes = vec![outcome("full", "100%", 64, true), tova];
            record(Task::Needle, seed, outcomes)
        };
        let keys = |seed| {
            let full = outcome("full", "100%", 64, seed < 6);
            record(Task::Keys2, seed, vec![full, outcome("tova", "25%", 16, true)])
        };
        // Measured in a later run.
        let h2o = |seed| record(Task::Needle, seed, vec![outcome("h2o", "25%", 16, false)]);
        (0..10).map(needle).chain((0..10).map(keys)).chain((0..10).map(h2o)).collect()
    }

    #[test]
    fn settings_in_which_the_full_cache_fails_do_not_count() {
        let report = Report::new(records(), "tova");
        let of = |task| report.settings.iter().find(|s| s.task == task).unwrap();
        assert_eq!((of(Task::Needle).full, of(Task::Needle).counts), (1.0, true));
        assert_eq!((of(Task::Keys2).full, of(Task::Keys2).counts), (0.6, false));
        let all = report.retrieval.iter().find(|r| r.task.is_none()).unwrap();
        let row = |name: &str| all.rows.iter().find(|r| r.variant.policy == name).unwrap();
        // Keys2, of which tova has found all, is not in it.
        assert_eq!((row("tova").estimate.mean, row("tova").estimate.samples), (0.5, 10));
        assert_eq!(row("full").estimate.mean, 1.0);
    }

    #[test]
    fn seven_of_ten_is_enough() {
        let mut records = records();
        for record in
            records.iter_mut().filter(|r| r.item == Item { task: Task::Keys2, length: 64, seed: 6 })
        {
            record.outcomes[0].measured = Measured::Answer { correct: true, text: String::new() };
        }
        let report = Report::new(records, "tova");
        assert!(report.settings.iter().all(|s| s.counts));
        let all = report.retrieval.iter().find(|r| r.task.is_none()).unwrap();
        let tova = all.rows.iter().find(|r| r.variant.policy == "tova").unwrap();
        assert_eq!((tova.estimate.mean, tova.estimate.samples, tova.kept), (0.75, 20, 0.25));
    }

    #[test]
    fn differences_are_paired_and_every_sample_is_reported() {
        let report = Report::new(records(), "tova");
        let needle = report.retrieval.iter().find(|r| r.task == Some(Task::Needle)).unwrap();
        let difference = |name: &str| {
            needle.rows.iter().find(|r| r.variant.policy == name).and_then(|r| r.difference)
        };
        let h2o = difference("h2o").unwrap();
        assert_eq!((h2o.mean, h2o.samples), (-0.5, 10));
        assert!(h2o.high < 0.0);
        assert!(difference("tova").is_none() && difference("full").is_none());
        let outcomes: usize = report.samples.iter().map(|r| r.outcomes.len()).sum();
        assert_eq!(outcomes, 50);
    }
}
