//! Capturing what attention sees: a hook that records, and the dump made of its records.
//!
//! A dump holds a context of `T` tokens and the `F` tokens that really follow it, so that a
//! method can choose slots from the context and be judged on queries it has not seen.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};

use crate::attention::{AttentionHook, DenseAttention, Span};
use crate::dump::Dump;
use crate::llama::Llama;

/// Tokens run at once: bounds the score matrix, which grows with this times the context.
const CHUNK: usize = 512;

/// Records queries, keys and values of some layers and leaves the attention to another hook.
pub struct CaptureAttention<A> {
    inner: A,
    records: Vec<Record>,
}

struct Record {
    layer: usize,
    q: Vec<Tensor>,
    k: Vec<Tensor>,
    v: Vec<Tensor>,
}

impl<A: AttentionHook> CaptureAttention<A> {
    pub fn new(inner: A, layers: &[usize]) -> Self {
        let records = layers
            .iter()
            .map(|&layer| Record { layer, q: Vec::new(), k: Vec::new(), v: Vec::new() })
            .collect();
        Self { inner, records }
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
            record.q.push(q.clone());
            record.k.push(k.clone());
            record.v.push(v.clone());
        }
        self.inner.attend(layer, q, k, v, spans)
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
        let total = self.tokens.saturating_add(self.next);
        if total > config.context_length {
            bail!("{total} tokens exceed the model's context of {}", config.context_length);
        }
        if total > available {
            bail!(
                "the text is too short: it has {available} tokens, {} + {} are needed",
                self.tokens,
                self.next
            );
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
    for (index, chunk) in ids.chunks(CHUNK).enumerate() {
        let span = Span { position: (index * CHUNK) as u32, tokens: chunk.len() as u32 };
        model.forward(chunk, &[span], &mut hook)?;
    }

    let mut dump = Dump::default();
    for (index, record) in hook.records.iter().enumerate() {
        record
            .write(&mut dump, index, options)
            .with_context(|| format!("cannot capture layer {}", record.layer))?;
        if let Some(o_proj) = model.output_projection(record.layer) {
            dump.insert(format!("l{index}.o_proj"), o_proj, options.dtype)?;
        }
    }
    for (key, value) in [
        ("format", "kvbudget-dump".to_string()),
        ("version", "1".to_string()),
        ("source_layers", join(&options.layers)),
        ("tokens", options.tokens.to_string()),
        ("token_ids", join(ids)),
    ] {
        dump.metadata.insert(key.to_string(), value);
    }
    Ok(dump)
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
        Ok(())
    }
}

fn join<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(",")
}
