//! Conclusions from the records of a folder: results.json, results.md and the pictures.

mod continuation;
mod picture;
mod retrieval;
mod samples;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::bootstrap::Estimate;
use crate::record::Record;
use crate::store;
use crate::variant::Variant;
pub use continuation::Continuation;
pub use retrieval::{Retrieval, Setting};
use samples::Samples;

/// Everything that a folder of results says.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Policy that others are compared with.
    pub baseline: String,
    /// Settings of retrieval, and whether they count.
    pub settings: Vec<Setting>,
    pub retrieval: Vec<Retrieval>,
    pub continuation: Vec<Continuation>,
    /// Every sample's outcome.
    pub samples: Vec<Record>,
}

/// One variant's estimate, and that of its difference from the baseline at the same budget, sample by sample.
#[derive(Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub variant: Variant,
    /// Share of slots kept, mean over samples.
    pub kept: f64,
    #[serde(flatten)]
    pub estimate: Estimate,
    pub difference: Option<Estimate>,
}

impl Report {
    pub fn new(records: Vec<Record>, baseline: &str) -> Self {
        let samples = Samples::new(&records);
        let settings = retrieval::settings(&samples);
        Self {
            baseline: baseline.to_owned(),
            retrieval: retrieval::retrieval(&samples, &settings, baseline),
            continuation: continuation::continuation(&samples, baseline),
            settings,
            samples: records,
        }
    }
}

/// Reads a folder of results and writes what they say into it. Pictures show the policies `drawn`, or all if there
/// are none.
pub fn write(folder: &Path, baseline: &str, drawn: &[String]) -> Result<()> {
    let records = store::load(folder)?;
    ensure!(!records.is_empty(), "{} holds no results", folder.display());
    let report = Report::new(records, baseline);
    let save = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    save("results.json", serde_json::to_string_pretty(&report)?)?;
    let table = table::markdown(&report);
    print!("{table}");
    save("results.md", table)?;
    let mut seen = report;
    if !drawn.is_empty() {
        for record in &mut seen.samples {
            record.outcomes.retain(|o| o.variant.is_full() || drawn.contains(&o.variant.policy));
        }
        seen = Report::new(seen.samples, baseline);
    }
    for (name, figure) in picture::pictures(&seen) {
        for suffix in ["svg", "png"] {
            picture::save(&figure, &folder.join(format!("{name}.{suffix}")))?;
        }
    }
    Ok(())
}

/// Rows of all variants: `strata` gives a variant's values by stratum and sample.
fn rows<K: Ord>(
    variants: impl IntoIterator<Item = (Variant, f64)>,
    baseline: &str,
    strata: impl Fn(&Variant) -> Vec<BTreeMap<K, f64>>,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for (variant, kept) in variants {
        let values = strata(&variant);
        let flat: Vec<Vec<f64>> = values.iter().map(|s| s.values().copied().collect()).collect();
        let Some(estimate) = crate::bootstrap::estimate(&flat) else { continue };
        let other = Variant { policy: baseline.to_owned(), budget: variant.budget.clone() };
        let paired = values.iter().zip(strata(&other)).map(|(mine, theirs)| {
            let pairs = mine.iter().filter_map(|(k, v)| Some(v - theirs.get(k)?));
            pairs.collect::<Vec<f64>>()
        });
        let paired: Vec<Vec<f64>> = paired.collect();
        let difference = match variant.policy == baseline || variant.is_full() {
            true => None,
            false => crate::bootstrap::estimate(&paired),
        };
        rows.push(Row { variant, kept, estimate, difference });
    }
    rows
}
