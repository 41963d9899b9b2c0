//! Two numbers per layer, query head and query: how far the output is from the full cache's, and how much
//! of the attention on the context lies on what was kept.
//!
//! The output goes the whole way of an engine: gather the kept slots, append the tokens that followed, attend
//! causally. For the mass, each query attends the context alone: with the `F` queries of a head taken
//! as `F` heads of one query, no token of the future is in the way, and the mass is the ratio of two softmax
//! denominators, kept over whole.

use anyhow::{Context, Result, ensure};
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::Attend;
use kvbudget::cache::FlatCache;
use kvbudget::{Position, Ragged, Rows};

use crate::dump::{Layer, Next};

/// One number per layer, query head and query, in that order.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples {
    pub error: Vec<f64>,
    pub mass: Vec<f64>,
}

/// Attention over the full cache of a layer.
pub(super) struct Reference {
    /// Rows of `F·D` per query head.
    output: Ragged<f32>,
    /// Log of the softmax denominators over the context, per query head and query.
    lse: Vec<f32>,
}

impl Reference {
    pub fn new(cpu: &Cpu, layer: &Layer) -> Result<Self> {
        let everything = (0..layer.shape().kv_heads())
            .map(|_| (0..layer.k.shape()[1]).map(Position).collect::<Vec<_>>());
        let (output, lse) = attend(cpu, layer, &everything.collect())?;
        ensure!(
            output.data().iter().all(|x| x.is_finite()),
            "the full cache's attention is not finite: see the non-finite counts of `inspect`"
        );
        Ok(Self { output, lse })
    }

    /// Adds the samples of a layer reduced to `kept`.
    pub fn compare(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        kept: &Ragged<Position>,
        samples: &mut Samples,
    ) -> Result<()> {
        let (output, lse) = attend(cpu, layer, kept)?;
        let dim = layer.shape().head_dim();
        for (full, got) in self.output.iter().zip(output.iter()) {
            let queries = full.chunks(dim).zip(got.chunks(dim));
            samples.error.extend(queries.map(|(full, got)| relative_l2(full, got)));
        }
        // A subset's denominator is never larger; rounding may say so by a bit.
        let shares = self.lse.iter().zip(&lse).map(|(full, kept)| f64::from(kept - full).exp());
        samples.mass.extend(shares.map(|share| share.min(1.0)));
        Ok(())
    }
}

/// The outputs of the next queries over kept and next tokens, and their denominators over the kept alone.
fn attend(cpu: &Cpu, layer: &Layer, kept: &Ragged<Position>) -> Result<(Ragged<f32>, Vec<f32>)> {
    let next = layer.next.as_ref().context("the layer was read without its next tokens")?;
    let (query_heads, count, dim) = (next.q.shape()[0], next.q.shape()[1], next.q.shape()[2]);
    let op = Attend { scale: 1.0 / (dim as f32).sqrt() };
    let mut cache = FlatCache::gather(&layer.view()?, kept, count)?;

    let single = Rows::heads_first(next.q.slice(), query_heads * count, 1, dim)?;
    let mut out = cpu.zeros(&vec![dim; (query_heads * count) as usize])?;
    let mut lse = cpu.zeros(&vec![1; (query_heads * count) as usize])?;
    cpu.attend(&op, &[cache.attend_view(single)?], &mut out, Some(&mut lse))?;
    let lse = lse.data().to_vec();

    let Next { q, k, v } = next;
    cache.append(&k.rows()?, &v.rows()?)?;
    let mut out = cpu.zeros(&vec![count * dim; query_heads as usize])?;
    let q: Rows<'_, HostSlice<'_>> = q.rows()?;
    cpu.attend(&op, &[cache.attend_view(q)?], &mut out, None)?;
    Ok((out, lse))
}

fn relative_l2(full: &[f32], got: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let norm: f64 = full.iter().map(|&x| square(x.into())).sum();
    let distance: f64 =
        full.iter().zip(got).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    if distance == 0.0 { 0.0 } else { (distance / norm).sqrt() }
}

pub(super) fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

/// Nearest rank: the smallest sample that is not below `percent` of all.
pub(super) fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}
