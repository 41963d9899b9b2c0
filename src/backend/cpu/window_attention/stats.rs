//! Pass 1: the maximum and the sums of every query row.
//!
//! In: a block of query rows against a piece of a head's slots, tile by tile; out one [`Stat`] per row. Pieces
//! give one head to several threads; their number is bounded, so that statistics of all queries (H2O) stay
//! small beside K. The pooled row's sum is needed before the row is pooled: a slot counts as often as
//! windows cover it, which is `kernel` times except near the ends of the row, so no second pass is needed.

use std::ops::Range;

use rayon::prelude::*;

use super::super::isa::{Arithmetic, Isa, Kernel, LANES, Lanes, exp2, greater};
use super::queries::{Logits, Product, Queries, Shape, panel, tile};
use super::{Head, Kept, Scratch};

/// Slots that a task gets at least, and pieces that a block's slots are cut into at most.
const PIECE: usize = 1024;
const PIECES: usize = 64;

/// Softmax statistics of [`LANES`] query rows.
#[derive(Clone, Copy)]
pub(super) struct Stat {
    /// What is subtracted from logits to base two: their maximum, or the log-sum-exp.
    pub(super) max: Lanes,
    /// Sum of the exponentials over what the row sees.
    sum: [f64; LANES],
    /// The part of it on scored slots.
    base: [f64; LANES],
    /// The sum of the pooled row, before it is scaled back to `base`.
    pooled: [f64; LANES],
}

impl Stat {
    pub(super) const EMPTY: Self = Self {
        max: [f32::NEG_INFINITY; LANES],
        sum: [0.0; LANES],
        base: [0.0; LANES],
        pooled: [0.0; LANES],
    };

    /// Moves the sums to another maximum.
    #[inline(always)]
    fn rescale<A: Arithmetic>(&mut self, max: &Lanes) {
        let mut factor = [0.0; LANES];
        for l in 0..LANES {
            // Of nothing but infinitely small ones the sums stay zero.
            let to = if max[l] == f32::NEG_INFINITY { 0.0 } else { max[l] };
            factor[l] = exp2::<A>(self.max[l] - to);
        }
        for l in 0..LANES {
            let factor = f64::from(factor[l]);
            self.sum[l] *= factor;
            self.base[l] *= factor;
            self.pooled[l] *= factor;
        }
        self.max = *max;
    }

    /// Adds sums of exponentials less the maximum.
    #[inline(always)]
    fn add(&mut self, sum: &Lanes, base: &Lanes, pooled: &Lanes) {
        for l in 0..LANES {
            self.sum[l] += f64::from(sum[l]);
            self.base[l] += f64::from(base[l]);
            self.pooled[l] += f64::from(pooled[l]);
        }
    }

    #[inline(always)]
    fn merge<A: Arithmetic>(&mut self, mut other: Self) {
        let max = std::array::from_fn(|l| greater(self.max[l], other.max[l]));
        other.rescale::<A>(&max);
        self.rescale::<A>(&max);
        for l in 0..LANES {
            self.sum[l] += other.sum[l];
            self.base[l] += other.base[l];
            self.pooled[l] += other.pooled[l];
        }
    }

    /// A row that saw something: all of it infinitely small is 0 / 0.
    fn sum(&self, l: usize, seen: bool) -> f64 {
        if seen && self.max[l] == f32::NEG_INFINITY { f64::NAN } else { self.sum[l] }
    }

    /// Factor from exponential to probability.
    pub(super) fn inverse(&self, l: usize, seen: bool) -> f32 {
        let sum = self.sum(l, seen);
        if sum == 0.0 { 0.0 } else { (1.0 / sum) as f32 }
    }

    /// Factor from a sum of `kernel` exponentials to the pooled row at its former mass.
    pub(super) fn pooled_inverse(&self, l: usize, seen: bool, kernel: u32) -> f32 {
        let sum = self.sum(l, seen);
        if sum.is_nan() {
            return f32::NAN;
        }
        if self.pooled[l] == 0.0 || sum == 0.0 {
            return 0.0;
        }
        (self.base[l] / self.pooled[l] / (sum * f64::from(kernel))) as f32
    }
}

