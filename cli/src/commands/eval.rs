//! `eval`: what policies and budgets cost on a dump.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use kvbudget::Budget;
use kvbudget::backend::cpu::Cpu;

use crate::dump::Dump;
use crate::{eval, policies, stored};

/// Measure what policies and budgets cost in accuracy and save in memory.
#[derive(clap::Args)]
pub struct Args {
    /// A safetensors dump with q_next, k_next and v_next (docs/dump-format.md).
    dump: PathBuf,
    /// Presets, or a published code's version as code:name (kvpress:snapkv).
    #[arg(long, value_delimiter = ',', required = true)]
    policies: Vec<String>,
    /// Budgets: 20%, 1/5, 256/head, "10000 slots" or "512 MiB".
    #[arg(long, value_delimiter = ',', required = true)]
    budgets: Vec<Budget>,
    /// What was measured of the model's layers, for policies that ask: see docs/methods.md.
    #[arg(long, value_name = "LAYERS.JSON")]
    layer_profile: Option<PathBuf>,
    /// Set a parameter of all policies that have it, or of one; may be repeated.
    #[arg(long = "set", value_name = "[POLICY.]KEY=VALUE")]
    settings: Vec<String>,
    /// Write every number here.
    #[arg(long, value_name = "RESULTS.JSON")]
    json: Option<PathBuf>,
}

pub(super) fn run(args: &Args, cpu: &Cpu, out: &mut dyn Write) -> Result<()> {
    let configs = args.policies.iter().map(|name| policies::config(name.trim(), None));
    let mut configs = configs.collect::<Result<Vec<_>>>()?;
    policies::measure_layers(&mut configs, args.layer_profile.as_deref())?;
    policies::set(&mut configs, &args.settings)?;
    let mut dump = Dump::open(&args.dump)?;
    let name = args.dump.display().to_string();
    let (results, _) = eval::run(cpu, &mut dump, &name, &configs, &args.budgets)?;
    // First the file: whoever reads the table may stop early.
    if let Some(path) = &args.json {
        stored::write_json(path, &results)?;
    }
    Ok(eval::print(&results, out)?)
}
