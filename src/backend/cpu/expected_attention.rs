//! Attention that normally distributed queries are expected to pay: `E[exp(q·k/√D)] = exp(μ·k/√D + kᵀΣk/(2D))`.
//!
//! In: k `[H, len, D]`, and of each query head μ `[D]` and Σ `[D, D]` f32; out `[H, len]` f32, the mean over the group of the softmax over
//! what is no sink. Source: ExpectedAttention (arXiv 2510.00636).
//!
//! Cost: `2·Hq·D²·len` flops, nearly all in the products of a tile of keys with each Σ, and two exponentials per logit. Logits of all
//! query heads stay in memory between the two passes. Sums are f64, of tiles and then over tiles in their order.

use rayon::prelude::*;

use super::isa::{Arithmetic, Isa, Kernel};
use super::{HostLayer, tile};
use crate::backend::check;
use crate::backend::ops::ExpectedAttention;
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots of a tile.
const TILE: usize = 256;

const METHOD: &str = "expected attention";

pub(super) fn run(
    isa: Isa,
    op: ExpectedAttention,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::expected_attention(layers, out)?;
    let heads: Vec<Head<'_>> = tile::segments(layers)
        .map(|(layer, head)| Head { layer, head, sinks: layer.slots_before(head, op.sinks) })
        .collect();
    // The logits of a segment: tile by tile, and in those query head by query head.
    let sizes = heads.iter().map(|head| head.layer.shape().group() * head.slots());
    let mut logits = Ragged::filled(sizes, 0.0f32);

    let mut tasks = Vec::new();
    for (s, (head, row)) in heads.iter().zip(logits.rows_mut()).enumerate() {
        let size = TILE * head.layer.shape().group();
        tasks.extend(row.chunks_mut(size).enumerate().map(|(i, tile)| (s, head, i, tile)));
    }
    let stats = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (s, head, i, tile)| {
            let start = head.sinks + i * TILE;
            Ok((s, scratch.logits(isa, head, start, tile)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut totals: Vec<Vec<Stat>> =
        heads.iter().map(|head| vec![Stat::NONE; head.layer.shape().group()]).collect();
    for (s, of_tile) in stats {
        totals[s].iter_mut().zip(of_tile).for_each(|(total, stat)| *total = total.with(stat));
    }

    let mut tasks = Vec::new();
    for (((head, row), totals), logits) in
        heads.iter().zip(out.rows_mut()).zip(&totals).zip(logits.iter())
    {
        let (sinks, scored) = row.split_at_mut(head.sinks);
        sinks.fill(0.0);
        let tiles = scored.chunks_mut(TILE).zip(logits.chunks(TILE * totals.len()));
        tasks.extend(tiles.map(|(out, logits)| (out, logits, totals)));
    }
    tasks.into_par_iter().for_each(|(out, logits, totals)| mean(out, logits, totals));
    Ok(())
}

/// A segment.
struct Head<'a> {
    layer: &'a HostLayer<'a>,
    head: usize,
    /// Slots at the start that are not scored.
    sinks: usize,
}

impl Head<'_> {
    /// Slots that are scored.
    fn slots(&self) -> usize {
        self.layer.k().len(self.head) - self.sinks
    }
}

/// The largest of some logits, and the sum of all exponentials less it.
#[derive(Clone, Copy)]
struct Stat {
    max: f32,
    sum: f64,
}

impl Stat {
    const NONE: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// NaN among the logits makes the sum NaN.
    fn of(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Self { max, sum: logits.iter().map(|&x| weight(x, max)).sum() }
    }

    fn with(self, other: Self) -> Self {
        let max = self.max.max(other.max);
        // Of no logits there is no maximum.
        let part =
            |stat: Self| if stat.sum == 0.0 { 0.0 } else { stat.sum * weight(stat.max, max) };
        Self { max, sum: part(self) + part(other) }
    }
}

fn weight(logit: f32, max: f32) -> f64 {
    f64::from(logit - max).exp()
}

/// Mean over the group of the softmax, from the logits of a tile.
fn mean(out: &mut [f32], logits: &[f32], totals: &[Stat]) {
    for (slot, mean) in out.iter_mut().enumerate() {
        let rows = logits.chunks_exact(logits.len() / totals.len()).zip(totals);
        let sum: f64 = rows.map(|(row, total)| weight(row[slot], total.max) / total.sum).sum();
        *mean = (sum / totals.len() as f64) as f32;
    }
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    products: Vec<f32>,
}

impl Scratch {
    /// Fills a tile with the logits of the slots from `start` on.
    fn logits(
        &mut self,
        isa: Isa,
        head: &Head<'_>,
        start: usize,
        tile: &mut [f32],
    ) -> Result<Vec<Stat>> {
        let Head { layer, head, .. } = *head;
        let (dim, group) = (layer.shape().head_dim(), layer.shape().group());
        let expected = layer.expected(METHOD)?;
        let slots = tile.len() / group;
        self.rows.resize(slots * dim, 0.0);
        self.products.resize(slots * dim, 0.0);
        tile::widen_rows(layer.k(), head, start..start + slots, &mut self.rows);
        let of_head = |(g, out): (usize, &mut [f32])| {
            let query_head = head * group + g;
            // It is symmetric.
            tile::matmul_nt(dim, &self.rows, expected.covariance(query_head), &mut self.products);
            let (mean, rows, products) = (expected.mean(query_head), &self.rows, &self.products);
            isa.run(Forms { mean, rows, products, out });
            Stat::of(out)
        };
        Ok(tile.chunks_exact_mut(slots).enumerate().map(of_head).collect())
    }
}

/// `μ·k/√D + k·(Σk)/(2D)` of each key and its product.
struct Forms<'a> {
    mean: &'a [f32],
    rows: &'a [f32],
    products: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forms<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { mean, rows, products, out } = self;
        let dim = mean.len();
        let (linear, square) = (1.0 / (dim as f32).sqrt(), 0.5 / dim as f32);
        let pairs = rows.chunks_exact(dim).zip(products.chunks_exact(dim));
        for (out, (key, product)) in out.iter_mut().zip(pairs) {
            let logit = linear * tile::dot(mean, key) + square * tile::dot(key, product);
            *out = if logit.is_finite() { logit } else { f32::NAN };
        }
    }
}
