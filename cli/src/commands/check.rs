//! `check`: does a plan keep its promises on a dump?

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use kvbudget::plan::Promise;
use kvbudget::{Budget, Geometry, Plan};

use super::bytes;
use crate::dump::Dump;
use crate::stored::read_plan;

/// Check a plan against the dump it was made for.
#[derive(clap::Args)]
pub struct Args {
    /// A plan made by `plan`.
    plan: PathBuf,
    /// The dump.
    dump: PathBuf,
    /// The budget it must meet; by default the one it names.
    #[arg(long)]
    budget: Option<Budget>,
    /// Positions per page or chunk, if the plan keeps them whole.
    #[arg(long, default_value_t = 1)]
    unit: u32,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let plan = read_plan(&args.plan)?;
    let dump = Dump::open(&args.dump)?;
    let promise = Promise { budget: args.budget, unit: args.unit, ..Promise::default() };
    verdict(&plan, dump.geometry(), dump.tokens(), &promise)
        .with_context(|| format!("{}", args.plan.display()))?;
    writeln!(
        out,
        "ok: {} at {}: {} of {} slots, {}",
        plan.policy,
        args.budget.unwrap_or(plan.budget),
        plan.slots,
        dump.geometry().slots(u64::from(plan.tokens)),
        bytes(plan.bytes)
    )?;
    Ok(())
}

/// Holds a plan against a geometry, a token count and a promise.
pub fn verdict(plan: &Plan, geometry: &Geometry, tokens: u32, promise: &Promise<'_>) -> Result<()> {
    // First: the checker lists positions up to the plan's word for it.
    ensure!(
        plan.tokens == tokens,
        "the plan is for {} tokens, the dump holds {tokens}",
        plan.tokens
    );
    Ok(plan.check(geometry, promise)?)
}
