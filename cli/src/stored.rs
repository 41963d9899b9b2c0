//! Plans as files: read from untrusted JSON, held against what drawing and checking assume, and written; and layer profiles.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvbudget::{LayerProfile, Plan};

/// Reads a plan file.
pub fn read_plan(path: &Path) -> Result<Plan> {
    let named = || format!("{}", path.display());
    let file = File::open(path).with_context(named)?;
    parse_plan(BufReader::new(file)).with_context(named)
}

/// Parses a plan; positions must ascend below the token count, whatever the dump may say later.
pub fn parse_plan(source: impl Read) -> Result<Plan> {
    let plan: Plan = serde_json::from_reader(source).context("not a plan")?;
    for (l, heads) in plan.layers.iter().enumerate() {
        for (h, kept) in heads.iter().enumerate() {
            let ascend = kept.windows(2).all(|pair| pair[0] < pair[1]);
            let below = kept.last().is_none_or(|p| p.0 < plan.tokens);
            ensure!(
                ascend && below,
                "not a plan: layer {l}, head {h}: kept positions must strictly ascend below {}",
                plan.tokens
            );
        }
    }
    Ok(plan)
}

/// Reads a layer profile.
pub fn read_layer_profile(path: &Path) -> Result<LayerProfile> {
    let read = || -> Result<LayerProfile> {
        let source = BufReader::new(File::open(path)?);
        serde_json::from_reader(source).context("not a layer profile")
    };
    read().with_context(|| format!("{}", path.display()))
}

/// Writes a value as one JSON document.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let write = || -> Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut out, value)?;
        writeln!(out)?;
        Ok(out.flush()?)
    };
    write().with_context(|| format!("writing {}", path.display()))
}
