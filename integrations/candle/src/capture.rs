//! Capturing what attention sees: a hook that records, and the dump made of its records.
//!
//! A dump holds a context of `T` tokens and the `F` tokens that really follow it, so that a
//! method can choose slots from the context and be judged on queries it has not seen.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use kvbudget::{ExpectedQueries, QueryMoments, Spans};

use crate::attention::{AttentionHook, DenseAttention, Span};
use crate::dump::Dump;
use crate::llama::Llama;
use crate::moments;

/// Tokens run at once: bounds the score matrix, which grows with this times the context.
const CHUNK: usize = 512;

/// Records queries, keys and values of some layers, and norms of the rows that enter them, and leaves the attention to another hook.
pub struct CaptureAttention<A> {
    inner: A,
    records: Vec<Record>,
    /// Whether what runs is a probe.
    probing: bool,
}

#[derive(Default)]
struct Record {
    layer: usize,
    q: Vec<Tensor>,
    k: Vec<Tensor>,
    v: Vec<Tensor>,
    norms: Vec<Tensor>,
    /// Queries of the probe.
    probe: Vec<Tensor>,
}

impl<A: AttentionHook> CaptureAttention<A> {
    pub fn new(inner: A, layers: &[usize]) -> Self {
        let records = layers.iter().map(|&layer| Record { layer, ..Record::default() }).collect();
        Self { inner, records, probing: false }
    }
}

impl<A: AttentionHook> AttentionHook for CaptureAttention<A> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> candle_core::Result<Tensor> {
        if let Some(record) = self.records.iter_mut().find(|r| r.layer == layer) {
            if self.probing {
                record.probe.push(q.clone());
                return self.inner.attend(layer, q, k, v, spans);
            }
            record.q.push(q.clone());
            record.k.push(k.clone());
            record.v.push(v.clone());
        }
        self.inner.attend(layer, q, k, v, spans)
    }

    fn hidden(&mut self, layer: usize, rows: &Tensor, spans: &[Span]) -> candle_core::Result<()> {
        if let Some(record) = self.records.iter_mut().find(|r| r.layer == layer && !self.probing) {
            record.norms.push(rows.to_dtype(DType::F32)?.sqr()?.sum(1)?.sqrt()?);
        }
        self.inner.hidden(layer, rows, spans)
    }

    fn rollback(&mut self, sequence: usize, tokens: u32) -> candle_core::Result<()> {
        self.inner.rollback(sequence, tokens)
    }
}

/// What to capture.
#[derive(Debug, Clone)]
pub struct CaptureOptions {
    /// Layers of the model, ascending; the dump counts them from zero.
    pub layers: Vec<usize>,
    /// `T`, the tokens of the context.
    pub tokens: usize,
    /// `W`, the last context positions whose queries are kept.
    pub window: usize,
    /// `F`, the tokens after the context.
    pub next: usize,
    pub dtype: DType,
    /// Whether to dump the norms of hidden rows.
    pub hidden_norms: bool,
    /// Positions over which to dump what is expected of the queries to come; none for 0.
    pub expected: u32,
    /// Tokens that are run behind the context and rolled back, for their queries; none without.
    pub probe: Vec<u32>,
    /// What stretches of the context are, if that is known.
    pub spans: Spans,
}

impl Default for CaptureOptions {
    /// The first layer, as the command line has the rest.
    fn default() -> Self {
        Self {
            layers: vec![0],
            tokens: 704,
            window: 64,
            next: 32,
            dtype: DType::F16,
            hidden_norms: false,
            expected: 0,
            probe: Vec::new(),
            spans: Spans::default(),
        }
    }
}

impl CaptureOptions {
    fn check(&self, model: &Llama, available: usize) -> Result<()> {
        let config = model.config();
        if self.tokens == 0 || self.next == 0 {
            bail!("the context and the next tokens must be at least one token each");
        }
        if self.window == 0 || self.window > self.tokens {
            bail!("a window of {} does not fit a context of {}", self.window, self.tokens);
        }
        let total = self.tokens.saturating_add(self.next.max(self.probe.len()));
        if total > config.context_length {
            bail!("{total} tokens exceed the model's context of {}", config.context_length);
        }
        if self.tokens.saturating_add(self.next) > available {
            bail!(
                "the text is too short: it has {available} tokens, {} + {} are needed",
                self.tokens,
                self.next
            );
        }
        if self.spans.end() as usize > self.tokens {
            bail!("spans end at {}, the context at {}", self.spans.end(), self.tokens);
        }
        if !matches!(self.dtype, DType::F16 | DType::BF16 | DType::F32) {
            bail!("a dump cannot hold {}", self.dtype.as_str());
        }
        let Some(&last) = self.layers.last() else {
            bail!("no layers to capture");
        };
        if !self.layers.is_sorted_by(|a, b| a < b) {
            bail!("layers {:?} are not in ascending order", self.layers);
        }
        if last >= config.layers {
            bail!("there is no layer {last}: the model has layers 0 to {}", config.layers - 1);
        }
        Ok(())
    }
}

/// Runs the first `T + F` of `ids` through dense attention and dumps the chosen layers.
pub fn capture(model: &Llama, ids: &[u32], options: &CaptureOptions) -> Result<Dump> {
    let dense = DenseAttention::new(model.config().layers);
    capture_with(model, ids, options, dense)
}

