//! Pass 2: probabilities of a chunk of slots, reduced over rows as they come.
//!
//! Lanes are rows: pooling a row adds neighbouring vectors, reductions over rows are sums or maxima of vectors, and only
//! what a block of rows leaves for a slot is added up across lanes.

use std::ops::Range;

use super::super::isa::{Arithmetic, Isa, Kernel, LANES, Lanes, exp2};
use super::super::tile::{self, Aligned, max2};
use super::queries::{Logits, Queries, tile};
use super::stats::Stat;
use super::{Head, Kept, Scratch};
use crate::backend::ops::Reduce;

/// What makes probabilities of the logits of some rows.
pub(super) struct Factors {
    pub(super) minus: Lanes,
    pub(super) inverse: Lanes,
    /// To a pooled row, if rows are pooled.
    pooled: Lanes,
    /// Slots that the row gives scores to.
    pub(super) reached: [u32; LANES],
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
    /// Logits that pass 1 has kept, by block; none if it has not.
    pub(super) logits: &'a [Kept<'a>],
    pub(super) start: usize,
}

impl Chunk<'_> {
    pub(super) fn reduce(&self, scratch: &mut Scratch, out: &mut [f32], mean: Option<&mut [f32]>) {
        self.isa.run(Tiles { chunk: self, scratch, out, mean });
    }
}

/// Slots that are reduced at once: with their halo those that are multiplied at once, unless little would be left.
pub(super) fn width(isa: Isa, head: &Head<'_>) -> usize {
    let (tile, halo) = (tile(isa, head), 2 * head.radius());
    if halo <= tile / 2 { tile - halo } else { tile }
}

/// Goes through the tiles of a chunk.
struct Tiles<'a> {
    chunk: &'a Chunk<'a>,
    scratch: &'a mut Scratch,
    out: &'a mut [f32],
    mean: Option<&'a mut [f32]>,
}

impl Kernel for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { chunk, scratch, out, mean } = self;
        let width = width(chunk.isa, chunk.head);
        let mut mean = mean.map(|mean| mean.chunks_mut(width));
        for (i, out) in out.chunks_mut(width).enumerate() {
            let mean = mean.as_mut().and_then(Iterator::next);
            chunk.reduce_tile::<A>(chunk.start + i * width, scratch, out, mean);
        }
    }
}

impl Chunk<'_> {
    #[inline(always)]
    fn reduce_tile<A: Arithmetic>(
        &self,
        start: usize,
        scratch: &mut Scratch,
        out: &mut [f32],
        mean: Option<&mut [f32]>,
    ) {
        let head = self.head;
        let (end, radius) = (start + out.len(), head.radius());
        // The tile and its halo.
        let slots = start.saturating_sub(radius)..head.scored.min(end + radius);
        let Scratch { queries, product, scores, means, exponentials } = scratch;
        let units = if head.apart() { head.group } else { 1 };
        scores.clear(head.reduction(), units, out.len());
        means.clear(Reduce::Mean, 1, out.len());
        product.turn();
        for (b, (block, factors)) in head.blocks().zip(self.factors).enumerate() {
            if head.visible(block.end - 1) <= slots.start {
                continue;
            }
            let queries = Queries::of(self.kept.get(b), queries, self.isa, head, block);
            for (p, panel) in queries.panels().enumerate() {
                let logits = match self.logits.get(b) {
                    Some(kept) => {
                        let pitch = queries.panel;
                        let products = &kept[p][slots.start * pitch..slots.end * pitch];
                        Logits { products, pitch }
                    }
                    None => product.multiply(head, queries, &panel, slots.clone(), None),
                };
                for (block, factors) in factors[panel.clone()].iter().enumerate() {
                    let unit = match head.apart() {
                        true => (panel.start + block) * LANES / queries.shape.pitch,
                        false => 0,
                    };
                    if unit == units {
                        break;
                    }
                    let means = mean.is_some().then_some(&mut *means);
                    let (slots, scores) = (slots.clone(), scores.of_unit(unit));
                    let rows = Rows { head, factors, logits, block, slots, start };
                    rows.reduce::<A>(exponentials, scores, means);
                }
            }
            scores.end_block();
            if mean.is_some() {
                means.end_block();
            }
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

    /// Sums or maxima of a unit.
    #[inline(always)]
    fn of_unit(&mut self, unit: usize) -> Running<'_> {
        let lanes = self.lanes.first(self.total.len() * LANES).as_chunks_mut().0;
        Running { mean: self.mean, lanes: &mut lanes[unit * self.width..][..self.width] }
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

/// Lanes of each slot, of one unit.
struct Running<'a> {
    mean: bool,
    lanes: &'a mut [Lanes],
}

impl Running<'_> {
    /// Takes a value of each slot, in order.
    #[inline(always)]
    fn take<A: Arithmetic>(&mut self, mut of: impl FnMut(usize) -> A::Vector) {
        // A loop each: inside one, the choice would stand in the way of vectors.
        match self.mean {
            true => {
                for (t, sums) in self.lanes.iter_mut().enumerate() {
                    A::store(A::add(A::load(sums), of(t)), sums);
                }
            }
            false => {
                for (t, sums) in self.lanes.iter_mut().enumerate() {
                    A::store(A::max(A::load(sums), of(t)), sums);
                }
            }
        }
    }
}

