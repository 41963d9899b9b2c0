//! Scores that look at keys alone, or at positions alone; and norms of values, which are had as those of keys are.
//!
//! In: k `[H, len, D]`; out `[H, len]` f32. Sources: KNorm (Devoto et al.), KeyDiff (its score as kvpress has
//! it: against the mean of the head's unit keys), StreamingLLM (recency).
//!
//! Cost: one read of K (two for KeyDiff) and `2·D` flops per slot and read: memory bound. Squares and
//! dot products of f32 elements are summed in f64, which costs nothing here and cannot overflow. Tiles have a
//! fixed size and the mean joins them in slot order.

use std::ops::Range;

use rayon::prelude::*;

use super::isa::{Arithmetic, Isa, Kernel};
use super::tile;
use super::{HostLayer, HostSlice};
use crate::backend::check;
use crate::backend::ops::Positional;
use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::Rows;

/// Slots per task: widened, they stay in L1.
const TILE: usize = 64;
/// Smallest norm of a cosine, as in torch's `cosine_similarity`.
const COSINE_EPS: f64 = 1e-8;
/// Smallest norm that makes a unit key, as in torch's `normalize`.
const UNIT_EPS: f64 = 1e-12;

/// Scores of a tile's rows.
trait Score: Copy + Sync {
    /// In one of the segments.
    fn score(self, segment: usize, row: &[f32]) -> f32;
}

/// A tile's work.
struct Tile<'a, S> {
    score: S,
    segment: usize,
    rows: Slots<'a>,
    out: &'a mut [f32],
}

impl<S: Score> Kernel for Tile<'_, S> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { score, segment, rows, out } = self;
        let dim = rows.of.dim();
        for (row, out) in rows.read().chunks_exact(dim).zip(out) {
            *out = score.score(segment, row);
        }
    }
}

/// Slots whose keys, or values, are read by a kernel.
struct Slots<'a> {
    of: &'a Rows<'a, HostSlice<'a>>,
    head: usize,
    slots: Range<usize>,
    scratch: &'a mut Vec<f32>,
}

impl<'a> Slots<'a> {
    /// As f32.
    #[inline(always)]
    fn read(self) -> &'a [f32] {
        let dim = self.of.dim();
        self.scratch.resize(self.slots.len() * dim, 0.0);
        if let HostSlice::F32(_) = self.of.storage() {
            return tile::f32_rows(self.of, self.head, self.slots, self.scratch);
        }
        tile::widen_apart(self.of, self.head, self.slots, dim, self.scratch);
        self.scratch
    }
}

/// Scores the rows that `of` finds in each layer.
fn for_each_tile<'b>(
    isa: Isa,
    layers: &[HostLayer<'b>],
    of: for<'a> fn(&'a HostLayer<'b>) -> &'a Rows<'b, HostSlice<'b>>,
    out: &mut Ragged<f32>,
    score: impl Score,
) {
    let tasks: Vec<_> = tile::segments(layers)
        .zip(out.rows_mut())
        .enumerate()
        .flat_map(|(s, ((layer, head), row))| {
            let tiles = row.chunks_mut(TILE).enumerate();
            tiles.map(move |(i, out)| (s, of(layer), head, i * TILE, out))
        })
        .collect();
    tasks.into_par_iter().for_each_init(Vec::new, |scratch, (segment, of, head, start, out)| {
        let rows = Slots { of, head, slots: start..start + out.len(), scratch };
        isa.run(Tile { score, segment, rows, out });
    });
}

/// The length of a row, times a sign.
#[derive(Clone, Copy)]
struct Norm(f64);

impl Score for Norm {
    #[inline(always)]
    fn score(self, _: usize, row: &[f32]) -> f32 {
        (self.0 * dot(row, row).sqrt()) as f32
    }
}

pub(super) fn key_norm(isa: Isa, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    check::segments(layers, out)?;
    for_each_tile(isa, layers, HostLayer::k, out, Norm(-1.0));
    Ok(())
}

/// `‖v‖₂` per slot, into rows that have been checked.
pub(super) fn value_norm(isa: Isa, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) {
    for_each_tile(isa, layers, HostLayer::v, out, Norm(1.0));
}

