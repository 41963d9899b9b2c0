//! Scores from the last queries: softmax attention, reduced over the window and the group.
//!
//! In: q `[Hq, ≥W, D]`, k `[H, len, D]`; out `[H, len]` f32. Sources: SnapKV (the window), DefensiveKV
//! (`row_pool`: its code pools every row and scales it back to its mass), H2O (`W = T`).
//!
//! Two passes over K, because a probability is final only when its row's denominator is known and storing
//! `[Hq, W, len]` costs more memory than a second product costs time. Pass 1 finds the maximum and the sums
//! of each row; pass 2 forms probabilities tile by tile and reduces them at once. With the prefill's
//! log-sum-exp pass 1 is skipped, unless `row_pool` needs the mass that a row has on the past.
//! Cost: `4·Hq·W·len·D` flops, two reads of K, and as many exponentials as probabilities, twice. Scratch per
//! thread: a tile of K, a block of queries and their product, under 0.5 MiB at `D = 128`.
//!
//! Positions ascend, so the slots that a query sees are a prefix of the head, and so is the past. Every tile
//! and piece has a size that follows from the shapes; partial results are joined in slot order: the number of
//! threads does not change a bit.

mod stats;

use std::ops::Range;

use rayon::prelude::*;

use super::tile::{self, exp, max2, simd};
use super::{HostLayer, HostSlice};
use crate::backend::check;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use crate::view::Rows;
use stats::{Stat, row_stats};

/// Slots per tile: K tile, queries and logits stay in L2 together.
const TILE: usize = 256;
/// Query rows per block (of all heads of a group); at least one token's.
const BLOCK: usize = 128;

const METHOD: &str = "window attention";

pub(super) fn run(
    op: &WindowAttention,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
    mut mean: Option<&mut Ragged<f32>>,
) -> Result<()> {
    check::window_attention(op, layers, out, mean.as_deref())?;
    let heads =
        tile::segments(layers).map(|(l, h)| Head::new(op, l, h)).collect::<Result<Vec<_>>>()?;
    let stats = row_stats(&heads);

    let means = mean.as_mut().map(|m| m.rows_mut());
    let mut means = means.into_iter().flatten();
    let mut tasks = Vec::new();
    for ((head, stats), row) in heads.iter().zip(&stats).zip(out.rows_mut()) {
        row.fill(0.0);
        let (scored, _) = row.split_at_mut(head.scored);
        let mut mean = means.next().map(|row| {
            row.fill(0.0);
            row.chunks_mut(TILE)
        });
        for (i, out) in scored.chunks_mut(TILE).enumerate() {
            let mean = mean.as_mut().and_then(Iterator::next);
            tasks.push((Tile { head, stats, start: i * TILE }, out, mean));
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (tile, out, mean)| {
        tile.reduce(scratch, out, mean)
    });
    Ok(())
}

/// One segment: what of it is scored, by which queries.
struct Head<'a> {
    op: &'a WindowAttention,
    layer: &'a HostLayer<'a>,
    q: &'a Rows<'a, HostSlice<'a>>,
    head: usize,
    /// Query rows used.
    window: u32,
    /// Slots before the window.
    past: usize,
    /// Slots that get a score: the past, or all.
    scored: usize,
    group: usize,
    /// Window tokens per block of query rows.
    block: usize,
}

impl<'a> Head<'a> {
    fn new(op: &'a WindowAttention, layer: &'a HostLayer<'a>, head: usize) -> Result<Self> {
        let q = layer.q(METHOD)?;
        let group = layer.shape().group();
        // A sequence shorter than the window is all window.
        let window = op.window.min(layer.tokens());
        for hq in head * group..(head + 1) * group {
            let rows = layer.lse().map_or(q.len(hq), |lse| q.len(hq).min(lse.len(hq)));
            if rows < window as usize {
                return Err(Error::TooFewQueries {
                    method: METHOD,
                    needed: u64::from(window),
                    got: rows as u64,
                });
            }
        }
        let first = layer.tokens() - window;
        let past = layer.slots_before(head, first);
        let scored = if op.score_window { layer.k().len(head) } else { past };
        let block = (BLOCK / group).max(1);
        Ok(Self { op, layer, q, head, window, past, scored, group, block })
    }

