//! The attention hook and its reference: dense causal attention that keeps every token.
//!
//! Tokens of all sequences lie back to back, without padding or a batch dimension, as variable-length
//! attention has it; [`Span`]s say which are whose. Everything else of the model stays the same whatever the
//! hook does, so two hooks can be compared on equal terms.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::softmax_last_dim;

/// New tokens of one sequence: `tokens` rows, the first at logical position `position`.
///
/// A sequence that sits out a forward pass has a span of no tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub position: u32,
    pub tokens: u32,
}

impl Span {
    pub fn new(position: u32, tokens: u32) -> Self {
        Self { position, tokens }
    }
}

/// What a model calls in place of attention, once per layer and per forward pass.
pub trait AttentionHook {
    /// Attends `q` `[N, Hq, D]` to all tokens of the same sequence so far, the new `k` and `v` `[N, H, D]`
    /// included, and returns `[N, Hq, D]`. `N` is the sum of the spans' tokens; span `i` is sequence `i`.
    ///
    /// `q` and `k` come after RoPE; query head `h * (Hq / H) + g` belongs to KV head `h`.
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor>;

    /// Hears, before it attends, of the rows `[N, hidden]` that enter a layer's attention: the residual stream, before the norm.
    fn hidden(&mut self, _layer: usize, _rows: &Tensor, _spans: &[Span]) -> Result<()> {
        Ok(())
    }

    /// Forgets what followed the first `tokens` tokens of a sequence: a probe, a question that is asked once.
    fn rollback(&mut self, _sequence: usize, _tokens: u32) -> Result<()> {
        bail!("this hook cannot forget its last tokens");
    }
}

/// Slots by which a layer's cache grows.
const CACHE_STEP: usize = 256;
/// Queries that attend at once: bounds the score matrix, and skips most of what the future hides.
const QUERIES: usize = 256;

/// Exact attention that keeps every token.
pub struct DenseAttention {
    layers: usize,
    /// By sequence, then layer.
    caches: Vec<Vec<KvCache>>,
}

impl DenseAttention {
    pub fn new(layers: usize) -> Self {
        Self { layers, caches: Vec::new() }
    }
}

impl AttentionHook for DenseAttention {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let layers = self.layers;
        if layer >= layers {
            bail!("dense attention: layer {layer} of {layers}");
        }
        while self.caches.len() < spans.len() {
            // A cache holds [H, T, D], so tokens are dimension 1.
            self.caches.push((0..layers).map(|_| KvCache::new(1, CACHE_STEP)).collect());
        }
        let mut outputs = Vec::with_capacity(spans.len());
        let mut first = 0;
        for (sequence, (span, caches)) in spans.iter().zip(&mut self.caches).enumerate() {
            let (cache, tokens) = (&mut caches[layer], span.tokens as usize);
            if tokens == 0 {
                continue;
            }
            // Dense means that a token's slot is its position; anything else is a caller's mistake.
            if cache.current_seq_len() != span.position as usize {
                bail!(
                    "dense attention: layer {layer} of sequence {sequence} holds {} tokens, \
                     but the next position is {}",
                    cache.current_seq_len(),
                    span.position
                );
            }
            let part = |x: &Tensor| x.narrow(0, first, tokens)?.transpose(0, 1)?.contiguous();
            let (k, v) = cache.append(&part(k)?, &part(v)?)?;
            outputs.push(causal_attention(&part(q)?, &k, &v)?.transpose(0, 1)?);
            first += tokens;
        }
        Tensor::cat(&outputs, 0)
    }

    fn rollback(&mut self, sequence: usize, tokens: u32) -> Result<()> {
        for cache in self.caches.get_mut(sequence).into_iter().flatten() {
            let (Some(k), Some(v)) = (cache.k()?, cache.v()?) else { continue };
            let kept = |x: &Tensor| x.narrow(1, 0, tokens as usize)?.contiguous();
            let (k, v) = (kept(&k)?, kept(&v)?);
            *cache = KvCache::new(1, CACHE_STEP);
            cache.append(&k, &v)?;
        }
        Ok(())
    }
}

/// `q` `[Hq, M, D]` of the last `M` of the tokens whose `k` and `v` are `[H, T, D]`.
fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (query_heads, new, dim) = q.dims3()?;
    let (kv_heads, total, _) = k.dims3()?;
    if kv_heads == 0 || query_heads % kv_heads != 0 || new > total {
        bail!("dense attention: q {:?} does not fit k {:?}", q.dims(), k.dims());
    }
    let group = query_heads / kv_heads;
    let q = (q * (dim as f64).powf(-0.5))?;
    let mut outputs = Vec::new();
    for start in (0..new).step_by(QUERIES) {
        let count = QUERIES.min(new - start);
        let seen = total - new + start + count;
        // The G query heads of a KV head share its keys, so they go into one product.
        let q = q.narrow(1, start, count)?.reshape((kv_heads, group * count, dim))?;
        let k = k.narrow(1, 0, seen)?;
        let scores = q.matmul(&k.transpose(1, 2)?)?.reshape((query_heads, count, seen))?;
        let scores = scores.broadcast_add(&causal_mask(count, seen, q.device(), q.dtype())?)?;
        let weights = softmax_last_dim(&scores)?.reshape((kv_heads, group * count, seen))?;
        let output = weights.matmul(&v.narrow(1, 0, seen)?)?;
        outputs.push(output.reshape((query_heads, count, dim))?);
    }
    Tensor::cat(&outputs, 1)
}

/// `[new, total]` for the last `new` of `total` tokens: zero where a query may look, minus infinity at later tokens.
fn causal_mask(new: usize, total: usize, device: &Device, dtype: DType) -> Result<Tensor> {
    let mask: Vec<f32> = (total - new..total)
        .flat_map(|query| {
            (0..total).map(move |key| if key <= query { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Tensor::from_vec(mask, (new, total), device)?.to_dtype(dtype)
}
