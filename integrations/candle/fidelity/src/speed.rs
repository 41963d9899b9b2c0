//! Speed: time to the first token, tokens per second after it, and memory of the caches, dense and compressed.
//!
//! All caches take turns, prefill by prefill and token by token, so that a machine that slows down slows all of
//! them; medians are reported, and ratios are of medians.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Span};
use serde::Serialize;

use crate::measure::Bench;
use crate::variant::Variant;

/// How much is measured.
pub struct Schedule<'a> {
    pub lengths: &'a [usize],
    /// Tokens that each cache decodes.
    pub steps: usize,
    /// Prefills of each cache.
    pub rounds: usize,
}

/// One cache at one length; times are medians.
#[derive(Debug, Serialize)]
pub struct Speed {
    pub length: usize,
    pub cache: String,
    /// From the prompt's first token to the first one generated.
    pub first_token_seconds: f64,
    pub tokens_per_second: f64,
    /// Attention of all layers, in one decode step.
    pub attention_microseconds: f64,
    /// Slots held when decoding starts.
    pub slots: u64,
    /// The most bytes that keys and values took, room to grow and copies included; for candle's cache, that of
    /// its tokens alone.
    pub peak_bytes: u64,
}

/// A cache under test.
enum Subject {
    /// Candle's own.
    Dense(DenseAttention),
    /// Ours: `true` if it is compressed while the prompt is read.
    Budget(Box<BudgetCache>, bool),
}

struct Run {
    name: String,
    subject: Subject,
    next: u32,
    prefills: Vec<f64>,
    steps: Vec<f64>,
    attention: Vec<f64>,
    slots: u64,
    peak: u64,
}

/// Measures, writes speed.json and speed.md, and returns the table.
pub fn write(
    bench: &Bench,
    schedule: &Schedule<'_>,
    variants: &[Variant],
    folder: &Path,
) -> Result<String> {
    let mut all = Vec::new();
    for &length in schedule.lengths {
        all.extend(measure(bench, schedule, length, variants)?);
    }
    let table = markdown(&all);
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let save = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    save("speed.json", &serde_json::to_string_pretty(&all)?)?;
    save("speed.md", &table)?;
    Ok(table)
}

fn measure(
    bench: &Bench,
    schedule: &Schedule<'_>,
    length: usize,
    variants: &[Variant],
) -> Result<Vec<Speed>> {
    ensure!(schedule.rounds > 0 && schedule.steps > 0, "nothing to time: no rounds or no steps");
    let book = bench.book();
    ensure!(
        length > 0 && length <= book.len(),
        "the prose has {} tokens, not {length}",
        book.len()
    );
    let prompt = &book[..length];
    let full = Variant::full();
    let mut names = vec![("candle, dense".to_owned(), None), ("full".to_owned(), Some(&full))];
    names.extend(variants.iter().map(|v| (format!("{} {}", v.policy, v.budget), Some(v))));
    let mut runs = Vec::new();
    for (name, variant) in &names {
        runs.push(Run::new(bench, name, *variant)?);
    }
    for _ in 0..schedule.rounds {
        for (run, (_, variant)) in runs.iter_mut().zip(&names) {
            run.subject = subject(bench, *variant)?;
            run.prefill(bench, prompt)?;
        }
    }
    for _ in 0..schedule.steps {
        for run in &mut runs {
            run.step(bench, length)?;
        }
    }
    Ok(runs.into_iter().map(|run| run.speed(length)).collect())
}

fn subject(bench: &Bench, variant: Option<&Variant>) -> Result<Subject> {
    let Some(variant) = variant else {
        return Ok(Subject::Dense(DenseAttention::new(bench.geometry().layers().len())));
    };
    let (policy, budget) = variant.build()?;
    let (config, o_proj) = (policy.config().clone(), bench.output_projections().to_vec());
    let mut cache = BudgetCache::new(bench.geometry().clone(), o_proj, config, budget)?;
    if cache.wants_rope() {
        cache = cache.with_rope(bench.model().rope()?);
    }
    cache.add_sequence()?;
    Ok(Subject::Budget(Box::new(cache), !variant.is_full()))
}

