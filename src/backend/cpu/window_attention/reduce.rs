//! Pass 2: probabilities of a chunk of slots, reduced over rows as they come.
//!
//! Lanes are rows: pooling a row adds neighbouring vectors, reductions over rows are sums or maxima of vectors, and only
//! what a block of rows leaves for a slot is added up across lanes.

use std::ops::Range;

use super::super::tile::{self, Aligned, Arithmetic, Isa, Kernel, LANES, exp2, max2};
use super::queries::{Product, Queries, tile};
use super::stats::{Stat, lanes};
use super::{Head, Lanes, Scratch};
use crate::backend::ops::Reduce;

/// What makes probabilities of the logits of some rows.
pub(super) struct Factors {
    minus: Lanes,
    inverse: Lanes,
    /// To a pooled row, if rows are pooled.
    pooled: Lanes,
    /// Slots that the row gives scores to.
    reached: [u32; LANES],
}

impl Factors {
    pub(super) fn new(
        head: &Head<'_>,
        stat: &Stat,
        visible: [u32; LANES],
        reached: [u32; LANES],
    ) -> Self {
        let seen = |l: usize| visible[l] > 0;
        let finite = |x: f32| if x == f32::NEG_INFINITY { 0.0 } else { x };
        let inverse = std::array::from_fn(|l| stat.inverse(l, seen(l)));
        let pooled = match head.op.row_pool {
            Some(kernel) => std::array::from_fn(|l| stat.pooled_inverse(l, seen(l), kernel)),
            None => inverse,
        };
        Self { minus: stat.max.map(finite), inverse, pooled, reached }
    }
}

/// The scores of up to [`CHUNK`](super::CHUNK) slots.
pub(super) struct Chunk<'a> {
    pub(super) isa: Isa,
    pub(super) head: &'a Head<'a>,
    pub(super) kept: &'a [Queries],
    pub(super) factors: &'a [Vec<Factors>],
    pub(super) start: usize,
}

impl Chunk<'_> {
    pub(super) fn reduce(&self, x: &mut Scratch, out: &mut [f32], mean: Option<&mut [f32]>) {
        let width = tile(self.isa);
        let mut mean = mean.map(|mean| mean.chunks_mut(width));
        for (i, out) in out.chunks_mut(width).enumerate() {
            let mean = mean.as_mut().and_then(Iterator::next);
            self.tile(self.start + i * width, x, out, mean);
        }
    }

    fn tile(&self, start: usize, x: &mut Scratch, out: &mut [f32], mean: Option<&mut [f32]>) {
        let head = self.head;
        let (end, radius) = (start + out.len(), head.radius());
        // The tile and its halo.
        let slots = start.saturating_sub(radius)..head.scored.min(end + radius);
        let Scratch { queries, product, scores, means } = x;
        let units = if head.apart() { head.group } else { 1 };
        scores.clear(head.reduction(), units, out.len());
        means.clear(Reduce::Mean, 1, out.len());
        product.turn();
        for (b, (block, factors)) in head.blocks().zip(self.factors).enumerate() {
            if head.visible(block.end - 1) <= slots.start {
                continue;
            }
            let queries = Queries::of(self.kept.get(b), queries, self.isa, head, block);
            product.multiply(head, queries, slots.clone());
            let means = mean.is_some().then_some(&mut *means);
            let slots = slots.clone();
            self.isa.run(Block { head, queries, factors, product, slots, start, scores, means });
        }
        let group = head.group as f64;
        let mut of_unit = head.window() as f64;
        if units == 1 {
            of_unit *= group;
        }
        for (t, out) in out.iter_mut().enumerate() {
            let units = (0..units).map(|u| scores.of(u, t, of_unit));
            *out = match (head.apart(), head.op.over_group) {
                (true, Reduce::Mean) => units.sum::<f32>() / group as f32,
                (true, Reduce::Max) => units.fold(0.0, max2),
                (false, _) => units.sum(),
            };
        }
        if let Some(mean) = mean {
            let past = head.past.clamp(start, end) - start;
            let of = |t| means.of(0, t, head.window() as f64 * group);
            mean[..past].iter_mut().enumerate().for_each(|(t, mean)| *mean = of(t));
        }
    }
}

/// Running reductions, by unit and slot.
#[derive(Default)]
pub(super) struct Sums {
    mean: bool,
    width: usize,
    /// Of the current block, lane by lane.
    lanes: Aligned,
    /// Of the blocks before; windows can be long.
    total: Vec<f64>,
}

impl Sums {
    fn clear(&mut self, kind: Reduce, units: usize, width: usize) {
        self.mean = kind == Reduce::Mean;
        self.width = width;
        self.lanes.first(units * width * LANES).fill(0.0);
        self.total.clear();
        self.total.resize(units * width, 0.0);
    }

    #[inline(always)]
    fn lanes(&mut self) -> &mut [Lanes] {
        self.lanes.first(self.total.len() * LANES).as_chunks_mut().0
    }

    #[inline(always)]
    fn add(&mut self, unit: usize, slot: usize, x: &Lanes) {
        let (mean, width) = (self.mean, self.width);
        let sums = &mut self.lanes()[unit * width + slot];
        for l in 0..LANES {
            sums[l] = if mean { sums[l] + x[l] } else { max2(sums[l], x[l]) };
        }
    }

