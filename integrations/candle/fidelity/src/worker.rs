//! A worker process: reads orders, a line of JSON each, and answers each with a line of records.
//!
//! Processes rather than threads: each runs on one core with its own pool of one thread, and none waits for another
//! at the end of a matrix product.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::measure::Bench;

pub fn serve(model: &Path, orders: impl BufRead, mut records: impl Write) -> Result<()> {
    let bench = Bench::load(model)?;
    for line in orders.lines() {
        let order = serde_json::from_str(&line?).context("an order that is none")?;
        serde_json::to_writer(&mut records, &bench.measure(&order)?)?;
        records.write_all(b"\n")?;
        records.flush()?;
    }
    Ok(())
}