pub(super) fn key_diff(isa: Isa, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    /// Means of the segments' unit keys, and their norms.
    #[derive(Clone, Copy)]
    struct Cosine<'a>(&'a [(Vec<f32>, f64)]);
    impl Score for Cosine<'_> {
        #[inline(always)]
        fn score(self, segment: usize, key: &[f32]) -> f32 {
            let (mean, norm) = &self.0[segment];
            let norms = clamp(dot(key, key).sqrt(), COSINE_EPS) * norm;
            -(dot(key, mean) / norms) as f32
        }
    }
    check::segments(layers, out)?;
    for_each_tile(isa, layers, HostLayer::k, out, Cosine(&unit_key_means(isa, layers)));
    Ok(())
}

/// Sum of a tile's unit keys.
struct UnitSum<'a> {
    rows: Slots<'a>,
    sums: &'a mut [f64],
}

impl Kernel for UnitSum<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { rows, sums } = self;
        for key in rows.read().chunks_exact(sums.len()) {
            let factor = 1.0 / clamp(dot(key, key).sqrt(), UNIT_EPS);
            sums.iter_mut().zip(key).for_each(|(sum, &x)| *sum += f64::from(x) * factor);
        }
    }
}

/// Mean of the unit keys of each segment, rounded to f32, and its norm.
fn unit_key_means(isa: Isa, layers: &[HostLayer<'_>]) -> Vec<(Vec<f32>, f64)> {
    let tasks: Vec<_> = tile::segments(layers)
        .enumerate()
        .flat_map(|(s, (layer, head))| {
            let starts = (0..layer.k().len(head)).step_by(TILE);
            starts.map(move |start| (s, layer, head, start))
        })
        .collect();
    let parts: Vec<Vec<f64>> = tasks
        .par_iter()
        .map_init(Vec::new, |scratch, &(_, layer, head, start)| {
            let end = layer.k().len(head).min(start + TILE);
            let rows = Slots { of: layer.k(), head, slots: start..end, scratch };
            let mut sums = vec![0f64; layer.shape().head_dim()];
            isa.run(UnitSum { rows, sums: &mut sums });
            sums
        })
        .collect();
    let mut totals: Vec<Vec<f64>> =
        tile::segments(layers).map(|(layer, _)| vec![0.0; layer.shape().head_dim()]).collect();
    for ((s, ..), part) in tasks.iter().zip(parts) {
        totals[*s].iter_mut().zip(part).for_each(|(total, x)| *total += x);
    }
    tile::segments(layers)
        .zip(totals)
        .map(|((layer, head), total)| {
            let len = layer.k().len(head).max(1) as f64;
            let mean: Vec<f32> = total.into_iter().map(|x| (x / len) as f32).collect();
            let norm = clamp(dot(&mean, &mean).sqrt(), COSINE_EPS);
            (mean, norm)
        })
        .collect()
}

/// At least `least`; NaN stays.
#[inline(always)]
fn clamp(x: f64, least: f64) -> f64 {
    if x < least { least } else { x }
}

/// Dot product in f64, in a fixed order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0f64; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += f64::from(a[l]) * f64::from(b[l]);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += f64::from(a) * f64::from(b);
    }
    lanes.iter().sum()
}

pub(super) fn positional(
    op: Positional,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::segments(layers, out)?;
    for ((layer, head), row) in tile::segments(layers).zip(out.rows_mut()) {
        let positions = layer.positions().map(|p| &p[head]);
        for (slot, out) in row.iter_mut().enumerate() {
            let position = positions.map_or(slot as u32, |p| p[slot].0);
            *out = match op {
                Positional::Recency => recency(position),
                Positional::Random { seed, layer } => random(seed, layer, head as u32, position),
            };
        }
    }
    Ok(())
}

/// Strictly increasing in the position, up to `2^31` and beyond: floats of one sign order as their bits do, so
/// `position - 2^30` counts floats from zero, upwards or downwards. `position as f32` would make ties above
/// `2^24`. Starts just above -2; a long context stays far from the subnormals around zero.
fn recency(position: u32) -> f32 {
    const ZERO: u32 = 1 << 30;
    if position >= ZERO {
        f32::from_bits(position - ZERO)
    } else {
        -f32::from_bits(ZERO - position)
    }
}

/// Uniform in `[0, 1)`, a multiple of 2⁻²⁴: the top bits of `mix(mix(mix(seed) ^ (layer << 32 | head)) ^ position)`.
fn random(seed: u64, layer: u32, head: u32, position: u32) -> f32 {
    let row = mix(mix(seed) ^ (u64::from(layer) << 32 | u64::from(head)));
    (mix(row ^ u64::from(position)) >> 40) as f32 / (1u32 << 24) as f32
}

/// One step of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
