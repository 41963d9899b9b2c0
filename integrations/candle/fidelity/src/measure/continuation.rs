//! Continuation: how much less likely is what really follows, and how far is each layer's attention off?
//!
//! Loss is that of the whole model, in which errors of layers add up. The attention error is that of one layer
//! alone: the compressed cache answers the queries of the dense run, which also supplies the new keys and values.

use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::{D, Device, Tensor};
use candle_nn::ops::log_softmax;
use kvbudget_candle::{AttentionHook, BudgetCache, Span};

use super::batch::Batch;
use super::dense::Dense;
use super::{BATCH, Bench};
use crate::record::{Measured, Mode, Order, Outcome, Record, Seconds};
use crate::variant::Variant;

/// Tokens whose loss is measured: those after the first one that is read from a compressed cache.
pub const NEXT: usize = 128;

/// Tokens that a context takes of the book.
fn stride(length: usize) -> usize {
    length + NEXT + 1
}

impl Bench {
    /// Contexts of a length that do not overlap, in the half of the book that belongs to a seed: seeds
    /// below twice as many have one.
    pub fn continuations(&self, seed: u64, length: usize) -> u64 {
        (self.books[(seed % 2) as usize].len() / stride(length)) as u64
    }

    pub(super) fn continuation(&self, order: &Order) -> Result<Vec<Record>> {
        let item = order.item;
        let number = item.seed / 2;
        let available = self.continuations(item.seed, item.length);
        if number >= available {
            bail!("the prose has {available} contexts of this length, there is none for this seed");
        }
        let start = number as usize * stride(item.length);
        let text = &self.books[(item.seed % 2) as usize][start..start + stride(item.length)];
        let (context, next) = text.split_at(item.length);

        let mut records = Vec::new();
        for (mode, variants) in &order.runs {
            let mut seconds = Seconds::default();
            let mut dense = Dense::new(self, variants.iter())?;
            dense.read(context, &mut seconds)?;
            let truth = self.record(&dense, &next[..NEXT], &mut seconds)?;
            let mut outcomes = Vec::new();
            for group in variants.chunks(BATCH) {
                outcomes.extend(self.losses(&dense, group, next, &truth, &mut seconds)?);
            }
            let (tokens, mode) = (dense.tokens(), *mode);
            debug_assert_eq!(mode, Mode::Agnostic);
            records.push(Record { item, mode, tokens, outcomes, seconds });
        }
        Ok(records)
    }

    /// What attention sees and does when the full cache reads `ids`.
    fn record(&self, dense: &Dense<'_>, ids: &[u32], seconds: &mut Seconds) -> Result<Vec<Seen>> {
        let full = Variant::full();
        let plan = &dense.plans(std::slice::from_ref(&full), seconds)?[0];
        let sequence = dense.gather(&full, plan, ids.len(), seconds)?.sequence;
        let mut batch = Batch::new(self, [sequence])?;
        let spans = batch.hook().spans(&[ids.len() as u32]);
        let mut recorder = Recorder { inner: batch.hook(), seen: Vec::new() };
        let start = Instant::now();
        self.model.forward(ids, &spans, &mut recorder)?;
        seconds.read += start.elapsed().as_secs_f64();
        Ok(recorder.seen)
    }

    /// One batch of variants.
    fn losses(
        &self,
        dense: &Dense<'_>,
        variants: &[Variant],
        next: &[u32],
        truth: &[Seen],
        seconds: &mut Seconds,
    ) -> Result<Vec<Outcome>> {
        let plans = dense.plans(variants, seconds)?;
        let copies = |seconds: &mut Seconds| -> Result<Batch<'_>> {
            let copies = variants.iter().zip(&plans);
            let copies = copies.map(|(v, plan)| Ok(dense.gather(v, plan, NEXT, seconds)?.sequence));
            Batch::new(self, copies.collect::<Result<Vec<_>>>()?)
        };
        let mut batch = copies(seconds)?;
        let start = Instant::now();
        let errors = errors(&mut batch, truth)?;
        seconds.error += start.elapsed().as_secs_f64();

        let mut batch = copies(seconds)?;
        let start = Instant::now();
        let hidden = batch.read(&next[..NEXT])?;
        let mut outcomes = Vec::new();
        for (i, ((variant, plan), errors)) in variants.iter().zip(&plans).zip(errors).enumerate() {
            let loss = self.loss(&hidden.get(i)?, &next[1..])?;
            let measured = Measured::Continuation { loss, errors };
            outcomes.push(Outcome { variant: variant.clone(), slots: plan.slots, measured });
        }
        seconds.read += start.elapsed().as_secs_f64();
        Ok(outcomes)
    }

    /// Mean negative log-likelihood of `next` behind each of the `hidden` states.
    fn loss(&self, hidden: &Tensor, next: &[u32]) -> Result<f64> {
        let known = Tensor::new(next, &Device::Cpu)?.unsqueeze(1)?;
        let likely = log_softmax(&self.model.logits(hidden)?, D::Minus1)?.gather(&known, 1)?;
        Ok(-f64::from(likely.mean_all()?.to_scalar::<f32>()?))
    }
}

/// The relative L2 error of every sequence's attention output, by layer.
fn errors(batch: &mut Batch<'_>, truth: &[Seen]) -> Result<Vec<Vec<f64>>> {
    let count = batch.len();
    let mut errors = vec![Vec::new(); count];
    let tokens = vec![NEXT as u32; count];
    let spans = batch.hook().spans(&tokens);
    for (layer, seen) in truth.iter().enumerate() {
        let all = |tensor: &Tensor| tensor.repeat((count, 1, 1));
        let (q, k, v) = (all(&seen.q)?, all(&seen.k)?, all(&seen.v)?);
        let output = batch.hook().attend(layer, &q, &k, &v, &spans)?;
        let norm = |tensor: &Tensor| tensor.sqr()?.sum_all()?.to_scalar::<f32>();
        let whole = f64::from(norm(&seen.output)?);
        for (i, errors) in errors.iter_mut().enumerate() {
            let apart = (output.narrow(0, i * NEXT, NEXT)? - &seen.output)?;
            errors.push((f64::from(norm(&apart)?) / whole).sqrt());
        }
    }
    Ok(errors)
}

/// What one layer's attention was given, and gave.
struct Seen {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
}

/// Records what passes through.
struct Recorder<'c> {
    inner: &'c mut BudgetCache,
    seen: Vec<Seen>,
}

impl AttentionHook for Recorder<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> candle_core::Result<Tensor> {
        let output = self.inner.attend(layer, q, k, v, spans)?;
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        self.seen.push(Seen { q, k, v, output: output.clone() });
        Ok(output)
    }
}
