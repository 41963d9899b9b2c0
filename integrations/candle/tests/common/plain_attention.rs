//! Plain-loop attention over a dump, with a bound on how far the attention of the model may be
//! from it.

use candle_core::{DType, Result, Tensor};
use kvbudget_candle::{AttentionHook, Dump, Span};

/// Records what the hook inside it returns, per layer and in call order.
pub struct RecordOutputs<A> {
    pub inner: A,
    pub outputs: Vec<Vec<Tensor>>,
}

impl<A> RecordOutputs<A> {
    pub fn new(inner: A, layers: usize) -> Self {
        Self { inner, outputs: vec![Vec::new(); layers] }
    }

    /// All outputs of a layer, `[Hq, T + F, D]`.
    pub fn layer(&self, layer: usize) -> Result<Tensor> {
        Tensor::cat(&self.outputs[layer], 0)?.transpose(0, 1)
    }
}

impl<A: AttentionHook> AttentionHook for &mut RecordOutputs<A> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let output = self.inner.attend(layer, q, k, v, spans)?;
        self.outputs[layer].push(output.clone());
        Ok(output)
    }
}

type Rows = Vec<Vec<Vec<f64>>>;

/// The largest ratio of a difference to its bound, over all dumped queries of a layer. At most 1
/// when the dump explains `output` `[Hq, T + F, D]`, the attention that the model computed.
pub fn worst_ratio(dump: &Dump, layer: usize, output: &Tensor) -> Result<f64> {
    let rows = |name: &str| -> Result<Rows> {
        dump.tensors[&format!("l{layer}.{name}")].to_dtype(DType::F64)?.to_vec3()
    };
    let dtype = dump.tensors[&format!("l{layer}.k")].dtype();
    let (q, q_next) = (rows("q")?, rows("q_next")?);
    let append = |mut a: Rows, b: Rows| {
        a.iter_mut().zip(b).for_each(|(a, b)| a.extend(b));
        a
    };
    let tokens = rows("k")?[0].len();
    let k = append(rows("k")?, rows("k_next")?);
    let v = append(rows("v")?, rows("v_next")?);
    let output: Rows = output.to_dtype(DType::F64)?.to_vec3()?;

    let group = q.len() / k.len();
    let window = q[0].len();
    let mut worst = 0.0f64;
    for head in 0..q.len() {
        let (k, v) = (&k[head / group], &v[head / group]);
        let last = q[head].iter().enumerate().map(|(i, q)| (tokens - window + i, q));
        let next = q_next[head].iter().enumerate().map(|(i, q)| (tokens + i, q));
        for (position, q) in last.chain(next) {
            let bounded = attend_one(q, &k[..=position], &v[..=position], dtype);
            for (got, (expected, bound)) in output[head][position].iter().zip(bounded) {
                // A NaN anywhere must not pass as a small ratio.
                let ratio = (got - expected).abs() / bound;
                worst = if ratio.is_nan() { f64::INFINITY } else { worst.max(ratio) };
            }
        }
    }
    Ok(worst)
}

/// Softmax attention of one query in f64, each element with a bound on how far f32 attention over
/// the values before they were rounded to `dtype` can be from it.
///
/// A score moves by at most `shift`, the rounding of q and k and of the f32 dot product, so each
/// softmax weight moves by a factor of at most `exp(2 * shift)`. To that come the rounding of v
/// and of the f32 sums.
fn attend_one(q: &[f64], k: &[Vec<f64>], v: &[Vec<f64>], dtype: DType) -> Vec<(f64, f64)> {
    let f32_roundoff = 2f64.powi(-24);
    // Half a unit in the last place, relative; and absolute, for the subnormal numbers of f16.
    let (relative, absolute) = match dtype {
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 0.0),
        _ => (0.0, 0.0),
    };
    let rounding = |x: f64| x.abs() * relative + absolute;
    let scale = (q.len() as f64).powf(-0.5);

    let mut scores = Vec::new();
    let mut shift = 0.0f64;
    for key in k {
        let (mut score, mut size, mut moved) = (0.0, 0.0, 0.0);
        for (&a, &b) in q.iter().zip(key) {
            score += a * b * scale;
            size += (a * b).abs() * scale;
            moved +=
                (a.abs() * rounding(b) + b.abs() * rounding(a) + rounding(a) * rounding(b)) * scale;
        }
        // D products and sums, the scaling, and the subtraction of the largest score.
        shift = shift.max(moved + (q.len() + 4) as f64 * f32_roundoff * (size + moved));
        scores.push(score);
    }
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
    let total: f64 = weights.iter().sum();

    let factor = (2.0 * shift).exp();
    let sums = 2.0 * (k.len() + 8) as f64 * f32_roundoff;
    (0..q.len())
        .map(|d| {
            let (mut value, mut size, mut moved) = (0.0, 0.0, 0.0);
            for (weight, row) in weights.iter().zip(v) {
                let weight = weight / total;
                value += weight * row[d];
                size += weight * row[d].abs();
                moved += weight * rounding(row[d]);
            }
            (value, (factor - 1.0) * size + factor * (moved + sums * (size + moved)))
        })
        .collect()
}