/// Logits of a block of lanes of rows.
struct Rows<'a> {
    head: &'a Head<'a>,
    factors: &'a Factors,
    logits: Logits<'a>,
    block: usize,
    /// Slots multiplied, and the first that is scored here.
    slots: Range<usize>,
    start: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn reduce<A: Arithmetic>(
        self,
        exponentials: &mut Aligned,
        mut scores: Running<'_>,
        means: Option<&mut Sums>,
    ) {
        let Self { head, factors, logits, block, slots, start } = self;
        let first = start - slots.start;
        let scale = Queries::scale(head.q.dim());
        let Factors { minus, inverse, pooled, reached } = factors;
        let minus = minus.map(|x| -x);
        let [minus_of, inverse_of, pooled_of] = [&minus, inverse, pooled].map(A::load);
        let scale_of = A::splat(scale);
        let whole = reached.iter().all(|&n| n as usize >= slots.end);
        if whole && means.is_none() && head.op.row_pool.is_none() {
            return scores.take::<A>(
                #[inline(always)]
                |t| {
                    let x = A::load(logits.at(first + t, block));
                    A::mul(A::exp2(A::fma(x, scale_of, minus_of)), inverse_of)
                },
            );
        }
        let exponentials = exponentials.first(slots.len() * LANES).as_chunks_mut::<LANES>().0;
        for (i, e) in exponentials.iter_mut().enumerate() {
            let x = logits.at(i, block);
            if whole {
                A::store(A::exp2(A::fma(A::load(x), scale_of, minus_of)), e);
                continue;
            }
            for l in 0..LANES {
                let y = exp2::<A>(A::mul_add(x[l], scale, minus[l]));
                e[l] = if ((slots.start + i) as u32) < reached[l] { y } else { 0.0 };
            }
        }
        let exponentials = &*exponentials;
        let single = Single { exponentials, inverse, reached, start: slots.start, whole };
        if let Some(means) = means {
            means.of_unit(0).take::<A>(
                #[inline(always)]
                |t| single.at::<A>(first + t),
            );
        }
        let Some(kernel) = head.op.row_pool else {
            return scores.take::<A>(
                #[inline(always)]
                |t| single.at::<A>(first + t),
            );
        };
        let radius = kernel as usize / 2;
        scores.take::<A>(
            #[inline(always)]
            |t| {
                let t = first + t;
                let mut sum = A::splat(0.0);
                for e in &exponentials[t.saturating_sub(radius)..(t + radius + 1).min(slots.len())]
                {
                    sum = A::add(sum, A::load(e));
                }
                A::mul(sum, pooled_of)
            },
        );
    }
}

/// Probabilities of single slots.
struct Single<'a> {
    exponentials: &'a [Lanes],
    inverse: &'a Lanes,
    reached: &'a [u32; LANES],
    /// The first slot.
    start: usize,
    /// Whether all rows reach all slots.
    whole: bool,
}

impl Single<'_> {
    #[inline(always)]
    fn at<A: Arithmetic>(&self, t: usize) -> A::Vector {
        let p = A::mul(A::load(&self.exponentials[t]), A::load(self.inverse));
        if self.whole {
            return p;
        }
        let mut lanes = [0.0; LANES];
        A::store(p, &mut lanes);
        for (lane, &reached) in lanes.iter_mut().zip(self.reached) {
            // Not even NaN beyond what the row reaches.
            *lane = if ((self.start + t) as u32) < reached { *lane } else { 0.0 };
        }
        A::load(&lanes)
    }
}
