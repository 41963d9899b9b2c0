//! Reductions, softmax and pooling of ragged rows.

use cudarc::driver::CudaSlice;

use crate::gpu::{CANARY, Failure, Gpu, Outcome, expect, expect_untouched, launch};
use crate::reference::{self, Random};

/// Units of the last place of an f32 near 1.
const ULP: f64 = 1.0 / (1 << 23) as f64;

/// Rows of the lengths at which something changes: units of four, warps, blocks, tiles of 1024.
struct Rows {
    rows: Vec<Vec<f32>>,
    stride: usize,
}

impl Rows {
    fn cases() -> [Self; 4] {
        let mut random = Random(1);
        let mut of = |lengths: &[usize], stride| Self {
            rows: lengths
                .iter()
                .map(|&n| random.units(n).iter().map(|x| x * 4.0).collect())
                .collect(),
            stride,
        };
        let mut odd = of(&[40, 33, 32, 8, 300, 5, 2], 304);
        odd.rows[0].fill(2.5);
        odd.rows[1][7] = f32::NEG_INFINITY;
        odd.rows[2].fill(f32::NEG_INFINITY);
        odd.rows[3] = vec![-0.0, 0.0, -0.0, 0.0, -0.0, -0.0, 0.0, -0.0];
        odd.rows[4].iter_mut().step_by(3).for_each(|x| *x *= 25.0);
        odd.rows[5] = vec![1e-38, -1e-38, 1e-45, 0.0, -1e-45];
        [
            of(&[0, 1, 3, 4, 5, 31, 32, 33, 127, 128], 128),
            of(&[1023, 1024, 1025, 1, 0, 255, 256, 257], 1028),
            of(&[4099, 2048], 4100),
            odd,
        ]
    }

    /// The matrix, with canaries, which are NaN, where no row is.
    fn upload(&self, gpu: &Gpu) -> Result<CudaSlice<f32>, Failure> {
        let mut all = vec![f32::from_bits(CANARY); self.rows.len() * self.stride];
        for (to, row) in all.chunks_mut(self.stride).zip(&self.rows) {
            to[..row.len()].copy_from_slice(row);
        }
        gpu.upload(&all)
    }

    fn lengths(&self, gpu: &Gpu) -> Result<CudaSlice<i32>, Failure> {
        gpu.upload(&self.rows.iter().map(|row| row.len() as i32).collect::<Vec<_>>())
    }

    /// Each row against its reference, and nothing written past it.
    fn check(&self, what: &str, got: &[f32], want: impl Fn(&[f32]) -> Vec<(f64, f64)>) -> Outcome {
        for (r, (got, row)) in got.chunks(self.stride).zip(&self.rows).enumerate() {
            let what = format!("{what}, row {r} of {}", row.len());
            expect(&what, got[..row.len()].iter().copied(), want(row))?;
            expect_untouched(&what, &got[row.len()..])?;
        }
        Ok(())
    }
}

pub fn reduce(gpu: &Gpu) -> Outcome {
    for case in Rows::cases() {
        let (input, lengths, n) = (case.upload(gpu)?, case.lengths(gpu)?, case.rows.len());
        let mut arrivals = gpu.zeros::<u32>(n)?;
        for chunks in [1, 3, 8] {
            // The counters are those that the last launch left.
            for kernel in ["reduce_sum", "reduce_max"] {
                let (mut out, mut partials) = (gpu.canaries(n)?, gpu.scratch::<f32>(n * chunks)?);
                launch!(gpu, kernel, (chunks, n), 256, 0;
                    &input, &mut out, &mut partials, &mut arrivals, &lengths, &(case.stride as i64));
                let want = case.rows.iter().map(|row| match kernel {
                    "reduce_max" => (reference::max(row), 0.0),
                    // One rounding an addition, of at most the sum of the absolute values.
                    _ => (
                        reference::sum(row),
                        row.iter().map(|x| f64::from(x.abs())).sum::<f64>()
                            * ULP
                            * row.len() as f64,
                    ),
                });
                expect(&format!("{kernel} in {chunks}"), gpu.download(&out)?, want)?;
            }
        }
    }
    Ok(())
}

