//! How far each slot's value reaches along what the last queries read.
//!
//! In: q `[Hq, ≥W, D]`, k, v `[H, len, D]`; out `[H, len]` f32. Source: AnDPro (NeurIPS 2025), its sums over chunks taken apart: with
//! the weights `A[row, slot]` of all rows of a group, `Y = A V` over the anchor, and `score = rowsum(Aᵀ ∘ (V Yᵀ))`.
//!
//! Three passes over K, since a weight is final only when its row's denominator is known, and a score only when `Y` is: the
//! statistics of [`window_attention`](super::window_attention), `Y` by pieces of the anchor, scores by chunks. Weights are made
//! anew tile by tile in each. Cost: `10·Hq·W·len·D` flops, of them 6 for logits; scratch per thread: a tile of weights, of
//! values and of their product. Pieces, chunks and tiles have sizes that follow from the shapes; pieces are joined in slot
//! order, in f64: the number of threads does not change a bit.

use std::ops::Range;

use rayon::prelude::*;

use super::HostLayer;
use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::tile::{self, Aligned};
use super::window_attention::{self, Attention};
use crate::backend::check;
use crate::backend::ops::{Projection, Reduce, WindowAttention};
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots that are multiplied at once.
const TILE: usize = 256;
/// Slots of a task.
const CHUNK: usize = 1024;
/// Pieces that the anchor is cut into at most, over all blocks of rows: so many partial sums are held.
const PIECES: usize = 64;

pub(super) fn run(
    isa: Isa,
    op: &Projection<'_>,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::projection(op, layers, out)?;
    let attention =
        WindowAttention { score_window: true, ..WindowAttention::plain(op.window, Reduce::Mean) };
    let radius = op.row_pool.unwrap_or(1) as usize / 2;
    let heads: Vec<Head<'_>> = Attention::of(isa, &attention, layers)?
        .into_iter()
        .zip(op.anchor)
        .map(|(attention, anchor)| Head {
            isa,
            radius,
            widths: attention.widths(),
            anchor: anchor.start as usize..anchor.end as usize,
            attention,
        })
        .collect();
    let outputs = outputs(op, &heads);
    let mut tasks = Vec::new();
    for ((head, outputs), row) in heads.iter().zip(&outputs).zip(out.rows_mut()) {
        for (i, out) in row.chunks_mut(CHUNK).enumerate() {
            tasks.push((head, outputs, i * CHUNK, out));
        }
    }
    tasks.into_par_iter().for_each_init(
        Scratch::default,
        |scratch, (head, outputs, start, out)| {
            for (i, out) in out.chunks_mut(TILE).enumerate() {
                head.scores(outputs, start + i * TILE, scratch, out);
            }
        },
    );
    Ok(())
}

/// What the rows of each block read, `[row, D]`: by head, by block.
fn outputs(op: &Projection<'_>, heads: &[Head<'_>]) -> Vec<Vec<Vec<f32>>> {
    let mut tasks = Vec::new();
    for (i, head) in heads.iter().enumerate() {
        let pieces = (PIECES / head.widths.len().max(1)).max(1);
        let piece = head.anchor.len().div_ceil(pieces).next_multiple_of(CHUNK);
        for b in 0..head.widths.len() {
            for start in head.anchor.clone().step_by(piece.max(1)) {
                tasks.push((i, b, start..head.anchor.end.min(start + piece)));
            }
        }
    }
    let parts: Vec<(usize, usize, Vec<f32>)> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (i, b, slots)| {
            (i, b, heads[i].read(b, slots, scratch))
        })
        .collect();
    let zeros = |head: &Head<'_>| -> Vec<Vec<f64>> {
        head.widths.iter().map(|width| vec![0.0; width * head.dim()]).collect()
    };
    let mut sums: Vec<Vec<Vec<f64>>> = heads.iter().map(zeros).collect();
    for (i, b, part) in parts {
        sums[i][b].iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(x));
    }
    for (head, blocks) in heads.iter().zip(&mut sums).filter(|_| op.normalise) {
        for y in blocks.iter_mut().flat_map(|block| block.chunks_exact_mut(head.dim())) {
            let norm = y.iter().map(|x| x * x).sum::<f64>().sqrt();
            if norm != 0.0 {
                y.iter_mut().for_each(|x| *x /= norm);
            }
        }
    }
    let narrow = |block: Vec<f64>| block.into_iter().map(|x| x as f32).collect();
    sums.into_iter().map(|blocks| blocks.into_iter().map(narrow).collect()).collect()
}

