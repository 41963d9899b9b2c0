//! A run: what is missing in the folder is handed out to worker processes, and what they find is appended.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::record::{Order, Record};
use crate::store;

/// What the threads that feed workers share.
struct Shared<'a> {
    orders: Mutex<VecDeque<Order>>,
    file: Mutex<File>,
    bar: ProgressBar,
    model: &'a Path,
    verbose: bool,
}

/// Measures `orders` in `jobs` processes and appends the records to a new file of `folder`.
pub fn run(
    model: &Path,
    folder: &Path,
    orders: Vec<Order>,
    jobs: usize,
    verbose: bool,
) -> Result<()> {
    ensure!(jobs > 0, "no workers: expected at least one job");
    let jobs = jobs.min(orders.len());
    let style = "{bar:30} {pos}/{len} contexts, {elapsed} gone, {eta} to go";
    let bar = ProgressBar::new(orders.len() as u64)
        .with_style(ProgressStyle::with_template(style).context("the progress bar")?);
    let shared = Shared {
        orders: Mutex::new(orders.into()),
        file: Mutex::new(store::create(folder)?),
        bar,
        model,
        verbose,
    };
    std::thread::scope(|scope| {
        let feeders: Vec<_> = (0..jobs).map(|_| scope.spawn(|| feed(&shared))).collect();
        let ends =
            feeders.into_iter().map(|f| f.join().map_err(|_| anyhow!("a feeder panicked"))?);
        // All are waited for; the first failure is told.
        ends.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
    })?;
    shared.bar.finish();
    Ok(())
}

/// Starts a worker and keeps it busy until no orders are left.
fn feed(shared: &Shared<'_>) -> Result<()> {
    let mut worker = Command::new(std::env::current_exe()?)
        .arg("worker")
        .arg("--model")
        .arg(shared.model)
        // Workers are the parallelism.
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a worker")?;
    let (Some(mut orders), Some(records)) = (worker.stdin.take(), worker.stdout.take()) else {
        bail!("a worker without pipes");
    };
    let mut records = BufReader::new(records);
    let mut result = Ok(());
    loop {
        // On a line of its own: a lock taken in the loop's head would be held while the worker works.
        let next = locked(&shared.orders)?.pop_front();
        let Some(order) = next else { break };
        result = exchange(shared, &order, &mut orders, &mut records);
        if result.is_err() {
            // The other workers finish what they have and stop.
            locked(&shared.orders)?.clear();
            break;
        }
    }
    // The end of its orders is the end of the worker.
    drop(orders);
    let status = worker.wait()?;
    result?;
    ensure!(status.success(), "a worker failed: {status}");
    Ok(())
}

fn exchange(
    shared: &Shared<'_>,
    order: &Order,
    orders: &mut impl Write,
    records: &mut impl BufRead,
) -> Result<()> {
    writeln!(orders, "{}", serde_json::to_string(order)?).context("a worker hears nothing")?;
    let mut line = String::new();
    let read = records.read_line(&mut line)?;
    ensure!(read > 0, "a worker ended early; its error stands above");
    for record in serde_json::from_str::<Vec<Record>>(&line)? {
        store::append(&mut *locked(&shared.file)?, &record)?;
        if shared.verbose {
            shared.bar.suspend(|| eprintln!("{}", timing(&record)));
        }
    }
    shared.bar.inc(1);
    Ok(())
}

fn timing(record: &Record) -> String {
    let (item, s) = (record.item, record.seconds);
    format!(
        "{} {} seed {} {}: {} variants in {:.1} s: prefill {:.1}, plan {:.1}, gather {:.1}, answer {:.1}, read {:.1}, \
         error {:.1}",
        item.task.name(),
        item.length,
        item.seed,
        record.mode.name(),
        record.outcomes.len(),
        s.total(),
        s.prefill,
        s.plan,
        s.gather,
        s.answer,
        s.read,
        s.error
    )
}

fn locked<T>(mutex: &Mutex<T>) -> Result<std::sync::MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| anyhow!("another feeder panicked"))
}
