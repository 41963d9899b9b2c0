//! Smoothing over neighbours. Average: zeros beyond the ends, divisor always the kernel. Maximum: windows shrink.

use kvbudget::backend::ops::{Pool, Pooling};

use super::{Float, max, num, sum};

/// Pools a whole row in place; what takes part is the caller's slice, not `op.lens`.
pub fn pool<F: Float>(op: &Pool<'_>, row: &mut [F]) {
    let radius = op.kernel as isize / 2;
    let source = row.to_vec();
    for (t, out) in row.iter_mut().enumerate() {
        let neighbour = |offset| source.get(t.checked_add_signed(offset)?).copied();
        let window = (-radius..=radius).filter_map(neighbour);
        *out = match op.kind {
            Pooling::Avg => sum(window) / num(op.kernel),
            Pooling::Max => window.fold(F::neg_infinity(), max),
        };
    }
}