/// The same with another hook in place of dense attention.
pub fn capture_with<A: AttentionHook>(
    model: &Llama,
    ids: &[u32],
    options: &CaptureOptions,
    inner: A,
) -> Result<Dump> {
    options.check(model, ids.len())?;
    let ids = &ids[..options.tokens + options.next];
    let mut hook = CaptureAttention::new(inner, &options.layers);
    let (context, next) = ids.split_at(options.tokens);
    let run = |hook: &mut CaptureAttention<A>, first: usize, ids: &[u32]| -> Result<()> {
        for (index, chunk) in ids.chunks(CHUNK).enumerate() {
            let span = Span::new((first + index * CHUNK) as u32, chunk.len() as u32);
            model.forward(chunk, &[span], hook)?;
        }
        Ok(())
    };
    run(&mut hook, 0, context)?;
    if !options.probe.is_empty() {
        hook.probing = true;
        run(&mut hook, context.len(), &options.probe)?;
        hook.rollback(0, context.len() as u32)?;
        hook.probing = false;
    }
    run(&mut hook, context.len(), next)?;

    let mut dump = Dump::default();
    for (index, record) in hook.records.iter().enumerate() {
        record
            .write(&mut dump, index, options)
            .and_then(|()| match options.expected {
                0 => Ok(()),
                _ => record.write_expected(&mut dump, index, options, model),
            })
            .with_context(|| format!("cannot capture layer {}", record.layer))?;
        if let Some(o_proj) = model.output_projection(record.layer) {
            dump.insert(format!("l{index}.o_proj"), o_proj, options.dtype)?;
        }
    }
    for (key, value) in [
        ("format", "kvbudget-dump".to_string()),
        ("version", version(options).to_string()),
        ("source_layers", join(&options.layers)),
        ("tokens", options.tokens.to_string()),
        ("token_ids", join(ids)),
    ] {
        dump.metadata.insert(key.to_string(), value);
    }
    if options.spans.iter().next().is_some() {
        dump.metadata.insert("spans".to_string(), options.spans.to_string());
    }
    Ok(dump)
}

/// The oldest that knows what is dumped.
fn version(options: &CaptureOptions) -> u32 {
    let CaptureOptions { hidden_norms, expected, probe, spans, .. } = options;
    let more = *hidden_norms || *expected > 0 || !probe.is_empty();
    if more || spans.iter().next().is_some() { 2 } else { 1 }
}

impl Record {
    fn write(&self, dump: &mut Dump, index: usize, options: &CaptureOptions) -> Result<()> {
        let &CaptureOptions { tokens, window, next, dtype, .. } = options;
        // The dump has heads first.
        let heads_first = |parts: &[Tensor]| Tensor::cat(parts, 0)?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (heads_first(&self.q)?, heads_first(&self.k)?, heads_first(&self.v)?);
        for (name, tensor, start, length) in [
            ("k", &k, 0, tokens),
            ("v", &v, 0, tokens),
            ("q", &q, tokens - window, window),
            ("q_next", &q, tokens, next),
            ("k_next", &k, tokens, next),
            ("v_next", &v, tokens, next),
        ] {
            let part = tensor.narrow(1, start, length)?;
            dump.insert(format!("l{index}.{name}"), &part, dtype)?;
        }
        if !self.probe.is_empty() {
            dump.insert(format!("l{index}.q_probe"), &heads_first(&self.probe)?, dtype)?;
        }
        if options.hidden_norms {
            let norms = Tensor::cat(&self.norms, 0)?.narrow(0, 0, tokens)?;
            dump.insert(format!("l{index}.hidden_norms"), &norms, DType::F32)?;
        }
        Ok(())
    }

    /// Mean and covariance of the queries behind the context, from those of the context.
    fn write_expected(
        &self,
        dump: &mut Dump,
        index: usize,
        options: &CaptureOptions,
        model: &Llama,
    ) -> Result<()> {
        let (shape, rope) = (model.geometry()?.layers()[self.layer], model.rope()?);
        let mut moments = QueryMoments::new(shape);
        let q = Tensor::cat(&self.q, 0)?.narrow(0, 0, options.tokens)?;
        moments::push(&mut moments, &rope, 0, &q)?;
        let tokens = options.tokens as u32;
        let expected = moments.expected(&rope, tokens..tokens.saturating_add(options.expected))?;
        let (heads, dim) = (shape.query_heads(), shape.head_dim());
        let rows = |of: fn(&ExpectedQueries, usize) -> &[f32]| -> Vec<f32> {
            (0..heads).flat_map(|head| of(&expected, head).to_vec()).collect()
        };
        let mean = Tensor::from_vec(rows(ExpectedQueries::mean), (heads, dim), &Device::Cpu)?;
        let covariance = rows(ExpectedQueries::covariance);
        let covariance = Tensor::from_vec(covariance, (heads, dim, dim), &Device::Cpu)?;
        dump.insert(format!("l{index}.expected_mean"), &mean, DType::F32)?;
        dump.insert(format!("l{index}.expected_covariance"), &covariance, DType::F32)
    }
}

fn join<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(",")
}
