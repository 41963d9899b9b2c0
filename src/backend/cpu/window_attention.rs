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

use std::ops::Range;

use rayon::prelude::*;

use super::rows::expect_segments;
use super::tile::{self, exp, max, max2, simd};
use super::{HostLayer, HostSlice};
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use crate::view::Rows;

/// Slots per tile: K tile, queries and logits stay in L2 together.
const TILE: usize = 256;
/// Query rows per block (of all heads of a group); at least one token's.
const BLOCK: usize = 128;
/// Slots that pass 1 gives to a task at least, and tasks that a head gets at most.
const PIECE: usize = 4 * TILE;
const PIECES: usize = 64;

const METHOD: &str = "window attention";

pub(super) fn run(
    op: &WindowAttention,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
    mut mean: Option<&mut Ragged<f32>>,
) -> Result<()> {
    if op.window == 0 {
        return Err(Error::Zero { what: "observation window" });
    }
    if let Some(kernel) = op.row_pool.filter(|k| k % 2 == 0) {
        return Err(Error::Parameter {
            name: "row_pool",
            expected: "an odd kernel",
            got: kernel.to_string(),
        });
    }
    expect_segments(layers, out)?;
    if let Some(mean) = &mean {
        expect_segments(layers, mean)?;
    }
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
        for hq in head * group..(head + 1) * group {
            let rows = layer.lse().map_or(q.len(hq), |lse| q.len(hq).min(lse.len(hq)));
            if rows < op.window as usize {
                return Err(Error::TooFewQueries {
                    method: METHOD,
                    needed: u64::from(op.window),
                    got: rows as u64,
                });
            }
        }
        let Some(first) = layer.tokens().checked_sub(op.window) else {
            return Err(Error::TooLarge {
                what: "observation window",
                got: u64::from(op.window),
                limit: u64::from(layer.tokens()),
            });
        };
        let past = layer.slots_before(head, first);
        let scored = if op.score_window { layer.k().len(head) } else { past };
        let block = (BLOCK / group).max(1);
        Ok(Self { op, layer, q, head, past, scored, group, block })
    }

    fn window(&self) -> usize {
        self.op.window as usize
    }

    /// Slots visible to query row `w` of the window: the first ones.
    fn visible(&self, w: usize) -> usize {
        self.layer.slots_before(self.head, self.layer.tokens() - self.op.window + w as u32 + 1)
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

/// Softmax statistics of one query row.
#[derive(Clone, Copy)]
struct Stat {
    /// What is subtracted from the logits: their maximum, or the log-sum-exp.
    max: f32,
    /// Sum of the exponentials over what the row sees.
    sum: f64,
    /// The part of it on scored slots.
    base: f64,
    /// The sum of the pooled row, before it is scaled back to `base`.
    pooled: f64,
}

impl Stat {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, base: 0.0, pooled: 0.0 };

    /// Moves the sums to another maximum.
    fn rescale(&mut self, max: f32) {
        if self.max == max {
            return;
        }
        // A row that has seen nothing has no maximum: its sums are zeros, whatever the factor.
        let factor = if self.sum == 0.0 { 1.0 } else { f64::from(self.max - max).exp() };
        self.max = max;
        self.sum *= factor;
        self.base *= factor;
        self.pooled *= factor;
    }

    fn merge(&mut self, mut other: Self) {
        if other.sum == 0.0 {
            return;
        }
        let max = max2(self.max, other.max);
        self.rescale(max);
        other.rescale(max);
        self.sum += other.sum;
        self.base += other.base;
        self.pooled += other.pooled;
    }

    /// Factor from exponential to probability.
    fn inverse(&self) -> f32 {
        if self.sum == 0.0 { 0.0 } else { (1.0 / self.sum) as f32 }
    }

    /// Factor from a sum of `kernel` exponentials to the pooled row at its former mass.
    fn pooled_inverse(&self, kernel: u32) -> f32 {
        if self.pooled == 0.0 || self.sum == 0.0 {
            return 0.0;
        }
        (self.base / self.pooled / (self.sum * f64::from(kernel))) as f32
    }
}

