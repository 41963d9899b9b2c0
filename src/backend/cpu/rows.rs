//! Elementwise and per-row operations on scores: cheap, memory bound, no tensor is read.

use std::ops::Range;

use rayon::prelude::*;

use super::HostLayer;
use crate::backend::check;
use crate::backend::ops::NormScale;
use crate::error::Result;
use crate::ragged::Ragged;

pub(super) fn scale_norms(
    op: NormScale,
    layers: &[HostLayer<'_>],
    norms: &mut Ragged<f32>,
) -> Result<()> {
    check::segments(layers, norms)?;
    let mut first = 0;
    for layer in layers {
        let segments = first..first + layer.shape().kv_heads();
        first = segments.end;
        match op {
            NormScale::None => {}
            NormScale::Layer => {
                let sum: f64 = segments
                    .clone()
                    .map(|s| norms.row(s).iter().map(|&x| f64::from(x)).sum::<f64>())
                    .sum();
                let factor = reciprocal(sum);
                for s in segments {
                    norms.row_mut(s).iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
                }
            }
            NormScale::Heads => {
                // By position, since the heads of a compressed cache hold different ones.
                let position = |s: usize, slot: usize| match layer.positions() {
                    Some(p) => p[s - segments.start][slot].index(),
                    None => slot,
                };
                let mut sums = vec![0f64; layer.tokens() as usize];
                for s in segments.clone() {
                    for (slot, &x) in norms.row(s).iter().enumerate() {
                        sums[position(s, slot)] += f64::from(x);
                    }
                }
                for s in segments.clone() {
                    for (slot, x) in norms.row_mut(s).iter_mut().enumerate() {
                        *x = (f64::from(*x) * reciprocal(sums[position(s, slot)])) as f32;
                    }
                }
            }
        }
    }
    Ok(())
}

/// `1 / x`, and 0 for 0: a head without values has no norm to share out.
fn reciprocal(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

pub(super) fn floor_at_mean(lens: &[u32], rows: &mut Ragged<f32>) -> Result<()> {
    check::floor_at_mean(lens, rows)?;
    for (s, &len) in lens.iter().enumerate() {
        let row = &mut rows.row_mut(s)[..len as usize];
        if row.is_empty() {
            continue;
        }
        let mean = (row.iter().map(|&x| f64::from(x)).sum::<f64>() / row.len() as f64) as f32;
        for x in row {
            // Written so that NaN stays NaN.
            if *x < mean {
                *x = mean;
            }
        }
    }
    Ok(())
}

pub(super) fn weigh(epsilon: f32, rows: &Ragged<f32>, norms: &mut Ragged<f32>) -> Result<()> {
    check::weigh(rows, norms)?;
    for s in 0..rows.rows() {
        for (norm, &x) in norms.row_mut(s).iter_mut().zip(rows.row(s)) {
            *norm *= x + epsilon;
        }
    }
    Ok(())
}

pub(super) fn raise(by: &Ragged<f32>, rows: &mut Ragged<f32>) -> Result<()> {
    check::raise(by, rows)?;
    for s in 0..rows.rows() {
        for (x, &by) in rows.row_mut(s).iter_mut().zip(by.row(s)) {
            // Written so that NaN stays NaN.
            if by.is_nan() || *x < by {
                *x = by;
            }
        }
    }
    Ok(())
}

pub(super) fn rank(
    protected: &Ragged<Range<u32>>,
    weights: &[f32],
    rows: &mut Ragged<f32>,
) -> Result<()> {
    check::rank(protected, weights, rows)?;
    let rows = rows.rows_mut().into_par_iter().enumerate();
    rows.for_each(|(s, row)| {
        let mut first = vec![false; row.len()];
        for range in protected.row(s) {
            first[range.start as usize..range.end as usize].fill(true);
        }
        // Descending with NaN last and `-0` as `+0`; equal scores keep the order of their slots.
        let key = |slot: u32| {
            let x = row[slot as usize];
            (first[slot as usize], !x.is_nan(), if x.is_nan() { 0.0 } else { x + 0.0 })
        };
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|&a, &b| {
            let (a, b) = (key(a), key(b));
            (b.0, b.1).cmp(&(a.0, a.1)).then(b.2.total_cmp(&a.2))
        });
        for (n, slot) in (1u32..).zip(order) {
            let x = &mut row[slot as usize];
            if !x.is_nan() && *x != f32::INFINITY {
                *x = weights[s] / n as f32;
            }
        }
    });
    Ok(())
}

pub(super) fn share_heads(heads: &[usize], rows: &mut Ragged<f32>) -> Result<()> {
    check::share_heads(heads, rows)?;
    let mut first = 0;
    for &n in heads {
        let segments = first..first + n;
        first = segments.end;
        let len = rows.len(segments.start);
        let mut sum = vec![0f32; len];
        for s in segments.clone() {
            sum.iter_mut().zip(rows.row(s)).for_each(|(a, &x)| *a += x);
        }
        for s in segments {
            rows.row_mut(s).copy_from_slice(&sum);
        }
    }
    Ok(())
}

pub(super) fn coarsen(units: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
    check::coarsen(units, rows)?;
    // In f64, so that the mean of recencies, which differ by single ulps, still orders as they do.
    let mean = |row: &[f32], unit: &Range<u32>| {
        let slots = &row[unit.start as usize..unit.end as usize];
        (slots.iter().map(|&x| f64::from(x)).sum::<f64>() / slots.len() as f64) as f32
    };
    Ok(units
        .iter()
        .zip(rows.iter())
        .map(|(units, row)| units.iter().map(|unit| mean(row, unit)).collect())
        .collect())
}

pub(super) fn pick(slots: &Ragged<u32>, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
    check::pick(slots, rows)?;
    Ok(slots
        .iter()
        .zip(rows.iter())
        .map(|(slots, row)| slots.iter().map(|&i| row[i as usize]).collect())
        .collect())
}
