//! The subcommands: each reads its arguments, calls the library, and prints.

pub mod check;
mod demo;
mod eval;
mod inspect;
mod plan;
mod plot;

use std::io::Write;
use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::Result;
use clap::{Parser, Subcommand};
use kvbudget::backend::cpu::Cpu;

/// Plan, evaluate and plot KV-cache budgets on dumps of real attention.
#[derive(Parser)]
#[command(version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to use; by default all cores. The results do not depend on it.
    #[arg(long, global = true)]
    threads: Option<NonZeroUsize>,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Eval(eval::Args),
    Plan(plan::Args),
    Plot(plot::Args),
    Check(check::Args),
    Inspect(inspect::Args),
}

impl Cli {
    /// Runs the subcommand, which prints to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let cpu = self.cpu()?;
        match &self.command {
            Command::Demo(args) => demo::run(args, &cpu, out),
            Command::Eval(args) => eval::run(args, &cpu, out),
            Command::Plan(args) => plan::run(args, &cpu, out),
            Command::Plot(args) => plot::run(args, out),
            Command::Check(args) => check::run(args, out),
            Command::Inspect(args) => inspect::run(args, out),
        }
    }

    fn cpu(&self) -> Result<Cpu> {
        Ok(match self.threads {
            None => Cpu::new(),
            Some(threads) => {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build()?;
                Cpu::with_pool(Arc::new(pool))
            }
        })
    }
}

/// A size in bytes, for people.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = n as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{size:.1} {}", units[unit]) }
}
