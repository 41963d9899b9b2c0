//! What a denoiser must compute, the plain way: all rows run through the model, keys and values of the prompt are replaced by
//! older ones, and what a plan evicts is left out of the sums. Loops in f64; shares no code with the denoiser.

use candle_core::{DType, Device, Result, Tensor};
use kvbudget::Plan;
use kvbudget_candle::{AttentionHook, Span};

/// Rows `[N][heads][D]`.
pub type Rows = Vec<Vec<Vec<f64>>>;

/// One layer of one pass.
pub struct Layer {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    /// What entered it, `[N, hidden]`, and what its heads have read, `[N, Hq, D]`.
    pub x: Tensor,
    pub attended: Tensor,
}

/// A prompt of `tokens` tokens as it was in another pass, and which of its slots are left.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    pub tokens: usize,
    pub layers: &'a [Layer],
    pub plan: &'a Plan,
}

/// Attention of every row to every row, and a record of it.
#[derive(Default)]
pub struct Bidirectional<'a> {
    pub frozen: Option<Frozen<'a>>,
    pub layers: Vec<Layer>,
    entered: Option<Tensor>,
}

impl<'a> Bidirectional<'a> {
    pub fn frozen(frozen: Frozen<'a>) -> Self {
        Self { frozen: Some(frozen), ..Self::default() }
    }
}

impl AttentionHook for Bidirectional<'_> {
    fn hidden(&mut self, _: usize, rows: &Tensor, _: &[Span]) -> Result<()> {
        self.entered = Some(rows.clone());
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &[Span],
    ) -> Result<Tensor> {
        let rows = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec3::<f64>();
        let (shape, q, mut k, mut v) = (q.shape(), rows(q)?, rows(k)?, rows(v)?);
        if let Some(Frozen { tokens, layers, .. }) = self.frozen {
            k[..tokens].clone_from_slice(&layers[layer].k[..tokens]);
            v[..tokens].clone_from_slice(&layers[layer].v[..tokens]);
        }
        let group = q[0].len() / k[0].len();
        let mut out = Vec::new();
        for row in &q {
            for (hq, query) in row.iter().enumerate() {
                let head = hq / group;
                let seen = |t: &usize| match &self.frozen {
                    Some(Frozen { tokens, plan, .. }) if t < tokens => {
                        plan.layers[layer].row(head).iter().any(|p| p.index() == *t)
                    }
                    _ => true,
                };
                let seen: Vec<usize> = (0..k.len()).filter(seen).collect();
                let weights = softmax(query, seen.iter().map(|&t| &k[t][head]));
                let column = |d: usize| -> f64 {
                    seen.iter().zip(&weights).map(|(&t, w)| w * v[t][head][d]).sum()
                };
                out.extend((0..query.len()).map(|d| column(d) as f32));
            }
        }
        let attended = Tensor::from_vec(out, shape, &Device::Cpu)?;
        let x = self.entered.take().expect("rows that enter the layer");
        self.layers.push(Layer { q, k, v, x, attended: attended.clone() });
        Ok(attended)
    }
}

impl Layer {
    /// Mean attention that the queries of some rows pay to each row, over the heads of each group: `[H][N]`.
    pub fn votes(&self, rows: &[usize]) -> Vec<Vec<f64>> {
        let (heads, group) = (self.k[0].len(), self.q[0].len() / self.k[0].len());
        let votes = |head: usize| {
            let mut votes = vec![0.0; self.k.len()];
            for (row, hq) in rows
                .iter()
                .flat_map(|row| (head * group..(head + 1) * group).map(move |hq| (row, hq)))
            {
                let weights = softmax(&self.q[*row][hq], self.k.iter().map(|k| &k[head]));
                votes.iter_mut().zip(weights).for_each(|(vote, weight)| *vote += weight);
            }
            votes.iter().map(|vote| vote / (rows.len() * group) as f64).collect()
        };
        (0..heads).map(votes).collect()
    }
}

fn softmax<'k>(query: &[f64], keys: impl Iterator<Item = &'k Vec<f64>>) -> Vec<f64> {
    let dot = |k: &Vec<f64>| query.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
    let weights: Vec<f64> = keys.map(|k| (dot(k) / (query.len() as f64).sqrt()).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}
