//! Smoothing of scores over neighbouring slots: average (zero padding, divisor always the kernel) or maximum.
//!
//! Edge sums of the average are under-weighted, as `torch.nn.functional.avg_pool1d` has it; the maximum's windows
//! shrink. A NaN spreads to every window that touches it.

use rayon::prelude::*;

use crate::backend::check;
use crate::backend::ops::{Pool, Pooling};
use crate::error::Result;
use crate::ragged::Ragged;

pub(super) fn run(op: &Pool<'_>, rows: &mut Ragged<f32>) -> Result<()> {
    check::pool(op, rows)?;
    let radius = (op.kernel / 2) as usize;
    rows.rows_mut().into_par_iter().zip(op.lens).for_each(|(row, &len)| {
        let row = &mut row[..len as usize];
        let source = row.to_vec();
        for (t, out) in row.iter_mut().enumerate() {
            let window = &source[t.saturating_sub(radius)..source.len().min(t + radius + 1)];
            *out = match op.kind {
                Pooling::Avg => window.iter().sum::<f32>() / op.kernel as f32,
                Pooling::Max => window.iter().copied().fold(f32::NEG_INFINITY, nan_max),
            };
        }
    });
    Ok(())
}

/// Maximum that keeps NaN, unlike `f32::max`.
fn nan_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}
