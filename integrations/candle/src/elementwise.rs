//! Elementwise steps that candle runs on one thread, with a scalar `exp`, and that cost as much as the matrix
//! products there: SwiGLU, and softmax under a causal mask. Here they take all threads and vector code.

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, bail};
use rayon::prelude::*;

/// `silu(gate) * up` of rows that hold `gate` and then `up`.
pub(crate) struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, columns) = layout.shape().dims2()?;
        let (CpuStorage::F32(x), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("swiglu: expected contiguous f32");
        };
        let half = columns / 2;
        let mut out = vec![0f32; rows * half];
        let pairs = out.par_chunks_mut(half.max(1)).zip(x[start..end].par_chunks(columns.max(1)));
        pairs.for_each(|(out, row)| {
            let (gate, up) = row.split_at(half);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        });
        Ok((CpuStorage::F32(out), (rows, half).into()))
    }
}

/// Softmax of `[heads * queries, keys]` scores in place: the last query of a head sees all keys, each one
/// before it one key less.
pub(crate) struct CausalSoftmax {
    pub(crate) queries: usize,
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (rows, keys) = layout.shape().dims2()?;
        let (CpuStorage::F32(x), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("causal softmax: expected contiguous f32");
        };
        let queries = self.queries;
        if queries == 0 || rows % queries != 0 || keys < queries {
            bail!(
                "causal softmax: {rows} rows of {keys} scores are not those of {queries} queries"
            );
        }
        x[start..end].par_chunks_mut(keys).enumerate().for_each(|(row, scores)| {
            let (seen, hidden) = scores.split_at_mut(keys - queries + row % queries + 1);
            softmax(seen);
            hidden.fill(0.0);
        });
        Ok(())
    }
}

fn softmax(scores: &mut [f32]) {
    let max = fold(scores, f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    scores.iter_mut().for_each(|x| *x = exp(*x - max));
    let factor = 1.0 / fold(scores, 0.0, |a, b| a + b);
    scores.iter_mut().for_each(|x| *x *= factor);
}

/// A reduction in lanes, which a compiler that may not reorder sums can keep in vector registers.
fn fold(values: &[f32], start: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, x);
        }
    }
    lanes.iter().chain(rest).fold(start, |a, &b| join(a, b))
}

/// `e^x` to within two units in the last place, between about 1e-38 and 1e38: `2^n · e^r` with `|r| <= ln(2) / 2`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact when multiplied by a small integer.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2.0 - n * LN2.1;
    // Minimax polynomial of the Cephes library.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn exp_is_close_over_its_range() {
        let mut worst = 0f64;
        for i in -870_000..880_000 {
            let x = i as f32 / 10_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn softmax_sees_the_past_alone() -> Result<()> {
        let (heads, queries, keys) = (2, 3, 40);
        let values: Vec<f32> =
            (0..heads * queries * keys).map(|i| (i * 37 % 101) as f32 / 10.0 - 5.0).collect();
        let scores = Tensor::from_vec(values.clone(), (heads * queries, keys), &Device::Cpu)?;
        scores.inplace_op1(&CausalSoftmax { queries })?;
        for (row, got) in scores.to_vec2::<f32>()?.iter().enumerate() {
            let seen = keys - queries + row % queries + 1;
            let scores = &values[row * keys..][..keys];
            let total: f64 = scores[..seen].iter().map(|&x| f64::from(x).exp()).sum();
            for (key, (&got, &score)) in got.iter().zip(scores).enumerate() {
                let expected = if key < seen { f64::from(score).exp() / total } else { 0.0 };
                assert!((f64::from(got) - expected).abs() < 1e-6, "row {row}, key {key}: {got}");
            }
        }
        Ok(())
    }

    #[test]
    fn swiglu_is_silu_times_up() -> Result<()> {
        let x: Vec<f32> = (0..40).map(|i| (i * 29 % 41) as f32 / 4.0 - 5.0).collect();
        let got = Tensor::from_vec(x.clone(), (2, 20), &Device::Cpu)?.apply_op1_no_bwd(&SwiGlu)?;
        for (row, got) in got.to_vec2::<f32>()?.iter().enumerate() {
            for (i, &got) in got.iter().enumerate() {
                let [gate, up] = [i, i + 10].map(|i| f64::from(x[row * 20 + i]));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                assert!((f64::from(got) - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
        Ok(())
    }
}
