//! Qwen3 with the same hook: the seam is not shaped by one model.
//!
//! What differs from llama lies on this side of the hook: queries and keys are normalised per head, RoPE turns
//! the halves of a head against each other, and the weights come from a [`VarBuilder`] in their own dtype.

use candle_core::{Error, Result, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope;
use candle_nn::{Linear, Module, VarBuilder, linear_no_bias};
use kvbudget::{Geometry, LayerShape, Pairs};

use crate::attention::{AttentionHook, Span};
use crate::host;
use crate::rope::Rope;

/// The shape of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub layers: usize,
    pub hidden: usize,
    pub mlp: usize,
    pub vocabulary: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context_length: usize,
    pub rope_base: f64,
    pub rms_eps: f64,
    /// Whether the output shares the embedding.
    pub tied: bool,
}

struct Layer {
    attention_norm: Tensor,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    q_norm: Tensor,
    k_norm: Tensor,
    o_proj: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// A Qwen3 on the CPU.
pub struct Qwen3 {
    config: Config,
    geometry: Geometry,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Linear,
    rope: Rope,
}

impl Qwen3 {
    /// Takes the weights by the names that the published checkpoints have.
    pub fn load(config: Config, vb: VarBuilder) -> Result<Self> {
        let Config { hidden, head_dim, query_heads, kv_heads, .. } = config;
        let shape = LayerShape::new(query_heads as u32, kv_heads as u32, head_dim as u32);
        let dtype = host::dtype(vb.dtype())?;
        let geometry = shape.and_then(|shape| Geometry::uniform(config.layers, shape, dtype));
        let geometry = geometry.map_err(Error::wrap)?;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let vb = vb.pp(format!("model.layers.{index}"));
            let (attention, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
            let projection = |heads: usize, name: &str| {
                linear_no_bias(hidden, heads * head_dim, attention.pp(name))
            };
            layers.push(Layer {
                attention_norm: vb.get(hidden, "input_layernorm.weight")?,
                q_proj: projection(query_heads, "q_proj")?,
                k_proj: projection(kv_heads, "k_proj")?,
                v_proj: projection(kv_heads, "v_proj")?,
                q_norm: attention.get(head_dim, "q_norm.weight")?,
                k_norm: attention.get(head_dim, "k_norm.weight")?,
                o_proj: linear_no_bias(query_heads * head_dim, hidden, attention.pp("o_proj"))?,
                mlp_norm: vb.get(hidden, "post_attention_layernorm.weight")?,
                gate: linear_no_bias(hidden, config.mlp, mlp.pp("gate_proj"))?,
                up: linear_no_bias(hidden, config.mlp, mlp.pp("up_proj"))?,
                down: linear_no_bias(config.mlp, hidden, mlp.pp("down_proj"))?,
            });
        }
        let embedding = vb.get((config.vocabulary, hidden), "model.embed_tokens.weight")?;
        let output = match config.tied {
            true => Linear::new(embedding.clone(), None),
            false => linear_no_bias(hidden, config.vocabulary, vb.pp("lm_head"))?,
        };
        let output_norm = vb.get(hidden, "model.norm.weight")?;
        let rope = Rope::new(
            head_dim,
            config.rope_base,
            config.context_length,
            (vb.dtype(), vb.device()),
        )?;
        Ok(Self { config, geometry, embedding, layers, output_norm, output, rope })
    }

    /// Heads, head dim and layers, as the cache counts them.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The output projections `[hidden, Hq * D]` of all layers.
    pub fn output_projections(&self) -> Vec<Tensor> {
        self.layers.iter().map(|layer| layer.o_proj.weight().clone()).collect()
    }

    /// How queries and keys are turned.
    pub fn rope(&self) -> Result<kvbudget::Rope> {
        let Config { head_dim, rope_base, .. } = self.config;
        kvbudget::Rope::with_base(rope_base, head_dim as u32, Pairs::Halves).map_err(Error::wrap)
    }

    /// Hidden states `[N, hidden]` of the tokens of all sequences: see [`Llama::forward`](crate::Llama::forward).
    pub fn forward(
        &self,
        ids: &[u32],
        spans: &[Span],
        hook: &mut dyn AttentionHook,
    ) -> Result<Tensor> {
        let Config { query_heads, kv_heads, head_dim, .. } = self.config;
        let eps = self.config.rms_eps as f32;
        let new = ids.len();
        let (cos, sin) = self.rope.at(new, spans)?;
        let heads = |x: Tensor, heads: usize| x.reshape((new, heads, head_dim));
        let turn = |x: Tensor, norm: &Tensor| {
            let x = rms_norm(&x, norm, eps)?.unsqueeze(2)?;
            rope(&x, &cos, &sin)?.squeeze(2)
        };
        let ids = Tensor::new(ids, self.embedding.device())?;
        let mut x = self.embedding.embedding(&ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hook.hidden(index, &x, spans)?;
            let normed = rms_norm(&x, &layer.attention_norm, eps)?;
            let q = turn(heads(layer.q_proj.forward(&normed)?, query_heads)?, &layer.q_norm)?;
            let k = turn(heads(layer.k_proj.forward(&normed)?, kv_heads)?, &layer.k_norm)?;
            let v = heads(layer.v_proj.forward(&normed)?, kv_heads)?;
            let attended = hook.attend(index, &q, &k, &v, spans)?;
            let attended = attended.reshape((new, query_heads * head_dim))?;
            x = (x + layer.o_proj.forward(&attended)?)?;

            let normed = rms_norm(&x, &layer.mlp_norm, eps)?;
            let gated = (silu(&layer.gate.forward(&normed)?)? * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        rms_norm(&x, &self.output_norm, eps)
    }

    /// Logits `[N, vocabulary]` of hidden states `[N, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output.forward(hidden)
    }
}
