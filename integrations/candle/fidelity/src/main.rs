//! `fidelity`: run the sweep, report on it, measure speed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use kvbudget::{PRESETS, Profile};
use kvbudget_fidelity::measure::Bench;
use kvbudget_fidelity::record::{Item, Mode};
use kvbudget_fidelity::speed::{self, Schedule};
use kvbudget_fidelity::tasks::Task;
use kvbudget_fidelity::variant::Variant;
use kvbudget_fidelity::{calibration, prose, report, run, store, worker};

/// Measure what KV-cache policies and budgets cost on a real model.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(RunArgs),
    Report(ReportArgs),
    Speed(SpeedArgs),
    Calibrate(CalibrateArgs),
    /// Measure orders from standard input: what `run` starts.
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        model: PathBuf,
    },
}

/// Measure what is missing in a folder of results.
#[derive(clap::Args)]
struct RunArgs {
    /// GGUF file of a llama model with SmolLM2's chat template.
    #[arg(long, env = "KVBUDGET_SMOLLM2")]
    model: PathBuf,
    /// Folder of results; what it holds already is not measured again.
    #[arg(long)]
    out: PathBuf,
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "passkey,needle,keys2,keys4,tracking,continuation"
    )]
    tasks: Vec<Task>,
    /// Seeds as a range.
    #[arg(long, default_value = "0..24", value_parser = parse_range)]
    seeds: Range<u64>,
    /// Half of the seeds: even ones to develop on, odd ones to test on.
    #[arg(long, default_value = "all")]
    split: Split,
    /// Tokens of the contexts.
    #[arg(long, value_delimiter = ',', default_value = "1024")]
    lengths: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "agnostic,aware")]
    modes: Vec<Mode>,
    /// Presets, with parameters if need be: snapkv:window=16. All presets by default; the full cache always.
    #[arg(long, value_delimiter = ',')]
    policies: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "5%,10%,20%,40%")]
    budgets: Vec<String>,
    /// Worker processes, each on one core.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// A small selection in under three minutes, and the report; what is named besides is ignored.
    #[arg(long)]
    quick: bool,
    /// Tell where the time goes.
    #[arg(long)]
    verbose: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Split {
    Dev,
    Test,
    All,
}

/// Write results.json, results.md and pictures into a folder of results.
#[derive(clap::Args)]
struct ReportArgs {
    folder: PathBuf,
    /// Policy that others are compared with, sample by sample.
    #[arg(long, default_value = "snapkv")]
    baseline: String,
    /// Policies that the pictures show; all by default.
    #[arg(long, value_delimiter = ',')]
    pictures: Vec<String>,
}