/// One segment.
struct Head<'a> {
    isa: Isa,
    attention: Attention<'a>,
    /// Rows of each block of queries.
    widths: Vec<usize>,
    radius: usize,
    anchor: Range<usize>,
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    attention: window_attention::Scratch,
    /// Weights before and after pooling, `[slot, row]`.
    raw: Aligned,
    pooled: Aligned,
    values: Vec<f32>,
    product: Aligned,
}

impl Head<'_> {
    fn dim(&self) -> usize {
        self.attention.place().0.v().dim()
    }

    fn len(&self) -> usize {
        let (layer, head) = self.attention.place();
        layer.v().len(head)
    }

    /// Widens the values of a tile.
    fn values(&self, slots: Range<usize>, values: &mut Vec<f32>) {
        let (layer, head) = self.attention.place();
        values.resize(slots.len() * self.dim(), 0.0);
        tile::widen_rows(layer.v(), head, slots, values);
    }

    /// Weights `[slot, row]` of a block of rows.
    fn weights<'s>(
        &self,
        b: usize,
        slots: Range<usize>,
        attention: &mut window_attention::Scratch,
        raw: &'s mut Aligned,
        pooled: &'s mut Aligned,
    ) -> &'s [f32] {
        let (width, radius) = (self.widths[b], self.radius);
        let halo = slots.start.saturating_sub(radius)..self.len().min(slots.end + radius);
        let raw = raw.first(halo.len() * width);
        self.attention.tile(b, halo.clone(), attention, raw, None);
        if radius == 0 {
            return raw;
        }
        let out = pooled.first(slots.len() * width);
        self.isa.run(Maxima { raw, width, radius, first: slots.start - halo.start, out });
        out
    }

    /// `Σ_t A[row, t] · v[t]` over some slots of the anchor.
    fn read(&self, b: usize, slots: Range<usize>, scratch: &mut Scratch) -> Vec<f32> {
        let Scratch { attention, raw, pooled, values, product } = scratch;
        let (width, dim) = (self.widths[b], self.dim());
        let mut sum = vec![0.0; width * dim];
        for start in slots.clone().step_by(TILE) {
            let slots = start..slots.end.min(start + TILE);
            self.values(slots.clone(), values);
            let weights = self.weights(b, slots, attention, raw, pooled);
            let product = product.first(width * dim);
            tile::matmul_tn([width, dim], weights, values, product);
            sum.iter_mut().zip(product).for_each(|(sum, x)| *sum += *x);
        }
        sum
    }

    /// Scores of a tile.
    fn scores(&self, outputs: &[Vec<f32>], start: usize, scratch: &mut Scratch, out: &mut [f32]) {
        let Scratch { attention, raw, pooled, values, product } = scratch;
        let slots = start..start + out.len();
        self.values(slots.clone(), values);
        let mut sums = [0f64; TILE];
        for (b, y) in outputs.iter().enumerate() {
            let weights = self.weights(b, slots.clone(), attention, raw, pooled);
            let products = product.first(weights.len());
            tile::matmul_nt(self.dim(), values, y, products);
            self.isa.run(Dots { weights, products, width: self.widths[b], sums: &mut sums });
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            let score = sum as f32;
            *out = if score.is_finite() { score } else { f32::NAN };
        }
    }
}

/// Maxima over neighbouring slots.
struct Maxima<'a> {
    raw: &'a [f32],
    width: usize,
    radius: usize,
    /// Where the first slot lies in `raw`.
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for Maxima<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { raw, width, radius, first, out } = self;
        for (t, out) in out.chunks_exact_mut(width).enumerate() {
            let from = (first + t).saturating_sub(radius) * width;
            let to = raw.len().min((first + t + radius + 1) * width);
            out.fill(0.0);
            for row in raw[from..to].chunks_exact(width) {
                for (max, x) in out.as_chunks_mut().0.iter_mut().zip(row.as_chunks().0) {
                    A::store(A::max(A::load(max), A::load(x)), max);
                }
            }
        }
    }
}

/// Adds, slot by slot, products over the rows.
struct Dots<'a> {
    weights: &'a [f32],
    products: &'a [f32],
    width: usize,
    sums: &'a mut [f64],
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { weights, products, width, sums } = self;
        let slots = weights.chunks_exact(width).zip(products.chunks_exact(width));
        for ((weights, products), sum) in slots.zip(sums) {
            let mut lanes = [0.0; LANES];
            let mut sum_of = A::splat(0.0);
            for (a, p) in weights.as_chunks().0.iter().zip(products.as_chunks().0) {
                sum_of = A::fma(A::load(a), A::load(p), sum_of);
            }
            A::store(sum_of, &mut lanes);
            *sum += f64::from(tile::fold(lanes));
        }
    }
}