    fn window(&self) -> usize {
        self.window as usize
    }

    /// Slots visible to query row `w` of the window: the first ones.
    fn visible(&self, w: usize) -> usize {
        self.layer.slots_before(self.head, self.layer.tokens() - self.window + w as u32 + 1)
    }

    /// Slots that query row `w` of the window gives scores to: the first ones.
    fn reached(&self, w: usize) -> usize {
        let newest = self.layer.tokens() - self.window + w as u32 + 1;
        self.layer.slots_before(self.head, newest.saturating_sub(self.op.gap))
    }

    /// Blocks of window tokens.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (window, block) = (self.window(), self.block);
        (0..window).step_by(block).map(move |w| w..window.min(w + block))
    }

    /// Radius of the row pooling.
    fn radius(&self) -> usize {
        self.op.row_pool.unwrap_or(1) as usize / 2
    }

    /// Log-sum-exp of a row, if lent.
    fn lse(&self, g: usize, w: usize) -> Option<f32> {
        let lse = self.layer.lse()?;
        let hq = self.head * self.group + g;
        let HostSlice::F32(data) = lse.storage() else { return None };
        Some(data[lse.start(hq, lse.len(hq) - self.window() + w)])
    }
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    keys: Vec<f32>,
    /// Logits, then exponentials: `[g, w, slot]`.
    logits: Vec<f32>,
    /// One pooled row.
    row: Vec<f32>,
}

impl Scratch {
    /// Queries of a block, `[g, w, D]`, scaled so that their products are logits.
    fn load_queries(&mut self, head: &Head<'_>, block: Range<usize>) {
        let dim = head.q.dim();
        self.queries.resize(head.group * block.len() * dim, 0.0);
        for (g, dst) in self.queries.chunks_exact_mut(block.len() * dim).enumerate() {
            let hq = head.head * head.group + g;
            let first = head.q.len(hq) - head.window();
            tile::widen_rows(head.q, hq, first + block.start..first + block.end, dst);
        }
        // Before the product, which could overflow otherwise.
        let scale = (1.0 / (dim as f64).sqrt()) as f32;
        self.queries.iter_mut().for_each(|x| *x *= scale);
    }

    fn load_keys(&mut self, head: &Head<'_>, slots: Range<usize>) {
        self.keys.resize(slots.len() * head.q.dim(), 0.0);
        tile::widen_rows(head.layer.k(), head.head, slots, &mut self.keys);
    }

    fn multiply(&mut self, dim: usize) {
        self.logits.resize(self.queries.len() / dim * (self.keys.len() / dim), 0.0);
        tile::matmul_nt(dim, &self.queries, &self.keys, &mut self.logits);
    }
}

/// Pass 2: the scores of up to [`TILE`] slots.
struct Tile<'a> {
    head: &'a Head<'a>,
    stats: &'a [Stat],
    start: usize,
}

