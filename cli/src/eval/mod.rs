//! What a budget costs: policies by budgets over one dump, in accuracy and in memory.
//!
//! Plans first, one per policy and budget, then one pass over the layers in which the full cache is attended
//! once and every plan's compacted cache is held against it. A layer is in memory at a time.

mod measure;
mod table;

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kvbudget::backend::cpu::Cpu;
use kvbudget::plan::Report;
use kvbudget::{Budget, Plan, PolicyConfig};
use serde::Serialize;

use crate::dump::Dump;
use crate::planning::{self, Planned};
use measure::{Reference, Samples};

pub use table::print;

/// Everything `eval` has to say; its JSON is the same, with every number.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// Always `kvbudget-results`.
    pub format: &'static str,
    /// Version of the format.
    pub version: u32,
    /// What was evaluated on.
    pub dump: Subject,
    /// One row per budget and policy, budgets outermost.
    pub rows: Vec<Row>,
}

/// The dump that was evaluated on.
#[derive(Debug, Clone, Serialize)]
pub struct Subject {
    /// File or sample.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// KV heads of all layers.
    pub kv_heads: usize,
    /// Tokens of the context.
    pub tokens: u32,
    /// Tokens whose queries ask what was kept.
    pub next_tokens: u32,
    /// Storage type.
    pub dtype: String,
    /// Slots of the full cache.
    pub full_slots: u64,
    /// Bytes of the full cache.
    pub full_bytes: u64,
}

/// One policy at one budget.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name of the policy.
    pub policy: String,
    /// Its parameters.
    pub parameters: BTreeMap<&'static str, String>,
    /// The budget as it was asked for.
    pub budget: Budget,
    /// Slots it resolves to.
    pub budget_slots: u64,
    /// Slots kept.
    pub slots: u64,
    /// Bytes of keys and values kept.
    pub bytes: u64,
    /// Softmax mass of the next queries on the context that lies on kept slots; mean over layers, query
    /// heads and queries.
    pub retained_mass: f64,
    /// What that did to the attention output.
    pub output_error: OutputError,
    /// The same after the output projection, all heads of a layer together: what reaches the residual
    /// stream. Mean over layers and queries, if the dump holds the projections.
    pub layer_error: Option<f64>,
    /// Scoring and selection, without reading the dump.
    pub plan_seconds: f64,
    /// What the planner reported.
    pub report: Report,
}

/// Relative L2 distance of attention outputs to those over the full cache.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct OutputError {
    /// Mean over layers, query heads and queries.
    pub mean: f64,
    /// 95th percentile (nearest rank) over the same.
    pub p95: f64,
}

/// Evaluates every policy at every budget; also returns the plans, in the order of the rows.
pub fn run<R: Read + Seek>(
    cpu: &Cpu,
    dump: &mut Dump<R>,
    name: &str,
    configs: &[PolicyConfig],
    budgets: &[Budget],
) -> Result<(Results, Vec<Plan>)> {
    let header = dump.header().clone();
    let next_tokens = header.next_tokens().with_context(|| {
        format!("{name} has no q_next, k_next and v_next: `eval` needs the tokens that followed")
    })?;
    ensure!(!configs.is_empty() && !budgets.is_empty(), "nothing to do: no policy or no budget");
    for config in configs {
        planning::probe(cpu, dump, config, budgets[0])
            .with_context(|| format!("policy {} cannot run on {name}", config.name))?;
    }

    let layers = header.geometry.layers().len();
    let cells: Vec<(Budget, &PolicyConfig)> =
        budgets.iter().flat_map(|&b| configs.iter().map(move |c| (b, c))).collect();
    let bar = progress(cells.len() * layers * 2, "evaluating");
    let mut planned: Vec<Planned> = Vec::with_capacity(cells.len());
    for (budget, config) in &cells {
        let plan = planning::plan(cpu, dump, config, *budget, || bar.inc(1))
            .with_context(|| format!("policy {} at {budget}", config.name))?;
        planned.push(plan);
    }
    let mut samples = vec![Samples::default(); cells.len()];
    for l in 0..layers {
        let layer = dump.layer(l, true)?;
        let full = Reference::new(cpu, &layer).with_context(|| format!("layer {l}"))?;
        for (planned, samples) in planned.iter().zip(&mut samples) {
            full.compare(cpu, &layer, &planned.plan.layers[l], samples)
                .with_context(|| format!("layer {l}, plan of {}", planned.plan.policy))?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let mut rows = Vec::with_capacity(cells.len());
    for (((budget, config), planned), samples) in cells.into_iter().zip(&planned).zip(&samples) {
        rows.push(Row {
            policy: config.name.clone(),
            parameters: config.parameters().into_iter().collect(),
            budget,
            budget_slots: planned.plan.report.budget_slots,
            slots: planned.plan.slots,
            bytes: planned.plan.bytes,
            retained_mass: measure::mean(&samples.mass),
            output_error: OutputError {
                mean: measure::mean(&samples.error),
                p95: measure::percentile(&samples.error, 95),
            },
            layer_error: (!samples.layer_error.is_empty())
                .then(|| measure::mean(&samples.layer_error)),
            plan_seconds: planned.time.as_secs_f64(),
            report: planned.plan.report.clone(),
        });
    }
    let tokens = u64::from(header.tokens);
    let subject = Subject {
        name: name.to_owned(),
        layers,
        kv_heads: header.geometry.heads(),
        tokens: header.tokens,
        next_tokens,
        dtype: header.geometry.dtype().to_string(),
        full_slots: header.geometry.slots(tokens),
        full_bytes: header.geometry.bytes(tokens),
    };
    let results = Results { format: "kvbudget-results", version: 1, dump: subject, rows };
    Ok((results, planned.into_iter().map(|p| p.plan).collect()))
}

/// A progress bar on standard error; it hides itself where nobody watches.
pub fn progress(steps: usize, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}");
    let bar = ProgressBar::new(steps as u64).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