/// Pass 1: statistics of all rows of each block of each head.
pub(super) fn row_stats(
    isa: Isa,
    heads: &[Head<'_>],
    kept: &[Vec<Queries>],
    mut logits: Vec<Vec<Kept<'_>>>,
) -> Vec<Vec<Vec<Stat>>> {
    let mut tasks = Vec::new();
    for (i, head) in heads.iter().enumerate() {
        if !head.two_passes() {
            continue;
        }
        let pieces = (PIECES / head.blocks().count()).max(1);
        for (b, block) in head.blocks().enumerate() {
            let seen = head.visible(block.end - 1);
            // Rows older than all that the head still holds see nothing.
            let piece = seen.div_ceil(pieces).next_multiple_of(PIECE).max(PIECE);
            let panel = panel(isa, head, Shape::new(head, &block));
            let mut to = logits[i].get_mut(b).map(std::mem::take).unwrap_or_default();
            for start in (0..seen).step_by(piece) {
                let slots = start..seen.min(start + piece);
                // The last has the padding.
                let len = if slots.end < seen { slots.len() * panel } else { usize::MAX };
                let parts = to.iter_mut().filter_map(|to| to.split_off_mut(..len.min(to.len())));
                let part: Kept<'_> = parts.collect();
                tasks.push((i, b, block.clone(), slots, part));
            }
        }
    }
    let parts: Vec<(usize, usize, Vec<Stat>)> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (i, b, block, slots, to)| {
            let kept = kept[i].get(b);
            (i, b, heads[i].block_stats(isa, scratch, kept, block, slots, to))
        })
        .collect();
    let mut stats: Vec<Vec<Vec<Stat>>> = heads.iter().map(Head::initial_stats).collect();
    for (i, b, part) in parts {
        isa.run(Merge { stats: &mut stats[i][b], part });
    }
    stats
}

/// Joins the statistics of a piece with those of the pieces before it.
struct Merge<'a> {
    stats: &'a mut [Stat],
    part: Vec<Stat>,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        self.stats.iter_mut().zip(self.part).for_each(|(stat, part)| stat.merge::<A>(part));
    }
}

impl Head<'_> {
    /// What is known before pass 1: with a log-sum-exp, everything but the masses on scored slots.
    fn initial_stats(&self) -> Vec<Vec<Stat>> {
        self.blocks()
            .map(|block| {
                let rows = self.rows(&block);
                let mut stats = vec![Stat::EMPTY; rows.len().div_ceil(LANES)];
                for (i, row) in rows.into_iter().enumerate() {
                    let lse = row.and_then(|(g, w)| self.lse(g, w));
                    if let (Some(lse), None) = (lse, self.op.row_pool) {
                        let stat = &mut stats[i / LANES];
                        let exact = f64::from(lse) * std::f64::consts::LOG2_E;
                        let max = exact as f32;
                        stat.max[i % LANES] = max;
                        // Not quite one: rounding costs a large logarithm its last digits.
                        let rest = if max.is_finite() { exact - f64::from(max) } else { 0.0 };
                        stat.sum[i % LANES] = rest.exp2();
                    }
                }
                stats
            })
            .collect()
    }

    fn block_stats(
        &self,
        isa: Isa,
        scratch: &mut Scratch,
        kept: Option<&Queries>,
        block: Range<usize>,
        slots: Range<usize>,
        to: Kept<'_>,
    ) -> Vec<Stat> {
        let Scratch { queries, product, .. } = scratch;
        let queries = Queries::of(kept, queries, isa, self, block.clone());
        let mut stats = vec![Stat::EMPTY; queries.shape.width / LANES];
        let limits = self.limits(&block, |w| self.visible(w));
        let (limits, stats_of) = (&limits, &mut stats);
        isa.run(Sums { isa, head: self, queries, product, slots, limits, stats: stats_of, to });
        stats
    }
}

/// Adds the logits of some slots to the statistics of a block of rows.
struct Sums<'a> {
    isa: Isa,
    head: &'a Head<'a>,
    queries: &'a Queries,
    product: &'a mut Product,
    slots: Range<usize>,
    /// Slots that each row sees.
    limits: &'a [[u32; LANES]],
    stats: &'a mut [Stat],
    /// Where logits are kept, from the first slot on; nowhere, if empty.
    to: Kept<'a>,
}

impl Kernel for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { isa, head, queries, product, slots: all, limits, stats, mut to } = self;
        let (scored, radius) = (head.scored, head.radius());
        let scale = Queries::scale(head.q.dim());
        let tile = tile(isa, head);
        for start in all.clone().step_by(tile) {
            let slots = start..all.end.min(start + tile);
            // Whether all slots are scored and as often in pooling windows as any.
            let inner = slots.start >= radius && slots.end + radius <= scored;
            product.turn();
            for (p, panel) in queries.panels().enumerate() {
                let to = to.get_mut(p).map(|to| &mut to[(start - all.start) * queries.panel..]);
                let logits = product.multiply(head, queries, &panel, slots.clone(), to);
                let rows = stats[panel.clone()].iter_mut().zip(&limits[panel.clone()]);
                for (block, (stat, limits)) in rows.enumerate() {
                    let tile = Tile { logits, block, scale };
                    let whole = limits.iter().all(|&n| n as usize >= slots.end);
                    match inner && whole {
                        true => tile.inner::<A>(stat),
                        false => tile.edge::<A>(head, slots.clone(), limits, stat),
                    }
                }
            }
        }
    }
}

