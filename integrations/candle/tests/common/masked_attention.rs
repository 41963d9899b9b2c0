//! What a compressed cache must compute, the plain way: nothing is evicted, and evicted positions are masked.
//! Loops in f64; shares no code with the cache.
#![allow(dead_code, reason = "each test uses a part of it")]

use candle_core::{DType, Device, Result, Tensor};
use kvbudget::{Geometry, Plan};
use kvbudget_candle::{AttentionHook, Span};

/// One KV head of one layer of one sequence.
#[derive(Clone, Default)]
struct Head {
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    /// By position.
    evicted: Vec<bool>,
}

/// Dense attention with a mask per sequence, layer and head.
pub struct MaskedAttention {
    /// `[sequence][layer][head]`
    heads: Vec<Vec<Vec<Head>>>,
}

impl MaskedAttention {
    pub fn new(geometry: &Geometry, sequences: usize) -> Self {
        let layers = geometry.layers().iter().map(|l| vec![Head::default(); l.kv_heads()]);
        Self { heads: vec![layers.collect(); sequences] }
    }

    /// Masks what a plan does not keep of the tokens so far.
    pub fn apply(&mut self, sequence: usize, plan: &Plan) {
        for (heads, kept) in self.heads[sequence].iter_mut().zip(&plan.layers) {
            for (head, kept) in heads.iter_mut().zip(kept.iter()) {
                head.evicted.fill(true);
                kept.iter().for_each(|p| head.evicted[p.index()] = false);
            }
        }
    }

    /// Masks one position more.
    pub fn evict(&mut self, sequence: usize, layer: usize, head: usize, position: usize) {
        self.heads[sequence][layer][head].evicted[position] = true;
    }
}

impl AttentionHook for MaskedAttention {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let rows = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec3::<f64>();
        let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
        let group = q[0].len() / k[0].len();
        let mut out = Vec::new();
        let mut row = 0;
        for (span, layers) in spans.iter().zip(&mut self.heads) {
            for _ in 0..span.tokens {
                for (h, head) in layers[layer].iter_mut().enumerate() {
                    head.k.push(k[row][h].clone());
                    head.v.push(v[row][h].clone());
                    head.evicted.push(false);
                    for q in &q[row][h * group..(h + 1) * group] {
                        out.extend(head.attend(q).into_iter().map(|x| x as f32));
                    }
                }
                row += 1;
            }
        }
        Tensor::from_vec(out, (q.len(), q[0].len(), q[0][0].len()), &Device::Cpu)
    }
}

impl Head {
    fn attend(&self, q: &[f64]) -> Vec<f64> {
        let seen: Vec<usize> = (0..self.k.len()).filter(|&t| !self.evicted[t]).collect();
        let dot = |t: &usize| q.iter().zip(&self.k[*t]).map(|(a, b)| a * b).sum::<f64>();
        let weights: Vec<f64> =
            seen.iter().map(|t| (dot(t) / (q.len() as f64).sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        let column = |d: usize| -> f64 {
            seen.iter().zip(&weights).map(|(&t, w)| w * self.v[t][d]).sum::<f64>() / total
        };
        (0..q.len()).map(column).collect()
    }
}