impl Run {
    fn new(bench: &Bench, name: &str, variant: Option<&Variant>) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            subject: subject(bench, variant)?,
            next: 0,
            prefills: Vec::new(),
            steps: Vec::new(),
            attention: Vec::new(),
            slots: 0,
            peak: 0,
        })
    }

    fn prefill(&mut self, bench: &Bench, prompt: &[u32]) -> Result<()> {
        let spans = [Span::new(0, prompt.len() as u32)];
        let start = Instant::now();
        let hidden = match &mut self.subject {
            Subject::Dense(dense) => bench.model().forward(prompt, &spans, dense)?,
            Subject::Budget(cache, false) => bench.model().forward(prompt, &spans, &mut **cache)?,
            Subject::Budget(cache, true) => {
                let mut hook = cache.compressing();
                let hidden = bench.model().forward(prompt, &spans, &mut hook)?;
                hook.finish()?;
                hidden
            }
        };
        self.next = greedy(bench, &hidden)?;
        self.prefills.push(start.elapsed().as_secs_f64());
        self.slots = match &self.subject {
            Subject::Dense(_) => bench.geometry().slots(prompt.len() as u64),
            Subject::Budget(cache, _) => cache.sequences()[0].slots(),
        };
        Ok(())
    }

    fn step(&mut self, bench: &Bench, length: usize) -> Result<()> {
        let position = (length + self.steps.len()) as u32;
        let inner: &mut dyn AttentionHook = match &mut self.subject {
            Subject::Dense(dense) => dense,
            Subject::Budget(cache, _) => &mut **cache,
        };
        let mut timed = Timed { inner, spent: Duration::ZERO };
        let start = Instant::now();
        let hidden = bench.model().forward(&[self.next], &[Span::new(position, 1)], &mut timed)?;
        let attention = timed.spent.as_secs_f64();
        self.next = greedy(bench, &hidden)?;
        self.steps.push(start.elapsed().as_secs_f64());
        self.attention.push(attention);
        self.peak = match &self.subject {
            Subject::Dense(_) => bench.geometry().bytes(u64::from(position) + 1),
            Subject::Budget(cache, _) => cache.peak_bytes(),
        };
        Ok(())
    }

    fn speed(self, length: usize) -> Speed {
        Speed {
            length,
            cache: self.name,
            first_token_seconds: median(self.prefills),
            tokens_per_second: 1.0 / median(self.steps),
            attention_microseconds: median(self.attention) * 1e6,
            slots: self.slots,
            peak_bytes: self.peak,
        }
    }
}

/// Measures what it hands on.
struct Timed<'h> {
    inner: &'h mut dyn AttentionHook,
    spent: Duration,
}

impl AttentionHook for Timed<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> candle_core::Result<Tensor> {
        let start = Instant::now();
        let output = self.inner.attend(layer, q, k, v, spans)?;
        self.spent += start.elapsed();
        Ok(output)
    }
}

fn greedy(bench: &Bench, hidden: &Tensor) -> Result<u32> {
    let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
    Ok(bench.model().logits(&last)?.squeeze(0)?.argmax(0)?.to_scalar()?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn markdown(all: &[Speed]) -> String {
    let mut out = String::from(
        "| tokens | cache | first token, s | tokens/s | attention, µs/step | ns/slot | slots | peak, MB |\n\
         |---:|---|---:|---:|---:|---:|---:|---:|\n",
    );
    for block in all.chunk_by(|a, b| a.length == b.length) {
        let base = &block[0];
        for s in block {
            out += &format!(
                "| {} | {} | {:.2} (×{:.2}) | {:.1} (×{:.2}) | {:.0} (×{:.2}) | {:.2} | {} | {:.1} |\n",
                s.length,
                s.cache,
                s.first_token_seconds,
                s.first_token_seconds / base.first_token_seconds,
                s.tokens_per_second,
                s.tokens_per_second / base.tokens_per_second,
                s.attention_microseconds,
                s.attention_microseconds / base.attention_microseconds,
                s.attention_microseconds * 1e3 / s.slots as f64,
                s.slots,
                s.peak_bytes as f64 / 1e6
            );
        }
    }
    out
}