/// Powers of two by which a logit may exceed what sums are relative to.
const SLACK: f32 = 32.0;

/// Logits of some slots, and the block of lanes that is looked at.
struct Tile<'a> {
    logits: Logits<'a>,
    block: usize,
    scale: f32,
}

impl Tile<'_> {
    /// The greatest logits, and the given ones.
    #[inline(always)]
    fn max(&self, least: &Lanes) -> Lanes {
        let mut max = [f32::NEG_INFINITY; LANES];
        for t in 0..self.logits.slots() {
            let x = self.logits.at(t, self.block);
            for l in 0..LANES {
                max[l] = greater(max[l], x[l]);
            }
        }
        for l in 0..LANES {
            max[l] = greater(least[l], max[l] * self.scale);
        }
        max
    }

    /// The greatest logits, and sums of exponentials relative to `base`.
    #[inline(always)]
    fn sums<A: Arithmetic>(&self, base: &Lanes) -> (Lanes, Lanes) {
        let mut minus = [0.0; LANES];
        for l in 0..LANES {
            minus[l] = if base[l] == f32::NEG_INFINITY { 0.0 } else { -base[l] };
        }
        let (scale, minus) = (A::splat(self.scale), A::load(&minus));
        // One chain of additions: the exponential between two of them takes longer than an addition.
        let mut max_of = A::splat(f32::NEG_INFINITY);
        let mut sum_of = A::splat(0.0);
        for t in 0..self.logits.slots() {
            let x = A::load(self.logits.at(t, self.block));
            max_of = A::greater(max_of, x);
            sum_of = A::add(sum_of, A::exp2(A::fma(x, scale, minus)));
        }
        let (mut max, mut sum) = ([0.0; LANES], [0.0; LANES]);
        A::store(max_of, &mut max);
        A::store(sum_of, &mut sum);
        (max.map(|x| x * self.scale), sum)
    }

    /// Slots that all rows see, and that count fully in all sums.
    #[inline(always)]
    fn inner<A: Arithmetic>(&self, stat: &mut Stat) {
        if stat.max.contains(&f32::NEG_INFINITY) {
            stat.rescale::<A>(&self.max(&stat.max));
        }
        let (mut max, mut sum) = self.sums::<A>(&stat.max);
        // Sums relative to an older, lesser maximum are as good, until they threaten to overflow.
        if (0..LANES).any(|l| max[l] > stat.max[l] + SLACK) {
            for (max, before) in max.iter_mut().zip(&stat.max) {
                *max = greater(*before, *max);
            }
            stat.rescale::<A>(&max);
            (_, sum) = self.sums::<A>(&max);
        }
        stat.add(&sum, &sum, &sum);
    }

    /// Slots that not all rows see, or that count for more or less in the sums.
    #[inline(always)]
    fn edge<A: Arithmetic>(
        &self,
        head: &Head<'_>,
        slots: Range<usize>,
        limits: &[u32; LANES],
        stat: &mut Stat,
    ) {
        let mut max = [f32::NEG_INFINITY; LANES];
        for (i, t) in (slots.start as u32..slots.end as u32).enumerate() {
            let x = self.logits.at(i, self.block);
            for l in 0..LANES {
                max[l] = greater(max[l], if t < limits[l] { x[l] } else { f32::NEG_INFINITY });
            }
        }
        let mut minus = [0.0; LANES];
        for l in 0..LANES {
            max[l] = greater(stat.max[l], max[l] * self.scale);
            minus[l] = if max[l] == f32::NEG_INFINITY { 0.0 } else { -max[l] };
        }
        let [mut sum, mut base, mut pooled] = [[0f32; LANES]; 3];
        for (i, t) in slots.enumerate() {
            let x = self.logits.at(i, self.block);
            let (mass, weight) = head.weights(t);
            for l in 0..LANES {
                let e = exp2::<A>(A::mul_add(x[l], self.scale, minus[l]));
                let e = if (t as u32) < limits[l] { e } else { 0.0 };
                sum[l] += e;
                base[l] += e * mass;
                pooled[l] += e * weight;
            }
        }
        stat.rescale::<A>(&max);
        stat.add(&sum, &base, &pooled);
    }
}
