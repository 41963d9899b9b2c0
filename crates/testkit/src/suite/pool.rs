//! Pooling: edges, partial rows, NaN.

use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Pool, Pooling};

use super::{Expected, fails, pass, read, upload};
use crate::compare::{self, Scale};
use crate::data::TestDevice;
use crate::generate::{LENGTHS, Scores};
use crate::naive::{self, Float};

const KERNELS: [u32; 6] = [1, 3, 5, 7, 63, 129];

fn run<D: TestDevice>(
    device: &D,
    op: &Pool<'_>,
    rows: &[Vec<f32>],
) -> kvbudget::Result<kvbudget::Ragged<f32>> {
    let mut on_device = upload(device, rows);
    device.backend().pool(op, &mut on_device)?;
    Ok(read(device, &on_device))
}

fn pooled<F: Float>(op: &Pool<'_>, rows: &[Vec<f32>]) -> Vec<Vec<F>> {
    let mut rows: Vec<Vec<F>> =
        rows.iter().map(|row| row.iter().map(|&x| naive::num(x)).collect()).collect();
    for (row, &len) in rows.iter_mut().zip(op.lens) {
        naive::pool(op, &mut row[..len as usize]);
    }
    rows
}

/// How much of each row takes part: nothing, one slot, all but a window, everything.
fn participants() -> [Vec<u32>; 4] {
    [0, 1, 8, u32::MAX].map(|n| {
        let part = |&len: &u32| match n {
            8 => len.saturating_sub(8),
            n => len.min(n),
        };
        LENGTHS.iter().map(part).collect()
    })
}

/// Averages with zeros beyond the ends; what does not take part stays as it was.
pub fn averages<D: TestDevice>(device: &D) {
    let rows: Vec<_> = LENGTHS.iter().map(|&n| Scores::Random.row(n, u64::from(n))).collect();
    for kernel in KERNELS {
        for lens in participants() {
            let op = Pool { kind: Pooling::Avg, kernel, lens: &lens };
            let expected = Expected { want: pooled(&op, &rows), baseline: pooled(&op, &rows) };
            expected.check(&op, run(device, &op, &rows), Scale::Row);
        }
    }
}

/// Maxima are exact, whatever the values.
pub fn maxima<D: TestDevice>(device: &D) {
    for kind in Scores::ALL {
        let rows: Vec<_> = LENGTHS.iter().map(|&n| kind.row(n, u64::from(n))).collect();
        for kernel in KERNELS {
            for lens in participants() {
                let op = Pool { kind: Pooling::Max, kernel, lens: &lens };
                let got = run(device, &op, &rows).unwrap_or_else(|e| panic!("{op:?}: {e}"));
                pass(&(kind, &op), compare::exact(&got, &pooled::<f64>(&op, &rows)));
            }
        }
    }
}

/// A NaN or an infinity reaches the windows that touch it, and no other (a running sum would keep it).
pub fn non_finite<D: TestDevice>(device: &D) {
    let mut row = vec![1.0f32; 40];
    (row[7], row[20], row[31]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let rows = [row.clone(), vec![f32::NAN; 9], vec![f32::INFINITY; 9], row];
    for kernel in [1, 3, 5, 7, 13] {
        let op = Pool { kind: Pooling::Avg, kernel, lens: &[40, 9, 9, 20] };
        let expected = Expected { want: pooled(&op, &rows), baseline: pooled(&op, &rows) };
        expected.check(&op, run(device, &op, &rows), Scale::Row);
    }
}

/// Even kernels have no centre.
pub fn errors<D: TestDevice>(device: &D) {
    let rows = [vec![1.0; 8]];
    let op = |kernel, lens| Pool { kind: Pooling::Avg, kernel, lens };
    fails(&"even", run(device, &op(4, &[8]), &rows));
    fails(&"zero", run(device, &op(0, &[8]), &rows));
    fails(&"one length too many", run(device, &op(3, &[8, 8]), &rows));
    fails(&"longer than the row", run(device, &op(3, &[9]), &rows));
}
