//! Chat with SmolLM2, or any GGUF llama with its template, on a fraction of the KV cache.
//!
//! `cargo run --release --example smollm2 -- --model "$(../../scripts/fetch-smollm2)" --chat`
//!
//! What an engine does, in one file: read the prompt while compressing it, decode greedily by appending, compress
//! again as the answer grows, and take the next turn on the compressed cache. Text goes to standard output,
//! everything else to standard error.

use std::fs::{self, File};
use std::io::{BufRead, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use candle_core::quantized::gguf_file::Content;
use clap::{ArgGroup, Parser, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use kvbudget::{Budget, PolicyConfig, Trigger, preset, profiled};
use kvbudget_candle::profiles::default_policy;
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Llama, Span, tokenizer};
use tokenizers::Tokenizer;

const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
/// What ends a turn in the template.
const END: &str = "<|im_end|>";

/// Chat with SmolLM2 on a fraction of the KV cache.
#[derive(Parser)]
#[command(version, group = ArgGroup::new("input").required(true))]
struct Args {
    /// GGUF file of a llama model
    #[arg(long)]
    model: PathBuf,
    /// What to ask
    #[arg(long, group = "input")]
    prompt: Option<String>,
    /// File that holds what to ask
    #[arg(long, group = "input")]
    prompt_file: Option<PathBuf>,
    /// Read one turn per line from standard input
    #[arg(long, group = "input")]
    chat: bool,
    /// Which slots stay: a preset's name, or what suits the model best
    #[arg(long, default_value = "default")]
    policy: String,
    /// A profile of the model's heads (`fidelity calibrate`) in the place of the one that ships
    #[arg(long)]
    profile: Option<PathBuf>,
    /// A parameter of the policy, such as window=16; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_setting)]
    set: Vec<(String, String)>,
    /// How much stays: 20%, 256/head, 10000 slots, 8 MiB
    #[arg(long, default_value = "20%")]
    budget: Budget,
    /// When the prompt is compressed: as each layer has read it, or after the last
    #[arg(long, value_enum, default_value_t = When::Cascade)]
    compress: When,
    /// Leave the cache whole below so many tokens: a fraction of little is nothing
    #[arg(long, default_value_t = 256)]
    from: u32,
    /// Compress again after so many tokens of an answer
    #[arg(long, default_value_t = 128)]
    recompress_every: u32,
    /// Keep everything, by plain attention: the baseline
    #[arg(long)]
    dense: bool,
    /// Tokens of an answer, at most
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum When {
    After,
    Cascade,
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    parts.ok_or_else(|| format!("expected KEY=VALUE, got {text:?}"))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        ),
        (None, None) => None,
    };
    let (model, tokenizer, name) = load(&args.model)?;
    let policy = policy(&args, &name)?;
    let cache = match args.dense {
        true => Cache::Dense(DenseAttention::new(model.config().layers)),
        false => {
            let (geometry, o_proj) = (model.geometry()?, model.output_projections());
            let trigger = Trigger::every(args.recompress_every)?;
            let mut cache =
                BudgetCache::new(geometry, o_proj, policy, args.budget)?.with_trigger(trigger);
            if cache.wants_rope() {
                cache = cache.with_rope(model.rope()?);
            }
            cache.add_sequence()?;
            Cache::Budget(Box::new(cache))
        }
    };
    let Some(stop) = tokenizer.token_to_id(END) else {
        bail!(
            "the model's vocabulary has no {END:?}: expected a chat model such as SmolLM2-Instruct"
        );
    };
    let mut session =
        Session { args, model, tokenizer, cache, stop, tokens: 0, pending: Vec::new(), peak: 0 };
    if let Some(prompt) = prompt {
        return session.turn(&prompt);
    }
    loop {
        eprint!("\n> ");
        stderr().flush()?;
        let mut line = String::new();
        if stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        if !line.trim().is_empty() {
            session.turn(line.trim())?;
        }
    }
}

fn policy(args: &Args, model: &str) -> Result<PolicyConfig> {
    let mut policy = match (&args.profile, args.policy.as_str()) {
        (Some(path), "default") => {
            let named = || path.display().to_string();
            profiled(
                serde_json::from_reader(File::open(path).with_context(named)?)
                    .with_context(named)?,
            )
        }
        (Some(_), policy) => bail!("a profile serves the default policy, not {policy:?}"),
        (None, "default") => default_policy(model)?,
        (None, "reconstruct") => {
            bail!("reconstruct needs a second pass, which this example does not make")
        }
        (None, name) => preset(name)?,
    };
    for (key, value) in &args.set {
        policy.set(key, value)?;
    }
    Ok(policy)
}

/// The model, its tokenizer and its name.
fn load(path: &Path) -> Result<(Llama, Tokenizer, String)> {
    let spinner = ProgressBar::new_spinner().with_message("loading the model");
    spinner.enable_steady_tick(Duration::from_millis(100));
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let content = Content::read(&mut file)
        .with_context(|| format!("{} is not a GGUF file", path.display()))?;
    let model = Llama::load(&content, &mut file)
        .with_context(|| format!("cannot load {}", path.display()))?;
    let tokenizer = tokenizer::from_gguf(&content)?;
    let name = content.metadata.get("general.name").and_then(|name| name.to_string().ok());
    let name = name.cloned().unwrap_or_default();
    spinner.finish_and_clear();
    Ok((model, tokenizer, name))
}

/// The one sequence of this session, on either kind of attention.
enum Cache {
    Dense(DenseAttention),
    Budget(Box<BudgetCache>),
}

struct Session {
    args: Args,
    model: Llama,
    tokenizer: Tokenizer,
    cache: Cache,
    /// The token that ends an answer.
    stop: u32,
    /// Tokens that the cache has seen: the next one's position.
    tokens: u32,
    /// Generated, but not yet seen by the cache.
    pending: Vec<u32>,
    /// Most bytes that the cache took until the last prompt was read.
    peak: u64,
}

