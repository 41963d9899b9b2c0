//! `ν[h, t] = 1/G · Σ_g ‖v[h, t] · W_o[h·G + g]‖₁`: what a value can move in the layer's output, at most. The L2 norm is in
//! [`value_gram`].
//!
//! In: v `[H, len, D]`, the output projection `[hidden, Hq·D]`, whose columns `hq·D..` belong to query head
//! `hq`; out `[H, len]` f32. Source: CriticalKV ("vwl1norm").
//!
//! Cost: `2·Hq·D·hidden·len` flops, as much as the projection itself, so everything else is noise: tiles
//! of values meet blocks of weights in `gemm`, the product is summed and dropped. Weights are widened anew for
//! each tile, 1/256 of the work, which spares a copy of the projection. The block sum is f32, the sum over
//! blocks and heads f64, in a fixed order.

use rayon::prelude::*;

use super::tile::{self, LANES, fold, simd};
use super::{HostLayer, value_gram};
use crate::backend::check;
use crate::backend::ops::ValueNorm;
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots per tile and rows of the projection per block: their product stays in L2.
const TILE: usize = 256;
const BLOCK: usize = 256;

pub(super) fn run(op: ValueNorm, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    check::segments(layers, out)?;
    match op {
        ValueNorm::L1 => l1(layers, out),
        ValueNorm::L2 => value_gram::run(layers, out),
    }
}

fn l1(layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    let mut tasks = Vec::new();
    for ((layer, head), row) in tile::segments(layers).zip(out.rows_mut()) {
        layer.o_proj("value norms")?;
        for (i, out) in row.chunks_mut(TILE).enumerate() {
            tasks.push((layer, head, i * TILE, out));
        }
    }
    tasks
        .into_par_iter()
        .try_for_each_init(Scratch::default, |scratch, (layer, head, start, out)| {
            scratch.norms(layer, head, start, out)
        })
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    weights: Vec<f32>,
    products: Vec<f32>,
}

impl Scratch {
    fn norms(
        &mut self,
        layer: &HostLayer<'_>,
        head: usize,
        start: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let (weights, group) = (layer.o_proj("value norms")?, layer.shape().group());
        let (hidden, dim) = (weights.len(0), layer.shape().head_dim());
        self.values.resize(out.len() * dim, 0.0);
        tile::widen_rows(layer.v(), head, start..start + out.len(), &mut self.values);
        let mut sums = [0f64; TILE];
        for hq in head * group..(head + 1) * group {
            for from in (0..hidden).step_by(BLOCK) {
                let rows = from..hidden.min(from + BLOCK);
                self.weights.resize(rows.len() * dim, 0.0);
                let columns = hq * dim..(hq + 1) * dim;
                tile::widen_columns(weights, 0, rows.clone(), columns, &mut self.weights);
                self.products.resize(out.len() * rows.len(), 0.0);
                tile::matmul_nt(dim, &self.values, &self.weights, &mut self.products);
                simd(
                    #[inline(always)]
                    || {
                        for (sum, row) in
                            sums.iter_mut().zip(self.products.chunks_exact(rows.len()))
                        {
                            *sum += f64::from(sum_of_magnitudes(row));
                        }
                    },
                );
            }
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / group as f64) as f32);
        Ok(())
    }
}

#[inline(always)]
fn sum_of_magnitudes(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] += chunk[l].abs();
        }
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane += x.abs());
    fold(lanes)
}