pub fn softmax(gpu: &Gpu) -> Outcome {
    for case in Rows::cases() {
        let (lengths, n, stride) = (case.lengths(gpu)?, case.rows.len(), case.stride as i64);
        for scale in [1.0f32, 0.3] {
            let scaled = |row: &[f32]| {
                row.iter().map(|&x| f64::from(x) * f64::from(scale)).collect::<Vec<_>>()
            };
            // The exponent, up to `most`, is rounded four times; a thread adds and rescales every 256th element, each
            // step within the error of ex2; the reductions of warps and blocks add as many again.
            let error = |row: &[f32]| {
                let most = scaled(row)
                    .iter()
                    .filter(|x| x.is_finite())
                    .fold(0.0, |a: f64, x| a.max(x.abs()));
                ULP * (4.0 * (most + 16.0) + 4.0 * (row.len() as f64 / 256.0 + 16.0))
            };
            let lse = || {
                case.rows.iter().map(|row| {
                    let lse = reference::log_sum_exp(&scaled(row));
                    (lse, error(row))
                })
            };

            let input = case.upload(gpu)?;
            let mut only = gpu.canaries(n)?;
            launch!(gpu, "log_sum_exp", (n, 1), 256, 0; &input, &mut only, &lengths, &stride, &scale);
            expect("log_sum_exp", gpu.download(&only)?, lse())?;

            let probabilities = |row: &[f32]| {
                // What underflows is flushed to zero.
                let within = |p: f64| (p, p * error(row) + f64::from(f32::MIN_POSITIVE));
                reference::softmax(&scaled(row)).into_iter().map(within).collect()
            };
            let (mut out, mut also) = (gpu.canaries(n * case.stride)?, gpu.canaries(n)?);
            launch!(gpu, "softmax", (n, 1), 256, 0; &input, &mut out, &mut also, &lengths, &stride, &scale);
            expect("lse of softmax", gpu.download(&also)?, lse())?;
            case.check("softmax", &gpu.download(&out)?, probabilities)?;

            let both = case.upload(gpu)?;
            let at = gpu.address(&both);
            launch!(gpu, "softmax", (n, 1), 256, 0; &at, &at, &mut also, &lengths, &stride, &scale);
            case.check("softmax in place", &gpu.download(&both)?, probabilities)?;
        }
    }
    Ok(())
}

pub fn pool(gpu: &Gpu) -> Outcome {
    let mut cases = Rows::cases();
    cases[1].rows[0][500] = f32::NAN;
    cases[1].rows[2][1024] = f32::NAN;
    for case in cases {
        let (input, lengths, n) = (case.upload(gpu)?, case.lengths(gpu)?, case.rows.len());
        let tiles = case.stride.div_ceil(1024);
        for radius in [0, 1, 3, 64] {
            let kernel = (2 * radius + 1) as f64;
            let (mut avg, mut max) =
                (gpu.canaries(n * case.stride)?, gpu.canaries(n * case.stride)?);
            for (name, out) in [("pool_avg", &mut avg), ("pool_max", &mut max)] {
                launch!(gpu, name, (tiles, n), 256, 0;
                    &input, out, &lengths, &(case.stride as i64), &(radius as i32));
            }
            case.check(&format!("pool_avg {radius}"), &gpu.download(&avg)?, |row| {
                let windows = (0..row.len()).map(|t| reference::window(row, t, radius));
                let average = |window: &[f32]| {
                    let absolute: f64 = window.iter().map(|x| f64::from(x.abs())).sum();
                    // Subnormal quotients are rounded to the smallest.
                    (reference::sum(window) / kernel, absolute * ULP + f64::from(f32::from_bits(1)))
                };
                windows.map(average).collect()
            })?;
            case.check(&format!("pool_max {radius}"), &gpu.download(&max)?, |row| {
                (0..row.len())
                    .map(|t| (reference::max_or_nan(reference::window(row, t, radius)), 0.0))
                    .collect()
            })?;
        }
    }
    Ok(())
}