impl Session {
    /// One question and its answer.
    fn turn(&mut self, question: &str) -> Result<()> {
        let ids = self.prompt(question)?;
        let started = Instant::now();
        let mut next = self.read(&ids)?;
        let first_token = started.elapsed();
        let tokenizer = self.tokenizer.clone();
        let mut text = tokenizer.decode_stream(true);
        let mut generated = 0;
        let started = Instant::now();
        while next != self.stop && generated < self.args.max_tokens {
            if let Some(piece) = text.step(next).map_err(anyhow::Error::msg)? {
                print!("{piece}");
                stdout().flush()?;
            }
            generated += 1;
            self.pending = vec![next];
            if generated < self.args.max_tokens {
                next = self.decode(next)?;
            }
        }
        println!();
        let decoding = started.elapsed();
        self.report(ids.len(), first_token, generated, decoding)
    }

    /// The tokens of a turn in the model's template, and those of the last answer that the cache has not seen.
    fn prompt(&mut self, question: &str) -> Result<Vec<u32>> {
        let opening = match self.tokens {
            0 => format!("<|im_start|>system\n{SYSTEM}{END}\n"),
            _ => format!("{END}\n"),
        };
        let text = format!("{opening}<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n");
        let ids = [self.pending.clone(), tokenizer::encode(&self.tokenizer, &text)?].concat();
        let (limit, end) = (self.model.config().context_length, self.tokens as usize + ids.len());
        if end + self.args.max_tokens > limit {
            bail!(
                "{end} tokens and an answer of up to {} exceed the model's context of {limit}",
                self.args.max_tokens
            );
        }
        self.pending.clear();
        Ok(ids)
    }

    /// Reads a prompt in one forward pass, compresses it, and returns the first token of the answer.
    fn read(&mut self, ids: &[u32]) -> Result<u32> {
        let span = Span::new(self.tokens, ids.len() as u32);
        let bar = ProgressBar::new(self.model.config().layers as u64).with_message("reading");
        bar.set_style(ProgressStyle::with_template("{msg} {bar:30} layer {pos}/{len} {elapsed}")?);
        let run = |hook: &mut dyn AttentionHook| {
            self.model.forward(ids, &[span], &mut Ticking { hook, bar: &bar })
        };
        let hidden = match &mut self.cache {
            Cache::Dense(dense) => run(dense)?,
            Cache::Budget(cache) if self.tokens + span.tokens < self.args.from => {
                run(cache.as_mut())?
            }
            Cache::Budget(cache) if self.args.compress == When::Cascade => {
                let mut compressing = cache.compressing();
                let hidden = run(&mut compressing)?;
                compressing.finish()?;
                hidden
            }
            Cache::Budget(cache) => {
                let hidden = run(cache.as_mut())?;
                cache.compress()?;
                hidden
            }
        };
        if let Cache::Budget(cache) = &mut self.cache {
            self.peak = cache.peak_bytes();
            // Decoding then appends in place until the cache is compressed again.
            cache.reserve(0, self.args.recompress_every)?;
        }
        bar.finish_and_clear();
        self.tokens += ids.len() as u32;
        self.greedy(&hidden)
    }

    /// Shows the model a token and returns the one it continues with.
    fn decode(&mut self, token: u32) -> Result<u32> {
        let hook: &mut dyn AttentionHook = match &mut self.cache {
            Cache::Dense(dense) => dense,
            Cache::Budget(cache) => cache.as_mut(),
        };
        let hidden = self.model.forward(&[token], &[Span::new(self.tokens, 1)], hook)?;
        self.pending.clear();
        self.tokens += 1;
        if let Cache::Budget(cache) = &mut self.cache
            && self.tokens >= self.args.from
            && !cache.recompress_if_due()?.is_empty()
        {
            cache.reserve(0, self.args.recompress_every)?;
        }
        self.greedy(&hidden)
    }

    fn greedy(&self, hidden: &Tensor) -> Result<u32> {
        let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
        Ok(self.model.logits(&last)?.squeeze(0)?.argmax(0)?.to_scalar()?)
    }

    fn report(
        &self,
        prompt: usize,
        first_token: Duration,
        generated: usize,
        decoding: Duration,
    ) -> Result<()> {
        let geometry = self.model.geometry()?;
        let tokens = u64::from(self.tokens);
        let full = geometry.bytes(tokens);
        // The first token came with the prompt.
        let steps = generated.saturating_sub(1) as f64;
        eprintln!(
            "\nprompt {prompt} tokens, first token after {:.2} s; answer {generated} tokens, {:.1} tokens/s",
            first_token.as_secs_f64(),
            steps / decoding.as_secs_f64().max(1e-9),
        );
        match &self.cache {
            Cache::Dense(_) => {
                eprintln!("cache: {} for {tokens} tokens, all kept", HumanBytes(full))
            }
            Cache::Budget(cache) => {
                let sequence = &cache.sequences()[0];
                eprintln!(
                    "cache: {} of {} for {tokens} tokens; {} of {} slots; at most {} while reading",
                    HumanBytes(sequence.bytes_used()),
                    HumanBytes(full),
                    sequence.slots(),
                    geometry.slots(tokens),
                    HumanBytes(self.peak),
                );
            }
        }
        Ok(())
    }
}

/// Shows which layer a hook is at.
struct Ticking<'h> {
    hook: &'h mut dyn AttentionHook,
    bar: &'h ProgressBar,
}

impl AttentionHook for Ticking<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> candle_core::Result<Tensor> {
        self.bar.set_position(layer as u64);
        self.hook.attend(layer, q, k, v, spans)
    }
}
