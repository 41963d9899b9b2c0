//! `plan`: which positions each head of each layer keeps.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use kvbudget::backend::cpu::Cpu;
use kvbudget::{Budget, LayerId, Reference};

use super::bytes;
use crate::dump::Dump;
use crate::{eval, planning, policies, stored};

/// Decide which positions each head of each layer keeps.
#[derive(clap::Args)]
pub struct Args {
    /// A safetensors dump (docs/dump-format.md).
    dump: PathBuf,
    /// A preset, such as snapkv or layer-defensivekv.
    #[arg(long)]
    policy: String,
    /// 20%, 1/5, 256/head, "10000 slots" or "512 MiB".
    #[arg(long)]
    budget: Budget,
    /// Reproduce a published code, flaws included: kvpress, adakv or defensivekv.
    #[arg(long)]
    reference: Option<Reference>,
    /// What was measured of the model's layers, for policies that ask: see docs/methods.md.
    #[arg(long, value_name = "LAYERS.JSON")]
    layer_profile: Option<PathBuf>,
    /// Set a parameter of the policy; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Where the plan goes; by default to standard output.
    #[arg(short, long, value_name = "PLAN.JSON")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: &Args, cpu: &Cpu, out: &mut dyn Write) -> Result<()> {
    let mut config = policies::config(&args.policy, args.reference)?;
    policies::measure_layers(std::slice::from_mut(&mut config), args.layer_profile.as_deref())?;
    policies::set(std::slice::from_mut(&mut config), &args.settings)?;
    let mut dump = Dump::open(&args.dump)?;
    let bar = eval::progress(dump.geometry().layers().len(), "planning");
    let planned = planning::plan(cpu, &mut dump, &config, args.budget, || bar.inc(1))?;
    bar.finish_and_clear();
    let plan = planned.plan;
    let Some(path) = &args.output else {
        serde_json::to_writer(&mut *out, &plan)?;
        return Ok(writeln!(out)?);
    };
    stored::write_json(path, &plan)?;
    let full = dump.geometry().slots(u64::from(plan.tokens));
    let heads = || (0..plan.layers.len() as u32).flat_map(|l| plan.head_budgets(LayerId(l)));
    writeln!(
        out,
        "{} at {}: {} of {full} slots, {}; {} to {} slots per head; planned in {:.1} ms",
        plan.policy,
        plan.budget,
        plan.slots,
        bytes(plan.bytes),
        heads().min().unwrap_or(0),
        heads().max().unwrap_or(0),
        planned.time.as_secs_f64() * 1e3,
    )?;
    Ok(())
}
