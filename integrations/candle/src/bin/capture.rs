//! `capture`: runs a text through a GGUF llama and dumps what attention saw.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::DType;
use candle_core::quantized::gguf_file::Content;
use clap::{Parser, ValueEnum};
use kvbudget::Spans;
use kvbudget_candle::{CaptureOptions, Llama, capture, tokenizer};

/// Dump keys, values and queries of a llama while it reads a text.
///
/// The text is plain, without a chat template. Its first T tokens are the context; the F tokens
/// after them are run as they stand in the text.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// GGUF file of a llama model
    #[arg(long)]
    model: PathBuf,
    /// Text to read (UTF-8)
    #[arg(long)]
    text: PathBuf,
    /// Title and licence of the text, for the dump's metadata [default: its file name]
    #[arg(long)]
    title: Option<String>,
    /// T, tokens of context
    #[arg(long, default_value_t = 704)]
    tokens: usize,
    /// W, the last context positions whose queries are kept, or "all"
    #[arg(long, default_value = "64", value_parser = parse_window)]
    window: Window,
    /// F, tokens after the context
    #[arg(long, default_value_t = 32)]
    next: usize,
    /// Layers to dump, such as 0,7,14, or "all"
    #[arg(long, default_value = "all", value_parser = parse_layers)]
    layers: Layers,
    /// Text of a prompt that is run behind the context and rolled back, for its queries (epicache, maskkv)
    #[arg(long)]
    probe: Option<String>,
    /// Dump the norms of the rows that enter each layer (guikv)
    #[arg(long)]
    hidden_norms: bool,
    /// Dump what is expected of the queries at so many positions behind the context, 512 as published; 0 for nothing (expected-attention)
    #[arg(long, default_value_t = 0)]
    expected: u32,
    /// What stretches of the context are, such as system:0..20,frame:20..276
    #[arg(long, default_value = "")]
    spans: Spans,
    /// Element type of the dump
    #[arg(long, default_value = "f16")]
    dtype: Dtype,
    /// File to write
    #[arg(short, long)]
    output: PathBuf,
}

#[derive(Clone)]
enum Window {
    All,
    Last(usize),
}

#[derive(Clone)]
enum Layers {
    All,
    List(Vec<usize>),
}

#[derive(Clone, ValueEnum)]
enum Dtype {
    F16,
    Bf16,
    F32,
}

fn parse_window(argument: &str) -> Result<Window, String> {
    if argument == "all" {
        return Ok(Window::All);
    }
    let last = argument.parse();
    last.map(Window::Last).map_err(|_| "expected a number or \"all\"".to_string())
}

fn parse_layers(argument: &str) -> Result<Layers, String> {
    if argument == "all" {
        return Ok(Layers::All);
    }
    let list: Result<Vec<usize>, _> = argument.split(',').map(str::parse).collect();
    list.map(Layers::List)
        .map_err(|_| "expected layer numbers such as 0,7,14, or \"all\"".to_string())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let text = fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {}", args.text.display()))?;
    let mut file =
        File::open(&args.model).with_context(|| format!("cannot open {}", args.model.display()))?;
    let content = Content::read(&mut file)
        .with_context(|| format!("{} is not a GGUF file", args.model.display()))?;
    let tokenizer = tokenizer::from_gguf(&content)?;
    let ids = tokenizer::encode(&tokenizer, &text)?;
    let probe = args.probe.as_deref().map(|text| tokenizer::encode(&tokenizer, text));
    let model = Llama::load(&content, &mut file)
        .with_context(|| format!("cannot load {}", args.model.display()))?;

    let options = CaptureOptions {
        layers: match args.layers {
            Layers::All => (0..model.config().layers).collect(),
            Layers::List(list) => list,
        },
        tokens: args.tokens,
        window: match args.window {
            Window::All => args.tokens,
            Window::Last(window) => window,
        },
        next: args.next,
        dtype: match args.dtype {
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::BF16,
            Dtype::F32 => DType::F32,
        },
        hidden_norms: args.hidden_norms,
        expected: args.expected,
        probe: probe.transpose()?.unwrap_or_default(),
        spans: args.spans,
    };
    let mut dump = capture(&model, &ids, &options)?;
    let title = args.title.unwrap_or_else(|| file_name(&args.text));
    dump.metadata.insert("text".to_string(), title);
    dump.metadata.insert("model".to_string(), model_name(&content, &args.model)?);
    dump.save(&args.output)
}

/// The file's name and, where the file states it, the licence of its weights, which the dumped
/// output projections are part of.
fn model_name(content: &Content, path: &Path) -> Result<String> {
    let name = file_name(path);
    Ok(match content.metadata.get("general.license") {
        Some(licence) => format!("{name} ({})", licence.to_string()?),
        None => name,
    })
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
