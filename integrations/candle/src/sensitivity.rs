//! How much eviction in blocks changes a layer's keys: the measurement behind EpiCache's budgets of layers (arXiv 2509.17396).
//!
//! A text is read twice: as it is, and with attention that sees the first tokens, the end of the block before, and its own
//! block. The layer's `σ` is the mean cosine between the keys of both passes; keys of the first layer, which no attention has
//! reached, have 1.

use candle_core::{DType, Result, Tensor, bail};
use kvbudget::backend::AttendView;
use kvbudget::backend::cpu::Cpu;
use kvbudget::{Geometry, LayerProfile};

use crate::attention::{AttentionHook, DenseAttention, Span};
use crate::host::Lent;
use crate::reconstruct::Forward;
use crate::step::Step;

/// What attention of the second pass sees. The defaults are EpiCache's; smaller ones for models of short contexts.
#[derive(Clone, Copy, Debug)]
pub struct BlockMask {
    /// Tokens of a block.
    pub block: usize,
    /// First tokens, seen by all.
    pub sinks: usize,
    /// Tokens of the block before that are seen.
    pub overlap: usize,
}

impl Default for BlockMask {
    fn default() -> Self {
        Self { block: 4096, sinks: 128, overlap: 2048 }
    }
}

/// Over what a cosine is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The key of each token: the paper's.
    Tokens,
    /// The keys of so many tokens as one vector, which weighs tokens by their norms: the published code's, with 100.
    Windows(usize),
}

/// Measures a model on a text; the similarity of each layer.
///
/// Costs two prefills, and the keys of one in memory.
///
/// Errors: a text of one block or less, where both passes are the same; windows or blocks of nothing; and those of `forward`.
pub fn measure(
    model: &str,
    geometry: &Geometry,
    ids: &[u32],
    mask: BlockMask,
    over: Over,
    forward: &mut Forward<'_>,
) -> Result<LayerProfile> {
    if mask.block == 0 || over == Over::Windows(0) {
        bail!("expected blocks and windows of some tokens, got {mask:?}, {over:?}");
    }
    if ids.len() <= mask.block {
        bail!("expected a text longer than a block of {}, got {} tokens", mask.block, ids.len());
    }
    let layers = geometry.layers().len();
    let span = Span::new(0, ids.len() as u32);
    let mut full = Full { attention: DenseAttention::new(layers), keys: Vec::new() };
    forward(ids, &[span], &mut full)?;
    let mut blocked =
        Blocked { cpu: Cpu::new(), geometry, mask, over, full: full.keys, similarity: Vec::new() };
    forward(ids, &[span], &mut blocked)?;
    Ok(LayerProfile {
        model: model.to_owned(),
        similarity: Some(blocked.similarity),
        importance: None,
    })
}

/// The first pass: dense attention, keys kept.
struct Full {
    attention: DenseAttention,
    keys: Vec<Tensor>,
}

impl AttentionHook for Full {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        self.keys.push(k.contiguous()?);
        self.attention.attend(layer, q, k, v, spans)
    }
}

/// The second pass: attention in blocks, keys compared.
struct Blocked<'g> {
    cpu: Cpu,
    geometry: &'g Geometry,
    mask: BlockMask,
    over: Over,
    full: Vec<Tensor>,
    similarity: Vec<f64>,
}

impl AttentionHook for Blocked<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let (Some(full), Some(&shape)) = (self.full.get(layer), self.geometry.layers().get(layer))
        else {
            bail!("expected a layer below {}, got {layer}", self.full.len());
        };
        self.similarity.push(similarity(full, k, self.over)?);
        Step::new(shape, [q, k, v], spans)?;
        let BlockMask { block, sinks, overlap } = self.mask;
        let tokens = k.dim(0)?;
        let mut outputs = Vec::new();
        for start in (0..tokens).step_by(block) {
            let own = block.min(tokens - start);
            let sinks = sinks.min(start);
            let from = start.saturating_sub(overlap.min(block)).max(sinks);
            // What is seen, the block's own tokens last.
            let seen = |x: &Tensor| {
                Tensor::cat(&[x.narrow(0, 0, sinks)?, x.narrow(0, from, start + own - from)?], 0)
            };
            let (q, k, v) = (q.narrow(0, start, own)?.contiguous()?, seen(k)?, seen(v)?);
            let (q, k, v) = (Lent::new(&q)?, Lent::new(&k)?, Lent::new(&v)?);
            let view = AttendView { q: q.all_tokens()?, k: k.all_tokens()?, v: v.all_tokens()? };
            outputs.push(crate::step::attend(shape, &self.cpu, &[view])?);
        }
        Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())
    }
}

/// Mean cosine of keys `[N, H, D]`, over heads and tokens, or heads and windows.
fn similarity(a: &Tensor, b: &Tensor, over: Over) -> Result<f64> {
    let rows = |x: &Tensor| x.to_dtype(DType::F64)?.transpose(0, 1)?.to_vec3::<f64>();
    let (a, b) = (rows(a)?, rows(b)?);
    let window = if let Over::Windows(n) = over { n } else { 1 };
    let (mut sum, mut count) = (0.0, 0usize);
    for (a, b) in a.iter().zip(&b) {
        for (a, b) in a.chunks(window).zip(b.chunks(window)) {
            let dot = |a: &[Vec<f64>], b: &[Vec<f64>]| -> f64 {
                a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| a * b).sum()
            };
            let norms = (dot(a, a) * dot(b, b)).sqrt();
            // Keys of nothing are alike only if both are; rounding may exceed 1.
            sum += if norms > 0.0 { (dot(a, b) / norms).clamp(-1.0, 1.0) } else { 0.0 };
            count += 1;
        }
    }
    Ok(sum / count.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn windows_weigh_tokens_by_their_norms() {
        // One head, two tokens: the long one is alike, the short one turned by 90 degrees.
        let a = Tensor::new(&[[[10f32, 0.0]], [[1.0, 0.0]]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[[[10f32, 0.0]], [[0.0, 1.0]]], &Device::Cpu).unwrap();
        let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-12, "{x} {y}");
        near(similarity(&a, &b, Over::Tokens).unwrap(), 0.5);
        near(similarity(&a, &b, Over::Windows(2)).unwrap(), 100.0 / 101.0);
        near(similarity(&a, &b, Over::Windows(100)).unwrap(), 100.0 / 101.0);
    }
}
