//! `ν[h, t] = 1/G · Σ_g ‖v[h, t] · W_o[h·G + g]‖₁`: what a value can move in the layer's output, at most. The L2 norm is in
//! [`value_gram`].
//!
//! In: v `[H, len, D]`, the output projection `[hidden, Hq·D]`, whose columns `hq·D..` belong to query head
//! `hq`; out `[H, len]` f32. Source: CriticalKV ("vwl1norm").
//!
//! Cost: `2·Hq·D·hidden·len` flops, as much as the projection itself, so everything else is noise: tiles
//! of values meet blocks of weights in pairs of bf16 or in `gemm`, the product is summed and dropped. Weights are packed or
//! widened anew for each tile, little beside the work, which spares a copy of the projection. The block sum is f32, the sum
//! over blocks and heads f64, in a fixed order.

use std::ops::RangeInclusive;

use rayon::prelude::*;

use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::pairs::{self, Left, Packed, Right, Unit};
use super::tile::{self, Aligned, fold};
use super::{HostLayer, key_scores, value_gram};
use crate::backend::check;
use crate::backend::ops::ValueNorm;
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots of a task: for each, weights are read once.
const TASK: RangeInclusive<usize> = 1024..=4096;
/// Slots per tile and rows of the projection per block: in `gemm` their product stays in L2.
const TILE: usize = 256;
const BLOCK: usize = 256;
/// Slots that are multiplied in pairs together: all that takes part stays in L1.
const UNIT_TILE: usize = 64;

pub(super) fn run(
    isa: Isa,
    op: ValueNorm,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::segments(layers, out)?;
    match op {
        ValueNorm::L1 => l1(isa, layers, out),
        ValueNorm::L2 => value_gram::run(isa, layers, out),
        ValueNorm::Plain => {
            key_scores::value_norm(isa, layers, out);
            Ok(())
        }
    }
}

fn l1(isa: Isa, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    let mut tasks = Vec::new();
    let rows = out.rows_mut();
    let slots: usize = rows.iter().map(|row| row.len()).sum();
    let task = (slots / rayon::current_num_threads() / 4).clamp(*TASK.start(), *TASK.end());
    for ((layer, head), row) in tile::segments(layers).zip(rows) {
        layer.o_proj("value norms")?;
        for (i, out) in row.chunks_mut(task).enumerate() {
            tasks.push((Values { layer, head, start: i * task }, out));
        }
    }
    tasks.into_par_iter().try_for_each_init(Scratch::default, |scratch, (values, out)| {
        let weights = values.layer.o_proj("value norms")?.dtype();
        let pairs = pairs::suit(isa, values.layer.v().dtype(), weights);
        if !pairs || !values.norms_by_pairs(isa, scratch, out)? {
            values.norms(isa, scratch, out)?;
        }
        Ok(())
    })
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    weights: Vec<f32>,
    products: Aligned,
    packed: Vec<Packed>,
    right: Right,
    unit: Option<Unit>,
}

/// Slots of a head.
struct Values<'a> {
    layer: &'a HostLayer<'a>,
    head: usize,
    start: usize,
}

