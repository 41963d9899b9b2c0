//! How much attention slots get from the last queries, and how much that changes from one to the next.
//!
//! In: q `[Hq, ≥W, D]`, k `[H, len, D]`; out `[H, len]` and `[H, 2]`, f32. Source: CAKE (arXiv 2503.12491).
//!
//! Two passes over K: the row statistics of [`window_attention`](super::window_attention), then weights tile by tile, of which each head of the
//! group has its moments. A variance is a sum of squares about the mean of a block of rows, and blocks are joined by their means
//! (Chan, Golub and LeVeque): the difference of two large sums would lose what tells queries apart. The logarithms of
//! the entropy are those that the weights are raised from, so they cost little. Cost: `4·Hq·W·len·D` flops; scratch per thread: a tile of weights.
//!
//! Sums are f64, of chunks in slot order: the number of threads does not change a bit.

use std::ops::Range;

use rayon::prelude::*;

use super::HostLayer;
use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::tile::{self, Aligned};
use super::window_attention::{self, Attention};
use crate::backend::check;
use crate::backend::ops::{AttentionSpread, Reduce, WindowAttention};
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots that are multiplied at once.
const TILE: usize = 256;
/// Slots of a task.
const CHUNK: usize = 1024;

pub(super) fn run(
    isa: Isa,
    op: AttentionSpread,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
    sums: &mut Ragged<f32>,
) -> Result<()> {
    check::attention_spread(op, layers, out, sums)?;
    let attention = WindowAttention::plain(op.window, Reduce::Mean);
    let heads: Vec<Head<'_>> = Attention::of(isa, &attention, layers)?
        .into_iter()
        .map(|attention| Head {
            isa,
            gamma: op.gamma,
            widths: attention.widths(),
            rows: attention.heads(),
            attention,
        })
        .collect();
    let mut tasks = Vec::new();
    for (s, (head, row)) in heads.iter().zip(out.rows_mut()).enumerate() {
        row.fill(0.0);
        for (i, out) in row[..head.attention.scored()].chunks_mut(CHUNK).enumerate() {
            tasks.push((s, i * CHUNK, out));
        }
    }
    let parts: Vec<(usize, [f64; 2])> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (s, start, out)| {
            let mut sums = [0.0; 2];
            for (i, out) in out.chunks_mut(TILE).enumerate() {
                heads[s].tile(start + i * TILE, scratch, out, &mut sums);
            }
            (s, sums)
        })
        .collect();
    let mut totals = vec![[0.0; 2]; heads.len()];
    for (s, part) in parts {
        totals[s].iter_mut().zip(part).for_each(|(total, x)| *total += x);
    }
    for (sums, total) in sums.rows_mut().into_iter().zip(totals) {
        sums.copy_from_slice(&total.map(|x| x as f32));
    }
    Ok(())
}

/// One segment.
struct Head<'a> {
    isa: Isa,
    gamma: f32,
    attention: Attention<'a>,
    /// Rows of each block of queries, and those of each head of the group among them.
    widths: Vec<usize>,
    rows: Vec<Vec<Range<usize>>>,
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    attention: window_attention::Scratch,
    /// Weights `[slot, row]`.
    weights: Aligned,
    /// `[slot, head of the group]`
    moments: Vec<Moments>,
}

/// Of so many numbers: their mean, and the sum of their squares about it.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Joins those of more numbers.
    #[inline(always)]
    fn join(&mut self, other: Self) {
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        self.squares += other.squares + delta * delta * (self.count * other.count / count);
        self.mean += delta * (other.count / count);
        self.count = count;
    }

    /// Of a sample; a single number has none.
    fn variance(&self) -> f64 {
        if self.count > 1.0 { self.squares / (self.count - 1.0) } else { 0.0 }
    }
}

impl Head<'_> {
    /// Scores of a tile; adds its entropy and variance to the sums.
    fn tile(&self, start: usize, scratch: &mut Scratch, out: &mut [f32], sums: &mut [f64; 2]) {
        let Scratch { attention, weights, moments } = scratch;
        let group = self.attention.place().0.shape().group();
        moments.clear();
        moments.resize(out.len() * group, Moments::default());
        let mut information = 0.0;
        for (b, (&width, rows)) in self.widths.iter().zip(&self.rows).enumerate() {
            let weights = weights.first(out.len() * width);
            let slots = start..start + out.len();
            self.attention.tile(b, slots, attention, weights, Some(&mut information));
            self.isa.run(Blocks { weights, width, rows, moments });
        }
        sums[0] -= information * std::f64::consts::LN_2;
        for (out, moments) in out.iter_mut().zip(moments.chunks_exact(group)) {
            let mean: f64 = moments.iter().map(|m| m.mean).sum();
            let variance: f64 = moments.iter().map(Moments::variance).sum();
            sums[1] += variance;
            *out = ((mean + f64::from(self.gamma) * variance) / group as f64) as f32;
        }
    }
}

/// Adds a block of rows to the moments of each slot and head.
struct Blocks<'a> {
    weights: &'a [f32],
    width: usize,
    /// Rows of each head of the group.
    rows: &'a [Range<usize>],
    moments: &'a mut [Moments],
}

impl Kernel for Blocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { weights, width, rows, moments } = self;
        let slots = weights.chunks_exact(width).zip(moments.chunks_exact_mut(rows.len()));
        for (weights, moments) in slots {
            for (rows, moments) in rows.iter().zip(moments) {
                let weights = &weights[rows.clone()];
                let count = weights.len() as f32;
                let mean = tile::sum(weights) / count;
                let squares = squares(weights, mean);
                let [count, mean, squares] = [count, mean, squares].map(f64::from);
                moments.join(Moments { count, mean, squares });
            }
        }
    }
}

/// Sum of squares about a number, in the order of [`tile::sum`].
#[inline(always)]
fn squares(x: &[f32], about: f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for l in 0..LANES {
            let d = chunk[l] - about;
            lanes[l] += d * d;
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += (x - about) * (x - about);
    }
    tile::fold(lanes)
}
