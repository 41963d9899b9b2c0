//! `demo`: `eval` and `plot` on the embedded sample, so that there is something to look at after one command.
//!
//! The sample is real: five layers of SmolLM2-135M-Instruct while it read prose (`docs/dump-format.md`).

use std::fs;
use std::io::{Cursor, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use kvbudget::Budget;
use kvbudget::backend::cpu::Cpu;

use crate::dump::Dump;
use crate::{eval, plot, policies, stored};

static SAMPLE: &[u8] = include_bytes!("../../sample/smollm2.safetensors");
/// All presets but h2o, which needs the queries of every token.
const POLICIES: [&str; 16] = [
    "layer-defensivekv",
    "defensivekv",
    "andpro",
    "cake",
    "ada-criticalkv",
    "criticalkv",
    "ada-snapkv",
    "ada-pyramidkv",
    "snapkv",
    "pyramidkv",
    "tova",
    "lagkv",
    "keydiff",
    "knorm",
    "streaming",
    "random",
];
const PERCENTS: [u64; 4] = [5, 10, 20, 40];
/// The plan that is drawn.
const DRAWN: (&str, u64) = ("layer-defensivekv", 20);

/// Evaluate and draw on an embedded sample of a real model's cache.
#[derive(clap::Args)]
pub struct Args {
    /// Where the pictures, the plan and the results go.
    #[arg(long, default_value = "kvbudget-demo")]
    out_dir: PathBuf,
}

pub(super) fn run(args: &Args, cpu: &Cpu, out: &mut dyn Write) -> Result<()> {
    fs::create_dir_all(&args.out_dir).with_context(|| format!("{}", args.out_dir.display()))?;
    let mut dump = Dump::new(Cursor::new(SAMPLE))?;
    let configs = POLICIES.iter().map(|name| policies::config(name, None));
    let configs = configs.collect::<Result<Vec<_>>>()?;
    let budgets = PERCENTS.map(|percent| Budget::keep(percent, 100));
    let budgets = budgets.into_iter().collect::<kvbudget::Result<Vec<_>>>()?;
    let (results, plans) = eval::run(cpu, &mut dump, "SmolLM2-135M", &configs, &budgets)?;

    let drawn = Budget::keep(DRAWN.1, 100)?;
    let plan = plans.iter().find(|p| p.policy == DRAWN.0 && p.budget == drawn);
    let plan = plan.context("the drawn plan is among those evaluated")?;
    let path = |name: &str| args.out_dir.join(name);
    stored::write_json(&path("results.json"), &results)?;
    stored::write_json(&path("plan.json"), plan)?;
    let (map, error) = (plot::map::figure(plan)?, plot::error::figure(&results));
    for kind in ["svg", "png"] {
        map.save(&path(&format!("map.{kind}")))?;
        error.save(&path(&format!("error.{kind}")))?;
    }
    // Last: whoever reads the table may stop early.
    eval::print(&results, out)?;
    writeln!(
        out,
        "\nwrote map and error (.svg, .png), plan.json ({} at {drawn}) and results.json to {}",
        plan.policy,
        args.out_dir.display()
    )?;
    Ok(())
}
