//! The probabilities themselves, for operations that do more with them than reduce rows.

use std::ops::Range;

use rayon::prelude::*;

use super::super::HostLayer;
use super::super::isa::{Arithmetic, Isa, Kernel, LANES, exp2};
use super::super::tile;
use super::queries::{Logits, Queries, Shape};
use super::reduce::Factors;
use super::stats::row_stats;
use super::{Head, Scratch};
use crate::backend::ops::WindowAttention;
use crate::error::Result;

/// A segment whose rows have their denominators.
pub(in super::super) struct Attention<'a> {
    isa: Isa,
    head: Head<'a>,
    kept: Vec<Queries>,
    factors: Vec<Vec<Factors>>,
}

impl<'a> Attention<'a> {
    /// All segments of some views; of the operation the window counts, and which slots are scored.
    pub(in super::super) fn of(
        isa: Isa,
        op: &'a WindowAttention,
        layers: &'a [HostLayer<'a>],
    ) -> Result<Vec<Self>> {
        let heads =
            tile::segments(layers).map(|(l, h)| Head::new(op, l, h)).collect::<Result<Vec<_>>>()?;
        let kept: Vec<Vec<Queries>> = heads.par_iter().map(|head| head.kept(isa)).collect();
        let stats = row_stats(isa, &heads, &kept, heads.iter().map(|_| Vec::new()).collect());
        let all = heads.into_iter().zip(kept).zip(stats);
        Ok(all
            .map(|((head, kept), stats)| {
                let factors = head.factors(&stats);
                Self { isa, head, kept, factors }
            })
            .collect())
    }

    /// The view, and which of its heads this is.
    pub(in super::super) fn place(&self) -> (&'a HostLayer<'a>, usize) {
        (self.head.layer, self.head.head)
    }

    /// Slots that are scored: the first ones.
    pub(in super::super) fn scored(&self) -> usize {
        self.head.scored
    }

    /// Of each block of queries, those of the group's heads among its rows.
    pub(in super::super) fn heads(&self) -> Vec<Vec<Range<usize>>> {
        let of_block = |block: Range<usize>| {
            let pitch = Shape::new(&self.head, &block).pitch;
            (0..self.head.group).map(|g| g * pitch..g * pitch + block.len()).collect()
        };
        self.head.blocks().map(of_block).collect()
    }

    /// Rows of each block of queries, padding included: those of all heads of the group.
    pub(in super::super) fn widths(&self) -> Vec<usize> {
        self.head.blocks().map(|block| Shape::new(&self.head, &block).width).collect()
    }

    /// Probabilities `[slot, row]` of a block at some slots, which fill `out`: 0 for padding and at slots that a row does not see.
    /// With `information`, also adds the sum of `P · log₂ P` over them.
    pub(in super::super) fn tile(
        &self,
        b: usize,
        slots: Range<usize>,
        scratch: &mut Scratch,
        out: &mut [f32],
        mut information: Option<&mut f64>,
    ) {
        let Scratch { queries, product, .. } = scratch;
        let Some(block) = self.head.blocks().nth(b) else { return };
        let queries = Queries::of(self.kept.get(b), queries, self.isa, &self.head, block);
        let scale = Queries::scale(self.head.q.dim());
        product.turn();
        for panel in queries.panels() {
            let logits = product.multiply(&self.head, queries, &panel, slots.clone(), None);
            let factors = &self.factors[b][panel.clone()];
            let (start, width, first) = (slots.start, queries.shape.width, panel.start);
            self.isa.run(Exponentials { logits, factors, scale, start, width, first, out });
            if let Some(sum) = &mut information {
                **sum +=
                    self.isa.run(Information { logits, factors, scale, width, first, of: out });
            }
        }
    }
}

/// Exponentials of a panel's logits, over the denominators.
struct Exponentials<'a> {
    logits: Logits<'a>,
    factors: &'a [Factors],
    scale: f32,
    /// The first slot.
    start: usize,
    /// Rows of the block, and the panel's first block of lanes among them.
    width: usize,
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { logits, factors, scale, start, width, first, out } = self;
        let scale_of = A::splat(scale);
        for (block, Factors { minus, inverse, reached, .. }) in factors.iter().enumerate() {
            let minus = minus.map(|x| -x);
            let (minus_of, inverse_of) = (A::load(&minus), A::load(inverse));
            let whole = reached.iter().all(|&n| n as usize >= start + logits.slots());
            for (i, row) in out.chunks_exact_mut(width).enumerate() {
                let (x, to) = (logits.at(i, block), &mut row.as_chunks_mut().0[first + block]);
                if whole {
                    A::store(
                        A::mul(A::exp2(A::fma(A::load(x), scale_of, minus_of)), inverse_of),
                        to,
                    );
                    continue;
                }
                for l in 0..LANES {
                    let p = exp2::<A>(A::mul_add(x[l], scale, minus[l])) * inverse[l];
                    // Not even NaN beyond what the row sees.
                    to[l] = if ((start + i) as u32) < reached[l] { p } else { 0.0 };
                }
            }
        }
    }
}

/// Below the logarithm of the least number that a probability is: times 0, still 0.
const LEAST: f32 = -200.0;

/// Sum of a panel's `P · log₂ P`: the logarithms are those of [`Exponentials`] before they are raised.
struct Information<'a> {
    logits: Logits<'a>,
    factors: &'a [Factors],
    scale: f32,
    /// As of the exponentials.
    width: usize,
    first: usize,
    of: &'a [f32],
}

impl Kernel for Information<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f64 {
        let Self { logits, factors, scale, width, first, of } = self;
        let (scale, least) = (A::splat(scale), A::splat(LEAST));
        let mut total = 0.0;
        for (block, Factors { minus, inverse, .. }) in factors.iter().enumerate() {
            let (minus, inverse) = (minus.map(|x| -x), inverse.map(f32::log2));
            let (minus, inverse) = (A::load(&minus), A::load(&inverse));
            let mut sum = A::splat(0.0);
            for (i, row) in of.chunks_exact(width).enumerate() {
                let x = A::load(logits.at(i, block));
                let log = A::greater(least, A::add(A::fma(x, scale, minus), inverse));
                sum = A::fma(A::load(&row.as_chunks().0[first + block]), log, sum);
            }
            let mut lanes = [0.0; LANES];
            A::store(sum, &mut lanes);
            total += f64::from(tile::fold(lanes));
        }
        total
    }
}