    #[inline(always)]
    fn set(&mut self, unit: usize, slot: usize, x: &Lanes) {
        let at = unit * self.width + slot;
        self.lanes()[at] = *x;
    }

    #[inline(always)]
    fn end_block(&mut self) {
        let lanes = self.lanes.first(self.total.len() * LANES).as_chunks_mut().0;
        for (total, lanes) in self.total.iter_mut().zip(lanes) {
            let lanes = std::mem::replace(lanes, [0.0; LANES]);
            if self.mean {
                *total += f64::from(tile::fold(lanes));
            } else {
                let max = f64::from(lanes.into_iter().fold(0.0, max2));
                *total = if max > *total || max.is_nan() { max } else { *total };
            }
        }
    }

    fn of(&self, unit: usize, slot: usize, rows: f64) -> f32 {
        let total = self.total[unit * self.width + slot];
        if self.mean { (total / rows) as f32 } else { total as f32 }
    }
}

/// Sums of the probabilities of several lanes of rows.
#[inline(always)]
fn probability_sums<A: Arithmetic>(logits: &[Lanes], factors: &[Factors], scale: f32) -> Lanes {
    let mut sums = [[0f32; LANES]; 2];
    let pairs = logits.chunks(2).zip(factors.chunks(2));
    for (logits, factors) in pairs {
        for (sums, (x, f)) in sums.iter_mut().zip(logits.iter().zip(factors)) {
            for l in 0..LANES {
                let e = exp2::<A>(A::mul_add(x[l], scale, -f.minus[l]));
                sums[l] = A::mul_add(e, f.inverse[l], sums[l]);
            }
        }
    }
    let [mut sum, other] = sums;
    for l in 0..LANES {
        sum[l] += other[l];
    }
    sum
}

/// Their maxima.
#[inline(always)]
fn probability_maxima<A: Arithmetic>(logits: &[Lanes], factors: &[Factors], scale: f32) -> Lanes {
    let mut max = [0f32; LANES];
    for (x, f) in logits.iter().zip(factors) {
        for l in 0..LANES {
            let e = exp2::<A>(A::mul_add(x[l], scale, -f.minus[l]));
            max[l] = max2(max[l], e * f.inverse[l]);
        }
    }
    max
}

/// Takes the logits of a block of rows.
struct Block<'a> {
    head: &'a Head<'a>,
    queries: &'a Queries,
    factors: &'a [Factors],
    product: &'a mut Product,
    /// Slots multiplied, and the first that is scored here.
    slots: Range<usize>,
    start: usize,
    scores: &'a mut Sums,
    means: Option<&'a mut Sums>,
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { head, queries, factors, product, slots, start, scores, mut means } = self;
        let scale = Queries::scale(head.q.dim());
        let radius = head.radius();
        let (first, width) = (start - slots.start, scores.width);
        let shape = queries.shape;
        let whole = |f: &Factors| f.reached.iter().all(|&n| n as usize >= slots.end);
        if head.op.row_pool.is_none() && means.is_none() && factors.iter().all(whole) {
            let pitch = if head.apart() { shape.pitch / LANES } else { factors.len() };
            for (unit, factors) in factors.chunks(pitch).enumerate() {
                for t in first..first + width {
                    let row = product.logits.all()[t * shape.width..][..shape.width].as_chunks().0;
                    let row = &row[unit * pitch..][..pitch];
                    scores.set(
                        unit,
                        t - first,
                        &match scores.mean {
                            true => probability_sums::<A>(row, factors, scale),
                            false => probability_maxima::<A>(row, factors, scale),
                        },
                    );
                }
            }
            scores.end_block();
            return;
        }
        for (block, factors) in factors.iter().enumerate() {
            let logits = product.logits.first(slots.len() * shape.width);
            let Factors { minus, inverse, pooled, reached } = factors;
            let whole = reached.iter().all(|&n| n as usize >= slots.end);
            let unit = if head.apart() { block * LANES / shape.pitch } else { 0 };
            if unit == head.group {
                break;
            }
            for (t, row) in (slots.start..).zip(logits.chunks_exact_mut(shape.width)) {
                let x = &mut row.as_chunks_mut::<LANES>().0[block];
                for l in 0..LANES {
                    let e = exp2::<A>(A::mul_add(x[l], scale, -minus[l]));
                    x[l] = if whole || (t as u32) < reached[l] { e } else { 0.0 };
                }
            }
            for t in first..first + width {
                let of = |t: usize| lanes(&logits[t * shape.width..][..shape.width], block);
                let mut p = [0.0; LANES];
                if let Some(means) = &mut means {
                    for l in 0..LANES {
                        let visible = ((slots.start + t) as u32) < reached[l];
                        p[l] = if visible { of(t)[l] * inverse[l] } else { 0.0 };
                    }
                    means.add(0, t - first, &p);
                    if head.op.row_pool.is_none() {
                        scores.add(unit, t - first, &p);
                        continue;
                    }
                }
                let mut sum = [0.0; LANES];
                for t in t.saturating_sub(radius)..(t + radius + 1).min(slots.len()) {
                    for (sum, x) in sum.iter_mut().zip(of(t)) {
                        *sum += x;
                    }
                }
                for l in 0..LANES {
                    p[l] = sum[l] * pooled[l];
                }
                scores.add(unit, t - first, &p);
            }
        }
        scores.end_block();
        if let Some(means) = means {
            means.end_block();
        }
    }
}