/// Time prefill and decoding with full and compressed caches, and their memory.
#[derive(clap::Args)]
struct SpeedArgs {
    /// GGUF file of a llama model.
    #[arg(long, env = "KVBUDGET_SMOLLM2")]
    model: PathBuf,
    /// Folder for speed.json and speed.md.
    #[arg(long)]
    out: PathBuf,
    /// Tokens of the contexts.
    #[arg(long, value_delimiter = ',', default_value = "512,1024,2048,4096")]
    lengths: Vec<usize>,
    /// A preset, with parameters if need be.
    #[arg(long, default_value = "ada-snapkv")]
    policy: String,
    #[arg(long, value_delimiter = ',', default_value = "20%")]
    budgets: Vec<String>,
    /// Tokens decoded by each cache.
    #[arg(long, default_value_t = 32)]
    steps: usize,
    /// Prefills by each cache.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// Measure the profile of a model: which share of a context each of its heads should keep.
#[derive(clap::Args)]
struct CalibrateArgs {
    /// GGUF file of a llama model with SmolLM2's chat template.
    #[arg(long, env = "KVBUDGET_SMOLLM2")]
    model: PathBuf,
    /// Where the profile goes.
    #[arg(long)]
    out: PathBuf,
    /// Texts to measure on; three of other kinds than the tasks' by default.
    #[arg(long, value_delimiter = ',')]
    texts: Vec<PathBuf>,
    /// Tokens of a passage.
    #[arg(long, default_value_t = 1024)]
    length: usize,
    /// Passages out of each text.
    #[arg(long, default_value_t = 2)]
    each: usize,
    /// Profiles to compare with: what part of the budget they place elsewhere.
    #[arg(long, value_delimiter = ',')]
    compare: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => sweep(args),
        Command::Report(args) => report::write(&args.folder, &args.baseline, &args.pictures),
        Command::Speed(args) => speed(&args),
        Command::Calibrate(args) => calibrate(&args),
        Command::Worker { model } => {
            worker::serve(&model, std::io::stdin().lock(), std::io::stdout().lock())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn sweep(mut args: RunArgs) -> Result<()> {
    if args.quick {
        quick(&mut args);
    }
    if args.policies.is_empty() {
        args.policies = PRESETS.iter().map(|name| (*name).to_owned()).collect();
    }
    let variants = Variant::all(&args.policies, &args.budgets)?;
    let items = items(&args)?;
    let records = store::load(&args.out)?;
    let orders = store::missing(&records, &items, &args.modes, &variants);
    println!(
        "{} contexts, {} with work left, {} variants",
        items.len(),
        orders.len(),
        variants.len()
    );
    if !orders.is_empty() {
        let start = Instant::now();
        run::run(&args.model, &args.out, orders, args.jobs, args.verbose)?;
        println!("measured in {:.0} s", start.elapsed().as_secs_f64());
    }
    if args.quick {
        report::write(&args.out, "snapkv", &[])?;
    }
    Ok(())
}

fn calibrate(args: &CalibrateArgs) -> Result<()> {
    let bench = Bench::load(&args.model)?;
    let named: Vec<String> = args
        .texts
        .iter()
        .map(|path| fs::read_to_string(path).with_context(|| path.display().to_string()))
        .collect::<Result<_>>()?;
    let texts: Vec<&str> = match named.is_empty() {
        true => prose::CALIBRATION.to_vec(),
        false => named.iter().map(String::as_str).collect(),
    };
    let start = Instant::now();
    let passages = calibration::passages(&bench, &texts, args.length, args.each)?;
    let profile = calibration::write(&bench, passages, &args.out)?;
    println!("{} in {:.0} s", args.out.display(), start.elapsed().as_secs_f64());
    for path in &args.compare {
        let named = || path.display().to_string();
        let file = File::open(path).with_context(named)?;
        let other: Profile = serde_json::from_reader(file).with_context(named)?;
        let parts = [0.05, 0.1, 0.2, 0.4]
            .map(|keep| format!("{:.1} %", 100.0 * calibration::distance(&profile, &other, keep)));
        println!("{}: placed elsewhere at 5, 10, 20, 40 %: {}", path.display(), parts.join(", "));
    }
    Ok(())
}

fn speed(args: &SpeedArgs) -> Result<()> {
    let bench = Bench::load(&args.model)?;
    let variants: Vec<Variant> = args
        .budgets
        .iter()
        .map(|budget| Variant { policy: args.policy.clone(), budget: budget.clone() })
        .collect();
    let plan = Schedule { lengths: &args.lengths, steps: args.steps, rounds: args.rounds };
    let table = speed::write(&bench, &plan, &variants, &args.out)?;
    print!("{table}");
    Ok(())
}

/// What the quick mode runs.
fn quick(args: &mut RunArgs) {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
    args.tasks = vec![Task::Passkey, Task::Needle, Task::Tracking, Task::Continuation];
    args.seeds = 0..3;
    args.split = Split::All;
    args.lengths = vec![256];
    args.modes = vec![Mode::Agnostic, Mode::Aware];
    args.policies = names(&["streaming", "snapkv", "ada-snapkv"]);
    args.budgets = names(&["20%", "100%"]);
}

/// Contexts in the order of seeds: a sweep that is cut off has all settings, with fewer samples.
fn items(args: &RunArgs) -> Result<Vec<Item>> {
    let limits = args.tasks.contains(&Task::Continuation).then(|| Bench::load(&args.model));
    let limits = limits.transpose()?;
    let mut items = BTreeSet::new();
    let mut short = BTreeSet::new();
    for seed in args.seeds.clone() {
        let wanted = match args.split {
            Split::Dev => seed.is_multiple_of(2),
            Split::Test => !seed.is_multiple_of(2),
            Split::All => true,
        };
        if !wanted {
            continue;
        }
        for &length in &args.lengths {
            for &task in &args.tasks {
                let lacks = |bench: &Bench| seed / 2 >= bench.continuations(seed, length);
                if task == Task::Continuation && limits.as_ref().is_some_and(lacks) {
                    short.insert(length);
                    continue;
                }
                items.insert((seed, Item { task, length, seed }));
            }
        }
    }
    for length in short {
        println!(
            "continuation: the prose has fewer contexts of {length} tokens than there are seeds"
        );
    }
    if items.is_empty() {
        bail!("nothing to measure: no seeds, lengths or tasks");
    }
    Ok(items.into_iter().map(|(_, item)| item).collect())
}

fn parse_range(text: &str) -> Result<Range<u64>> {
    let (start, end) = text.split_once("..").context("expected a range such as 0..40")?;
    let range = start.trim().parse()?..end.trim().parse()?;
    if range.is_empty() {
        bail!("the range {text} is empty");
    }
    Ok(range)
}