impl Tile<'_> {
    fn reduce(&self, x: &mut Scratch, out: &mut [f32], mean: Option<&mut [f32]>) {
        let head = self.head;
        let (group, width, radius) = (head.group, out.len(), head.radius());
        let end = self.start + width;
        // The tile and its halo.
        let slots = self.start.saturating_sub(radius)..head.scored.min(end + radius);
        x.load_keys(head, slots.clone());
        let mut scores = Reduction::new(head.op.over_window, group, width);
        let mut means = mean.is_some().then(|| Reduction::new(Reduce::Mean, group, width));
        for block in head.blocks().filter(|b| head.visible(b.end - 1) > slots.start) {
            x.load_queries(head, block.clone());
            x.multiply(head.q.dim());
            let stats = &self.stats[block.start * group..block.end * group];
            let rows = x.logits.chunks_exact_mut(slots.len());
            for (r, (row, stat)) in rows.zip(stats).enumerate() {
                let (g, w) = (r / block.len(), block.start + r % block.len());
                let seen = head.reached(w).clamp(slots.start, slots.end) - slots.start;
                simd(
                    #[inline(always)]
                    || {
                        row[..seen].iter_mut().for_each(|x| *x = exp(*x - stat.max));
                        row[seen..].fill(0.0);
                        let own = &row[self.start - slots.start..][..width];
                        if let Some(means) = &mut means {
                            means.add(g, own, stat.inverse());
                        }
                        match head.op.row_pool {
                            None => scores.add(g, own, stat.inverse()),
                            Some(kernel) => {
                                window_sums(
                                    row,
                                    self.start - slots.start,
                                    radius,
                                    width,
                                    &mut x.row,
                                );
                                scores.add(g, &x.row, stat.pooled_inverse(kernel));
                            }
                        }
                    },
                );
            }
            scores.end_block();
            means.iter_mut().for_each(Reduction::end_block);
        }
        scores.finish(head, head.op.over_group, out);
        if let (Some(means), Some(mean)) = (means, mean) {
            means.finish(head, Reduce::Mean, mean);
            mean[head.past.clamp(self.start, end) - self.start..].fill(0.0);
        }
    }
}

/// `out[i] = Σ row[first + i - radius ..= first + i + radius]`, zeros beyond the row's ends.
#[inline(always)]
fn window_sums(row: &[f32], first: usize, radius: usize, width: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(width, 0.0);
    // Tap by tap, so that the loop runs along slots.
    for tap in 0..2 * radius + 1 {
        // out[i] += row[first + tap - radius + i], where that exists.
        let (skip, from) =
            (radius.saturating_sub(first + tap).min(width), (first + tap).saturating_sub(radius));
        let from = from.min(row.len());
        out[skip..].iter_mut().zip(&row[from..]).for_each(|(o, &x)| *o += x);
    }
}

/// Running reduction over the window, per head of the group.
struct Reduction {
    kind: Reduce,
    width: usize,
    /// Maxima so far, or the sums of the current block: `[g, slot]`.
    part: Vec<f32>,
    /// Sums of the blocks before; windows can be long.
    sums: Vec<f64>,
}

impl Reduction {
    fn new(kind: Reduce, group: usize, width: usize) -> Self {
        let sums = if kind == Reduce::Mean { vec![0.0; group * width] } else { Vec::new() };
        Self { kind, width, part: vec![0.0; group * width], sums }
    }

    #[inline(always)]
    fn add(&mut self, g: usize, row: &[f32], factor: f32) {
        let part = self.part[g * self.width..][..self.width].iter_mut().zip(row);
        match self.kind {
            Reduce::Mean => part.for_each(|(a, &x)| *a += x * factor),
            Reduce::Max => part.for_each(|(a, &x)| *a = max2(*a, x * factor)),
        }
    }

    fn end_block(&mut self) {
        for (sum, part) in self.sums.iter_mut().zip(&mut self.part) {
            *sum += f64::from(std::mem::take(part));
        }
    }

    fn finish(mut self, head: &Head<'_>, over_group: Reduce, out: &mut [f32]) {
        let window = head.window() as f64;
        for (part, sum) in self.part.iter_mut().zip(&self.sums) {
            *part = (sum / window) as f32;
        }
        for (i, out) in out.iter_mut().enumerate() {
            let heads = self.part.iter().skip(i).step_by(self.width);
            *out = match over_group {
                Reduce::Mean => heads.sum::<f32>() / head.group as f32,
                Reduce::Max => heads.copied().fold(0.0, max2),
            };
        }
    }
}
