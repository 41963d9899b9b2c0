//! `plot`: a plan as a picture.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;

use crate::{plot, stored};

/// Draw where a plan's budget went and which positions survive.
#[derive(clap::Args)]
pub struct Args {
    /// A plan made by `plan`.
    plan: PathBuf,
    /// The picture: .svg or .png.
    #[arg(short, long, value_name = "MAP.SVG|MAP.PNG")]
    output: PathBuf,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let plan = stored::read_plan(&args.plan)?;
    plot::map::figure(&plan)?.save(&args.output)?;
    writeln!(out, "wrote {}", args.output.display())?;
    Ok(())
}