/// Pass 1: statistics of every row, by head; rows are `[g, w]` within each block of the window.
fn row_stats(heads: &[Head<'_>]) -> Vec<Vec<Stat>> {
    let mut tasks = Vec::new();
    for (i, head) in heads.iter().enumerate() {
        if head.scored == 0 || (head.layer.lse().is_some() && head.op.row_pool.is_none()) {
            continue;
        }
        let pieces = (PIECES / head.blocks().count()).max(1);
        for block in head.blocks() {
            let seen = head.visible(block.end - 1);
            let piece = seen.div_ceil(pieces).max(PIECE).next_multiple_of(TILE);
            for start in (0..seen).step_by(piece) {
                tasks.push((i, block.clone(), start..seen.min(start + piece)));
            }
        }
    }
    let parts: Vec<Vec<Stat>> = tasks
        .par_iter()
        .map_init(Scratch::default, |scratch, (i, block, slots)| {
            heads[*i].block_stats(scratch, block.clone(), slots.clone())
        })
        .collect();
    let mut stats: Vec<Vec<Stat>> = heads.iter().map(Head::initial_stats).collect();
    for ((i, block, _), part) in tasks.into_iter().zip(parts) {
        let first = block.start * heads[i].group;
        stats[i][first..].iter_mut().zip(part).for_each(|(stat, part)| stat.merge(part));
    }
    stats
}

impl Head<'_> {
    /// What is known before pass 1: with a log-sum-exp, everything but the masses on scored slots.
    fn initial_stats(&self) -> Vec<Stat> {
        let mut stats = Vec::with_capacity(self.group * self.window());
        for block in self.blocks() {
            for g in 0..self.group {
                stats.extend(block.clone().map(|w| match self.lse(g, w) {
                    Some(lse) if self.op.row_pool.is_none() => {
                        Stat { max: lse, sum: 1.0, ..Stat::EMPTY }
                    }
                    _ => Stat::EMPTY,
                }));
            }
        }
        stats
    }

    fn block_stats(&self, x: &mut Scratch, block: Range<usize>, slots: Range<usize>) -> Vec<Stat> {
        let mut stats = vec![Stat::EMPTY; self.group * block.len()];
        x.load_queries(self, block.clone());
        for start in slots.clone().step_by(TILE) {
            let tile = start..slots.end.min(start + TILE);
            x.load_keys(self, tile.clone());
            x.multiply(self.layer.shape().head_dim());
            let (rows, width) = (x.logits.chunks_exact_mut(tile.len()), block.len());
            for (r, (row, stat)) in rows.zip(&mut stats).enumerate() {
                let seen = self.visible(block.start + r % width).clamp(tile.start, tile.end);
                self.add(stat, &mut row[..seen - tile.start], tile.start);
            }
        }
        stats
    }

    /// Adds the visible logits of a row, from slot `start` on, to its statistics.
    fn add(&self, stat: &mut Stat, row: &mut [f32], start: usize) {
        if row.is_empty() {
            return;
        }
        let (n, r) = (self.scored, self.radius());
        // Scored slots, and among them those whose pooling windows all lie inside the row: the others
        // are counted by fewer than `kernel` windows.
        let local = |slot: usize| slot.clamp(start, start + row.len()) - start;
        let scored = local(n);
        let from = local(r.min(n));
        let to = local(n.saturating_sub(r)).max(from);
        let kernel = 2 * r + 1;
        let weight = |i: usize| {
            let slot = start + i;
            let windows = (slot + r).min(n - 1) - slot.saturating_sub(r) + 1;
            windows as f64 / kernel as f64
        };
        let (sum, base, inner) = simd(|| {
            let max = max2(stat.max, max(row));
            stat.rescale(max);
            row.iter_mut().for_each(|x| *x = exp(*x - max));
            let base = tile::sum(&row[..scored]);
            (base + tile::sum(&row[scored..]), base, tile::sum(&row[from..to]))
        });
        let edge = (0..from).chain(to..scored).map(|i| f64::from(row[i]) * weight(i)).sum::<f64>();
        stat.sum += f64::from(sum);
        stat.base += f64::from(base);
        stat.pooled += f64::from(inner) + edge;
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
                let seen = head.visible(w).clamp(slots.start, slots.end) - slots.start;
                simd(|| {
                    row[..seen].iter_mut().for_each(|x| *x = exp(*x - stat.max));
                    row[seen..].fill(0.0);
                    let own = &row[self.start - slots.start..][..width];
                    if let Some(means) = &mut means {
                        means.add(g, own, stat.inverse());
                    }
                    match head.op.row_pool {
                        None => scores.add(g, own, stat.inverse()),
                        Some(kernel) => {
                            window_sums(row, self.start - slots.start, radius, width, &mut x.row);
                            scores.add(g, &x.row, stat.pooled_inverse(kernel));
                        }
                    }
                });
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
