//! The report as Markdown: what people read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::{Continuation, Report, Retrieval, Row};
use crate::bootstrap::Estimate;

pub fn markdown(report: &Report) -> String {
    let mut out = String::from("# Fidelity\n\n");
    out.push_str(
        "Means with 95 % bootstrap intervals over samples. Budgets are the share of slots kept; ",
    );
    let _ = writeln!(out, "differences are to {}, sample by sample.\n", report.baseline);
    settings(&mut out, report);
    for block in report.retrieval.iter().filter(|r| r.task.is_none()) {
        let (length, mode) = (block.length, block.mode.name());
        let _ = writeln!(out, "## Answers found, {length} tokens, question-{mode}\n");
        grid(&mut out, &block.rows, |r| percent(&r.estimate));
        difference(&mut out, &block.rows, &report.baseline, points);
        tasks(&mut out, report, block);
    }
    report.continuation.iter().for_each(|block| continuation(&mut out, block, &report.baseline));
    out
}

fn settings(out: &mut String, report: &Report) {
    if report.settings.is_empty() {
        return;
    }
    out.push_str(
        "## Full cache\n\n| task | tokens | question | samples | answers found | counts |\n",
    );
    out.push_str("|---|---:|---|---:|---:|---|\n");
    for s in &report.settings {
        let counts = if s.counts { "yes" } else { "no: below 70 %" };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {:.0} % | {counts} |",
            s.task.name(),
            s.length,
            s.mode.name(),
            s.samples,
            s.full * 100.0
        );
    }
    out.push('\n');
}

/// Policies downwards, budgets to the right; the full cache, which has one budget, is a column of its own.
fn grid(out: &mut String, rows: &[Row], cell: impl Fn(&Row) -> String) {
    let budgets: BTreeSet<String> = rows.iter().map(|r| r.variant.budget.clone()).collect();
    let mut budgets: Vec<String> = budgets.into_iter().collect();
    let kept = |budget: &String| {
        let row = rows.iter().find(|r| r.variant.budget == *budget);
        row.map_or(0.0, |r| r.kept)
    };
    budgets.sort_by(|a, b| kept(a).total_cmp(&kept(b)));
    let mut policies: BTreeMap<&str, BTreeMap<&str, &Row>> = BTreeMap::new();
    for row in rows {
        policies.entry(&row.variant.policy).or_default().insert(&row.variant.budget, row);
    }
    let _ = writeln!(out, "| policy | {} |", budgets.join(" | "));
    let _ = writeln!(out, "|---|{}", "---:|".repeat(budgets.len()));
    for (policy, by_budget) in policies {
        let cells =
            budgets.iter().map(|b| by_budget.get(b.as_str()).map_or(String::new(), |r| cell(r)));
        let _ = writeln!(out, "| {policy} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    out.push('\n');
}

/// Differences from the baseline, if there are any.
fn difference(out: &mut String, rows: &[Row], baseline: &str, show: fn(&Estimate) -> String) {
    if rows.iter().any(|r| r.difference.is_some()) {
        let _ = writeln!(out, "Difference from {baseline}:\n");
        grid(out, rows, |r| r.difference.as_ref().map_or(String::new(), show));
    }
}

/// Each task alone.
fn tasks(out: &mut String, report: &Report, block: &Retrieval) {
    let same = |r: &&Retrieval| (r.length, r.mode) == (block.length, block.mode);
    for single in report.retrieval.iter().filter(same) {
        if let Some(task) = single.task {
            let _ = writeln!(
                out,
                "### {}, {} tokens, question-{}\n",
                task.name(),
                block.length,
                block.mode.name()
            );
            grid(out, &single.rows, |r| format!("{:.0} %", r.estimate.mean * 100.0));
        }
    }
}

fn continuation(out: &mut String, block: &Continuation, baseline: &str) {
    let _ = writeln!(
        out,
        "## Loss of the true continuation, {} tokens\n\nNats per token above the full cache, which has {:.3}:\n",
        block.length, block.full_loss
    );
    grid(out, &block.loss, |r| interval(&r.estimate));
    difference(out, &block.loss, baseline, interval);
    let _ = writeln!(
        out,
        "## Attention error, {} tokens\n\nRelative L2 error of the attention output, mean over layers:\n",
        block.length
    );
    grid(out, &block.error, |r| interval(&r.estimate));
}

fn percent(e: &Estimate) -> String {
    format!("{:.0} % [{:.0}, {:.0}]", e.mean * 100.0, e.low * 100.0, e.high * 100.0)
}

fn interval(e: &Estimate) -> String {
    format!("{:.3} [{:.3}, {:.3}]", e.mean, e.low, e.high)
}

/// A difference of two shares.
fn points(e: &Estimate) -> String {
    format!("{:+.0} [{:+.0}, {:+.0}]", e.mean * 100.0, e.low * 100.0, e.high * 100.0)
}
