//! The attention hook and its reference: dense causal attention over a KV cache.
//!
//! Everything else of the model stays the same whatever the hook does, so two hooks can be
//! compared on equal terms.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::softmax_last_dim;

/// What a model calls in place of attention, once per layer and per forward pass.
pub trait AttentionHook {
    /// Attends `q` `[1, Hq, S, D]` to all tokens so far, the new `k` and `v` `[1, H, S, D]`
    /// included, and returns `[1, Hq, S, D]`.
    ///
    /// `q` and `k` come after RoPE. `position` is the position of the first of the `S` tokens;
    /// query head `h * (Hq / H) + g` belongs to KV head `h`.
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        position: usize,
    ) -> Result<Tensor>;
}

/// Slots by which a layer's cache grows.
const CACHE_STEP: usize = 256;

/// Exact attention that keeps every token.
pub struct DenseAttention {
    caches: Vec<KvCache>,
}

impl DenseAttention {
    pub fn new(layers: usize) -> Self {
        // The cache holds [H, S, D], so tokens are dimension 1.
        let caches = (0..layers).map(|_| KvCache::new(1, CACHE_STEP)).collect();
        Self { caches }
    }
}

impl AttentionHook for DenseAttention {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        position: usize,
    ) -> Result<Tensor> {
        let (batch, query_heads, new, head_dim) = q.dims4()?;
        let kv_heads = k.dim(1)?;
        if batch != 1 || kv_heads == 0 || query_heads % kv_heads != 0 {
            bail!("dense attention: q {:?} does not fit k {:?}", q.dims(), k.dims());
        }
        let layers = self.caches.len();
        let Some(cache) = self.caches.get_mut(layer) else {
            bail!("dense attention: layer {layer} of {layers}");
        };
        // Dense means that a token's slot is its position; anything else is a caller's mistake.
        if cache.current_seq_len() != position {
            bail!(
                "dense attention: layer {layer} holds {} tokens, but the next position is {position}",
                cache.current_seq_len()
            );
        }
        let (k, v) = cache.append(&k.squeeze(0)?.contiguous()?, &v.squeeze(0)?.contiguous()?)?;
        let total = position + new;

        // The G query heads of a KV head share its keys, so they go into one product.
        let group = query_heads / kv_heads;
        let q = q.contiguous()?.reshape((kv_heads, group * new, head_dim))?;
        let scores = (q.matmul(&k.transpose(1, 2)?)? * (head_dim as f64).powf(-0.5))?;
        let scores = scores.reshape((query_heads, new, total))?.broadcast_add(&causal_mask(
            position,
            new,
            q.device(),
        )?)?;
        let weights = softmax_last_dim(&scores)?.reshape((kv_heads, group * new, total))?;
        weights.matmul(&v)?.reshape((1, query_heads, new, head_dim))
    }
}

/// `[new, position + new]`: zero where a query may look, minus infinity at later tokens.
fn causal_mask(position: usize, new: usize, device: &Device) -> Result<Tensor> {
    let total = position + new;
    let mask: Vec<f32> = (0..new)
        .flat_map(|query| {
            (0..total).map(move |key| if key <= position + query { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Tensor::from_vec(mask, (new, total), device)
}
