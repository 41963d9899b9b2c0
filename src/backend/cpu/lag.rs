//! LagKV: how much a slot varies across channels, relative to the range of the partition that follows.
//!
//! In: k, v `[H, len, D]`; out `[H, len]` f32. Source: LagKV as kvpress has it. Slots from `sinks` on form
//! partitions of `lag`. For K and for V, each row of a partition is scaled by the minima and maxima of the
//! next partition, channel by channel; its score is the softmax, over the partition, of the standard deviation
//! over channels. The two softmaxes are averaged; without `cross_scoring` the result is the rank inside the
//! partition divided by `lag`. A channel that is constant in the next partition has no scale and counts as 0.
//!
//! Cost: two reads of K and V, `8·D` flops per slot: memory bound. Partitions are independent, one task each.
//! Deviations and softmaxes are f64, since ranks make ties and near ties visible.

use rayon::prelude::*;

use super::HostLayer;
use super::HostSlice;
use super::isa::{Arithmetic, Isa, Kernel};
use super::tile;
use crate::backend::check;
use crate::backend::ops::Lag;
use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::Rows;

pub(super) fn run(
    isa: Isa,
    op: &Lag,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::lag(op, layers, out)?;
    let (sinks, lag) = (op.sinks as usize, op.lag as usize);
    let mut tasks = Vec::new();
    for ((layer, head), row) in tile::segments(layers).zip(out.rows_mut()) {
        row.fill(1.0);
        if row.len() < sinks.saturating_add(lag.saturating_mul(2)) {
            // Too short for a partition and its successor: by recency.
            let rest = row.len().saturating_sub(sinks);
            for (i, out) in row.iter_mut().skip(sinks).enumerate() {
                *out = i as f32 / rest as f32;
            }
            continue;
        }
        let scored = (row.len() - sinks) / lag - 1;
        let partitions = row[sinks..].chunks_exact_mut(lag).take(scored).enumerate();
        tasks.extend(partitions.map(|(i, out)| (layer, head, sinks + i * lag, out)));
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (layer, head, start, out)| {
        scratch.score(isa, op, layer, head, start, out);
    });
    Ok(())
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    /// A partition and its successor.
    rows: Vec<f32>,
    minima: Vec<f32>,
    ranges: Vec<f32>,
    scaled: Vec<f64>,
    keys: Vec<f64>,
    values: Vec<f64>,
    order: Vec<u32>,
}

impl Scratch {
    fn score(
        &mut self,
        isa: Isa,
        op: &Lag,
        layer: &HostLayer<'_>,
        head: usize,
        start: usize,
        out: &mut [f32],
    ) {
        let (mut keys, mut values) =
            (std::mem::take(&mut self.keys), std::mem::take(&mut self.values));
        self.variation(isa, layer.k(), head, start, out.len(), &mut keys);
        self.variation(isa, layer.v(), head, start, out.len(), &mut values);
        keys.iter_mut().zip(&values).for_each(|(k, v)| *k = (*k + v) / 2.0);
        out.iter_mut().zip(&keys).for_each(|(out, &k)| *out = k as f32);
        if !op.cross_scoring {
            self.order.clear();
            self.order.extend(0..out.len() as u32);
            self.order.sort_unstable_by(|&a, &b| {
                keys[a as usize].total_cmp(&keys[b as usize]).then(a.cmp(&b))
            });
            for (rank, &slot) in self.order.iter().enumerate() {
                // A NaN has no rank; hiding it would hide a broken cache.
                if !keys[slot as usize].is_nan() {
                    out[slot as usize] = rank as f32 / out.len() as f32;
                }
            }
        }
        (self.keys, self.values) = (keys, values);
    }

    /// Softmax over the partition of the rows' deviations.
    fn variation(
        &mut self,
        isa: Isa,
        rows: &Rows<'_, HostSlice<'_>>,
        head: usize,
        start: usize,
        lag: usize,
        out: &mut Vec<f64>,
    ) {
        let dim = rows.dim();
        self.rows.resize(2 * lag * dim, 0.0);
        self.minima.clear();
        self.minima.resize(dim, f32::INFINITY);
        self.ranges.clear();
        self.ranges.resize(dim, f32::NEG_INFINITY);
        self.scaled.resize(dim, 0.0);
        out.clear();
        isa.run(Deviations { rows, head, start, lag, scratch: self, out });
        let max = out.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        out.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f64 = out.iter().sum();
        out.iter_mut().for_each(|x| *x /= sum);
    }
}

/// Deviations of a partition's rows, scaled by its successor.
struct Deviations<'a> {
    rows: &'a Rows<'a, HostSlice<'a>>,
    head: usize,
    start: usize,
    lag: usize,
    scratch: &'a mut Scratch,
    out: &'a mut Vec<f64>,
}

impl Kernel for Deviations<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { rows: source, head, start, lag, scratch, out } = self;
        let Scratch { rows, minima, ranges, scaled, .. } = scratch;
        let dim = source.dim();
        tile::widen_apart(source, head, start..start + 2 * lag, dim, rows);
        let (own, next) = rows.split_at(lag * dim);
        for row in next.chunks_exact(dim) {
            minima.iter_mut().zip(row).for_each(|(m, &x)| *m = -tile::max2(-*m, -x));
            ranges.iter_mut().zip(row).for_each(|(m, &x)| *m = tile::max2(*m, x));
        }
        ranges.iter_mut().zip(minima.iter()).for_each(|(range, &min)| *range -= min);
        for row in own.chunks_exact(dim) {
            out.push(deviation(row, minima, ranges, scaled));
        }
    }
}

/// Unbiased standard deviation over channels of a row scaled by minima and ranges; `z` is scratch.
#[inline(always)]
fn deviation(row: &[f32], minima: &[f32], ranges: &[f32], z: &mut [f64]) -> f64 {
    if row.len() < 2 {
        return 0.0;
    }
    for (((z, &x), &min), &range) in z.iter_mut().zip(row).zip(minima).zip(ranges) {
        // Not simply 0 for a constant channel: NaN must stay NaN.
        *z = f64::from(if range == 0.0 { (x - min) * 0.0 } else { (x - min) / range });
    }
    let mean = sum(z) / row.len() as f64;
    z.iter_mut().for_each(|z| *z = (*z - mean) * (*z - mean));
    (sum(z) / (row.len() - 1) as f64).sqrt()
}

/// Sum in a fixed order.
#[inline(always)]
fn sum(x: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f64; LANES];
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] += chunk[l];
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().sum::<f64>()
}
