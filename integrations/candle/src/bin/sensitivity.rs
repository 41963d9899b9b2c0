//! `sensitivity`: measures how much eviction in blocks changes the keys of each layer, and writes it as a layer profile.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use clap::Parser;
use kvbudget_candle::sensitivity::{BlockMask, Over, measure};
use kvbudget_candle::{Llama, tokenizer};

/// Measure the sensitivity of a model's layers (EpiCache): one text, two passes.
///
/// The result is the layer profile that `epicache` takes: `kvbudget plan --layer-profile`, `LayerProfile::apply`.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// GGUF file of a llama model
    #[arg(long, env = "KVBUDGET_SMOLLM2")]
    model: PathBuf,
    /// Text to read (UTF-8), without a chat template
    #[arg(long)]
    text: PathBuf,
    /// Tokens of the text to read; the model's context bounds them
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Tokens of a block (EpiCache: 4096)
    #[arg(long, default_value_t = 512)]
    block: usize,
    /// First tokens, which every block sees (EpiCache: 128)
    #[arg(long, default_value_t = 16)]
    sinks: usize,
    /// Tokens of the block before that a block sees (EpiCache: 2048)
    #[arg(long, default_value_t = 256)]
    overlap: usize,
    /// Compare windows of so many tokens, as EpiCache's code does with 100, instead of tokens
    #[arg(long)]
    window: Option<usize>,
    /// File to write
    #[arg(short, long)]
    output: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let named = |path: &PathBuf| path.display().to_string();
    let mut file = File::open(&args.model).with_context(|| named(&args.model))?;
    let content = Content::read(&mut file).with_context(|| named(&args.model))?;
    let model = Llama::load(&content, &mut file).with_context(|| named(&args.model))?;
    let name = content.metadata.get("general.name").and_then(|name| name.to_string().ok());
    let text = fs::read_to_string(&args.text).with_context(|| named(&args.text))?;
    let mut ids = tokenizer::encode(&tokenizer::from_gguf(&content)?, &text)?;
    ids.truncate(args.tokens);

    let Args { block, sinks, overlap, window, output, .. } = args;
    let profile = measure(
        &name.cloned().unwrap_or_default(),
        &model.geometry()?,
        &ids,
        BlockMask { block, sinks, overlap },
        window.map_or(Over::Tokens, Over::Windows),
        &mut |ids, spans, hook| model.forward(ids, spans, hook).map(drop),
    )?;
    for (layer, similarity) in profile.similarity.iter().flatten().enumerate() {
        println!("layer {layer:2}  {similarity:.4}");
    }
    serde_json::to_writer(File::create(&output).with_context(|| named(&output))?, &profile)
        .with_context(|| named(&output))
}