impl Values<'_> {
    fn norms(&self, isa: Isa, scratch: &mut Scratch, out: &mut [f32]) -> Result<()> {
        let Self { layer, head, .. } = *self;
        let (weights, group) = (layer.o_proj("value norms")?, layer.shape().group());
        let (hidden, dim) = (weights.len(0), layer.shape().head_dim());
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            let first = self.start + i * TILE;
            scratch.values.resize(out.len() * dim, 0.0);
            tile::widen_rows(layer.v(), head, first..first + out.len(), &mut scratch.values);
            let mut sums = [0f64; TILE];
            for hq in head * group..(head + 1) * group {
                for from in (0..hidden).step_by(BLOCK) {
                    let rows = from..hidden.min(from + BLOCK);
                    let width = rows.len();
                    scratch.weights.resize(width * dim, 0.0);
                    let columns = hq * dim..(hq + 1) * dim;
                    tile::widen_columns(weights, 0, rows, columns, &mut scratch.weights);
                    let products = scratch.products.first(out.len() * width);
                    tile::matmul_nt(dim, &scratch.values, &scratch.weights, products);
                    isa.run(Magnitudes { width, products, sums: &mut sums });
                }
            }
            mean(out, &sums, group);
        }
        Ok(())
    }

    /// As [`norms`](Self::norms). False, and nothing written, if they do not split.
    fn norms_by_pairs(&self, isa: Isa, scratch: &mut Scratch, out: &mut [f32]) -> Result<bool> {
        let Self { layer, head, start } = *self;
        let (weights, group) = (layer.o_proj("value norms")?, layer.shape().group());
        let (hidden, dim) = (weights.len(0), layer.shape().head_dim());
        let tiles = out.len().div_ceil(UNIT_TILE);
        let tile = |i: usize| start + i * UNIT_TILE..start + out.len().min((i + 1) * UNIT_TILE);
        let Scratch { weights: widened, products, packed, right, unit, .. } = scratch;
        let unit = unit.get_or_insert_with(|| Unit::open(isa));
        packed.resize_with(tiles, Packed::default);
        for (i, packed) in packed.iter_mut().enumerate() {
            if Left::in_place(layer.v(), head, tile(i)).is_none()
                && !packed.load(layer.v(), head, tile(i))
            {
                return Ok(false);
            }
        }
        let left = |i: usize| Left::in_place(layer.v(), head, tile(i)).unwrap_or(packed[i].left());
        let mut sums = [0f64; *TASK.end()];
        for hq in head * group..(head + 1) * group {
            for from in (0..hidden).step_by(BLOCK) {
                let rows = from..hidden.min(from + BLOCK);
                let columns = hq * dim..(hq + 1) * dim;
                if !right.load_columns(weights, rows.clone(), columns, widened) {
                    return Ok(false);
                }
                for (i, sums) in sums.chunks_mut(UNIT_TILE).enumerate().take(tiles) {
                    let left = left(i);
                    let products = products.first(UNIT_TILE * pairs::BLOCK);
                    let columns = rows.len();
                    isa.run(UnitTile { unit, left, right, columns, products, sums });
                }
            }
        }
        mean(out, &sums, group);
        Ok(true)
    }
}

fn mean(out: &mut [f32], sums: &[f64], group: usize) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / group as f64) as f32);
}

/// Adds the magnitudes of each row of products to the row's sum.
struct Magnitudes<'a> {
    width: usize,
    products: &'a [f32],
    sums: &'a mut [f64],
}

impl Kernel for Magnitudes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for (sum, row) in self.sums.iter_mut().zip(self.products.chunks_exact(self.width)) {
            let (chunks, rest) = row.as_chunks::<LANES>();
            let mut lanes = [0f32; LANES];
            for chunk in chunks {
                for l in 0..LANES {
                    lanes[l] += chunk[l].abs();
                }
            }
            lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane += x.abs());
            *sum += f64::from(fold(lanes));
        }
    }
}

/// Multiplies a tile of values by a block of weights and adds the magnitudes of each row to the row's sum.
struct UnitTile<'a> {
    unit: &'a Unit,
    left: Left<'a>,
    right: &'a Right,
    /// Of the product, without padding.
    columns: usize,
    products: &'a mut [f32],
    sums: &'a mut [f64],
}

impl Kernel for UnitTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { unit, left, right, columns, products, sums } = self;
        let mut rows = [[0f32; LANES]; UNIT_TILE];
        for (block, from) in (0..columns).step_by(pairs::BLOCK).enumerate() {
            unit.multiply(&left, right, block, products, pairs::BLOCK);
            let width = pairs::BLOCK.min(columns - from);
            for (lanes, row) in rows.iter_mut().zip(products.chunks_exact_mut(pairs::BLOCK)) {
                // Padding may be NaN, where a value is infinite.
                row[width..].fill(0.0);
                let mut sum = A::load(lanes);
                for part in row.as_chunks().0 {
                    sum = A::add(sum, A::abs(A::load(part)));
                }
                A::store(sum, lanes);
            }
        }
        sums.iter_mut().zip(rows).for_each(|(sum, lanes)| *sum += f64::from(fold(lanes)));
    }
}
