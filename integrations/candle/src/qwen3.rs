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

/// One layer in steps, for those who do not run it as [`Qwen3::forward`] does: see [`diffusion`](crate::diffusion).
pub(crate) struct Layer {
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
    eps: f32,
}

impl Layer {
    /// Rows `[N, hidden]` of the residual stream, as attention's projections take them.
    pub(crate) fn normed(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.attention_norm, self.eps)
    }

    /// Queries `[N, Hq, D]` and keys `[N, H, D]` of normed rows, turned to their positions.
    pub(crate) fn queries_and_keys(&self, normed: &Tensor, at: &Turns) -> Result<(Tensor, Tensor)> {
        let turned = |projection: &Linear, norm: &Tensor| {
            let x = rms_norm(&self.heads(projection.forward(normed)?)?, norm, self.eps)?;
            rope(&x.unsqueeze(2)?, &at.0, &at.1)?.squeeze(2)
        };
        Ok((turned(&self.q_proj, &self.q_norm)?, turned(&self.k_proj, &self.k_norm)?))
    }

    /// Values `[N, H, D]` of normed rows.
    pub(crate) fn values(&self, normed: &Tensor) -> Result<Tensor> {
        self.heads(self.v_proj.forward(normed)?)
    }

    /// What attention adds to the residual stream, of heads `[N, Hq, D]` that have attended.
    pub(crate) fn attention(&self, attended: &Tensor) -> Result<Tensor> {
        self.o_proj.forward(&attended.flatten_from(1)?)
    }

    /// What the MLP adds to rows `[N, hidden]`.
    pub(crate) fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.mlp_norm, self.eps)?;
        self.down.forward(&(silu(&self.gate.forward(&normed)?)? * self.up.forward(&normed)?)?)
    }

    fn heads(&self, x: Tensor) -> Result<Tensor> {
        let (rows, dim) = (x.dim(0)?, self.q_norm.dim(0)?);
        x.reshape((rows, (), dim))
    }
}

/// Cosines and sines of rows' positions.
pub(crate) type Turns = (Tensor, Tensor);

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
                eps: config.rms_eps as f32,
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
        let turns = self.turns(ids.len(), spans)?;
        let mut x = self.embed(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hook.hidden(index, &x, spans)?;
            let normed = layer.normed(&x)?;
            let (q, k) = layer.queries_and_keys(&normed, &turns)?;
            let attended = hook.attend(index, &q, &k, &layer.values(&normed)?, spans)?;
            x = (x + layer.attention(&attended)?)?;
            x = (&x + layer.mlp(&x)?)?;
        }
        self.finish(&x)
    }

    /// The layers, in order.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Rows `[N, hidden]` that enter the first layer.
    pub(crate) fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embedding.embedding(&Tensor::new(ids, self.embedding.device())?)
    }

    /// What turns the queries and keys of the spans' `new` tokens.
    pub(crate) fn turns(&self, new: usize, spans: &[Span]) -> Result<Turns> {
        self.rope.at(new, spans)
    }

    /// Hidden states as [`logits`](Self::logits) takes them, of rows that leave the last layer.
    pub(crate) fn finish(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.output_norm, self.config.rms_eps as f32)
    }

    /// Logits `[N, vocabulary]` of hidden states `[N, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output.forward(hidden)
    }
}
