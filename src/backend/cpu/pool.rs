//! Smoothing of scores over neighbouring slots: average (zero padding, divisor always the kernel) or maximum.
//!
//! Edge sums of the average are under-weighted, as `torch.nn.functional.avg_pool1d` has it; the maximum's windows
//! shrink. A NaN spreads to every window that touches it.

use rayon::prelude::*;

use crate::backend::ops::{Pool, Pooling};
use crate::error::{Error, Result};
use crate::ragged::Ragged;

pub(super) fn run(op: &Pool<'_>, rows: &mut Ragged<f32>) -> Result<()> {
    if op.kernel.is_multiple_of(2) {
        return Err(Error::Parameter {
            name: "kernel",
            expected: "an odd number",
            got: op.kernel.to_string(),
        });
    }
    super::rows::expect_rows("pooled lengths", rows.rows(), op.lens.len())?;
    for (s, &len) in op.lens.iter().enumerate() {
        super::rows::expect_within("pooled slots of a segment", rows.len(s), len as usize)?;
    }
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
