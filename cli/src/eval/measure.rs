//! Two numbers per layer, query head and query: how far the output is from the full cache's, and how much
//! of the attention on the context lies on what was kept. And one per layer and query, where the dump holds the output
//! projection: how far what the layer adds to the residual stream is from the full cache's.
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
use rayon::prelude::*;

use crate::dump::{Layer, Next};

/// What was measured of one plan.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples {
    /// By layer, query head and query.
    pub error: Vec<f64>,
    /// By layer, query head and query.
    pub mass: Vec<f64>,
    /// By layer and query; empty without output projections.
    pub layer_error: Vec<f64>,
}

/// Attention over the full cache of a layer.
pub(super) struct Reference {
    /// Rows of `F·D` per query head.
    output: Ragged<f32>,
    /// The output projection, and what the layer adds to the residual stream: a row per query.
    projected: Option<(Vec<f32>, Vec<Vec<f64>>)>,
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
        let projected = layer.o_proj.as_ref().map(|o_proj| {
            let weights = o_proj.to_f32();
            let rows = project(&weights, &output, layer.shape().head_dim());
            (weights, rows)
        });
        Ok(Self { output, projected, lse })
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
        if let Some((weights, full)) = &self.projected {
            let got = project(weights, &output, dim);
            let rows = full.iter().zip(&got);
            samples.layer_error.extend(rows.map(|(full, got)| relative_l2_of(full, got)));
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

/// The heads' outputs of each query through the output projection.
fn project(weights: &[f32], output: &Ragged<f32>, dim: usize) -> Vec<Vec<f64>> {
    let columns = output.rows() * dim;
    let query = |i: usize| -> Vec<f64> {
        let heads: Vec<f32> =
            output.iter().flat_map(|head| &head[i * dim..(i + 1) * dim]).copied().collect();
        let product = |row: &[f32]| row.iter().zip(&heads).map(|(w, x)| f64::from(w * x)).sum();
        weights.chunks_exact(columns).map(product).collect()
    };
    let queries = output.len(0) / dim;
    (0..queries).into_par_iter().map(query).collect()
}

fn relative_l2(full: &[f32], got: &[f32]) -> f64 {
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    relative_l2_of(&wide(full), &wide(got))
}

fn relative_l2_of(full: &[f64], got: &[f64]) -> f64 {
    let norm: f64 = full.iter().map(|x| x * x).sum();
    let distance: f64 = full.iter().zip(got).map(|(a, b)| (a - b) * (a - b)).sum();
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
