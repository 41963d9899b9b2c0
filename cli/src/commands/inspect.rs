//! `inspect`: what a dump holds.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;

use super::bytes;
use crate::dump::Dump;

/// Show a dump's geometry, tensors, sizes and metadata, and count NaN and infinities.
#[derive(clap::Args)]
pub struct Args {
    /// A safetensors dump (docs/dump-format.md).
    dump: PathBuf,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let mut dump = Dump::open(&args.dump)?;
    let header = dump.header().clone();
    let (geometry, tokens) = (&header.geometry, u64::from(header.tokens));
    writeln!(out, "file         {}, {}", args.dump.display(), bytes(header.file_bytes))?;
    writeln!(out, "layers       {}", geometry.layers().len())?;
    writeln!(out, "tokens       {tokens}")?;
    match header.next_tokens() {
        Some(next) => writeln!(out, "next tokens  {next}")?,
        None => writeln!(out, "next tokens  none (`eval` needs them)")?,
    }
    writeln!(out, "cache        {}", geometry.dtype())?;
    let (slots, size) = (geometry.slots(tokens), geometry.bytes(tokens));
    writeln!(out, "full cache   {slots} slots, {} ({size} B)", bytes(size))?;
    for (key, value) in &header.metadata {
        writeln!(out, "metadata     {}: {}", printable(key), printable(value))?;
    }
    writeln!(
        out,
        "\n{:<14} {:>5}  {:>16}  {:>10}  non-finite",
        "tensor", "dtype", "shape", "size"
    )?;
    for layer in &header.layers {
        for info in layer.iter() {
            let non_finite = dump.tensor(info)?.non_finite();
            let shape: Vec<String> = info.shape.iter().map(u32::to_string).collect();
            let (dtype, size) = (info.dtype.to_string(), info.elements * info.dtype.size());
            writeln!(
                out,
                "{:<14} {dtype:>5}  {:>16}  {:>10}  {non_finite}",
                info.name,
                shape.join(" x "),
                bytes(size as u64)
            )?;
        }
    }
    Ok(())
}

/// Text from a file, cut to a line and without what a terminal would obey.
fn printable(text: &str) -> String {
    const LINE: usize = 100;
    let mut line: String = text.chars().take(LINE).flat_map(char::escape_debug).collect();
    let rest = text.chars().count().saturating_sub(LINE);
    if rest > 0 {
        line.push_str(&format!("... ({rest} more)"));
    }
    line
}
