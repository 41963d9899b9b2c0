//! Pass 1: the maximum and the sums of every query row.
//!
//! In: a block of query rows against a piece of a head's slots, tile by tile; out one [`Stat`] per row. Pieces
//! give one head to several threads; their number is bounded, so that statistics of all queries (H2O) stay
//! small beside K. The pooled row's sum is needed before the row is pooled: a slot counts as often as
//! windows cover it, which is `kernel` times except near the ends of the row, so no second pass is needed.

use std::ops::Range;

use rayon::prelude::*;

use super::super::tile::{self, exp, max, max2, simd};
use super::{Head, Scratch, TILE};

/// Slots that a task gets at least, and pieces that a block's slots are cut into at most.
const PIECE: usize = 4 * TILE;
const PIECES: usize = 64;

/// Softmax statistics of one query row.
#[derive(Clone, Copy)]
pub(super) struct Stat {
    /// What is subtracted from the logits: their maximum, or the log-sum-exp.
    pub(super) max: f32,
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
    pub(super) fn inverse(&self) -> f32 {
        if self.sum == 0.0 { 0.0 } else { (1.0 / self.sum) as f32 }
    }

    /// Factor from a sum of `kernel` exponentials to the pooled row at its former mass.
    pub(super) fn pooled_inverse(&self, kernel: u32) -> f32 {
        if self.sum.is_nan() {
            return f32::NAN;
        }
        if self.pooled == 0.0 || self.sum == 0.0 {
            return 0.0;
        }
        (self.base / self.pooled / (self.sum * f64::from(kernel))) as f32
    }
}

/// Pass 1: statistics of every row, by head; rows are `[g, w]` within each block of the window.
pub(super) fn row_stats(heads: &[Head<'_>]) -> Vec<Vec<Stat>> {
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
        let (sum, base, inner) = simd(
            #[inline(always)]
            || {
                let max = max2(stat.max, max(row));
                stat.rescale(max);
                row.iter_mut().for_each(|x| *x = exp(*x - max));
                let base = tile::sum(&row[..scored]);
                (base + tile::sum(&row[scored..]), base, tile::sum(&row[from..to]))
            },
        );
        let edge = (0..from).chain(to..scored).map(|i| f64::from(row[i]) * weight(i)).sum::<f64>();
        stat.sum += f64::from(sum);
        stat.base += f64::from(base);
        stat.pooled += f64::from(inner) + edge;
    }
}
