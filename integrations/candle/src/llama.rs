//! The llama forward pass over GGUF weights, with attention left to a hook.
//!
//! Weights are dequantised to f32 when they are loaded: candle has no SIMD kernel for Q4_1 on x86,
//! and for a model of this size the f32 products are several times faster.

use std::io::{Read, Seek};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::ops::rms_norm;
use candle_nn::rotary_emb::rope_i;
use kvbudget::{Dtype, Geometry, LayerShape, Pairs};

use crate::attention::{AttentionHook, Span};
use crate::elementwise::SwiGlu;
use crate::rope::Rope;

/// The shape of a model, read from GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub layers: usize,
    pub hidden: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context_length: usize,
    pub rope_base: f64,
    pub rms_eps: f32,
}

impl Config {
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let architecture = required(content, "general.architecture")?.to_string()?;
        if architecture != "llama" {
            bail!("architecture is {architecture:?}, only \"llama\" is supported");
        }
        let size = |key: &str| -> Result<usize> { Ok(required(content, key)?.to_u64()? as usize) };
        let size_or = |key: &str, default: usize| -> Result<usize> {
            match content.metadata.get(key) {
                Some(value) => Ok(value.to_u64()? as usize),
                None => Ok(default),
            }
        };

        let hidden = size("llama.embedding_length")?;
        let query_heads = size("llama.attention.head_count")?;
        let kv_heads = size_or("llama.attention.head_count_kv", query_heads)?;
        if kv_heads == 0 || query_heads == 0 || query_heads % kv_heads != 0 {
            bail!("{query_heads} query heads cannot share {kv_heads} KV heads");
        }
        let head_dim = size_or("llama.attention.key_length", hidden / query_heads)?;
        if head_dim == 0 || head_dim % 2 != 0 {
            bail!("head dimension {head_dim} is not a positive even number");
        }
        if size_or("llama.attention.value_length", head_dim)? != head_dim {
            bail!("keys and values of different length are not supported");
        }
        let rope_dim = size_or("llama.rope.dimension_count", head_dim)?;
        if rope_dim != head_dim {
            bail!("RoPE over {rope_dim} of {head_dim} dimensions is not supported");
        }
        // Ignoring a scaling would rotate every key by the wrong angle.
        let scaled = match content.metadata.get("llama.rope.scaling.type") {
            Some(kind) => kind.to_string()? != "none",
            None => content.tensor_infos.contains_key("rope_freqs.weight"),
        };
        if scaled {
            bail!("RoPE scaling is not supported");
        }

        Ok(Self {
            layers: size("llama.block_count")?,
            hidden,
            query_heads,
            kv_heads,
            head_dim,
            context_length: size("llama.context_length")?,
            rope_base: match content.metadata.get("llama.rope.freq_base") {
                Some(value) => f64::from(value.to_f32()?),
                None => 10_000.0,
            },
            rms_eps: required(content, "llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
        })
    }
}

fn required<'a>(content: &'a Content, key: &str) -> Result<&'a Value> {
    match content.metadata.get(key) {
        Some(value) => Ok(value),
        None => bail!("GGUF metadata has no {key:?}"),
    }
}

struct Layer {
    attention_norm: Tensor,
    /// Query, key and value projections, one below the other.
    qkv: Tensor,
    o_proj: Tensor,
    mlp_norm: Tensor,
    /// Gate and up projections, one below the other.
    gate_up: Tensor,
    down: Tensor,
}

/// A llama in f32 on the CPU.
pub struct Llama {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Tensor,
    rope: Rope,
}

impl Llama {
    /// Loads the model that `content` describes; `reader` is the file it was read from.
    pub fn load<R: Read + Seek>(content: &Content, reader: &mut R) -> Result<Self> {
        let config = Config::from_gguf(content)?;
        let mut weight = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let tensor = content.tensor(reader, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            if tensor.dims() != shape {
                bail!("{name} is {:?}, expected {shape:?}", tensor.dims());
            }
            Ok(tensor)
        };

        let hidden = config.hidden;
        let q_rows = config.query_heads * config.head_dim;
        let kv_rows = config.kv_heads * config.head_dim;
        let Some(embedding_info) = content.tensor_infos.get("token_embd.weight") else {
            bail!("GGUF has no token_embd.weight");
        };
        let vocabulary = embedding_info.shape.dims().first().copied().unwrap_or(0);
        let embedding = weight("token_embd.weight", &[vocabulary, hidden])?;
        // Small models share the embedding with the output, and then have no tensor of their own.
        let output = if content.tensor_infos.contains_key("output.weight") {
            weight("output.weight", &[vocabulary, hidden])?
        } else {
            embedding.clone()
        };

        let mut layers = Vec::new();
        for index in 0..config.layers {
            let name = |part: &str| format!("blk.{index}.{part}.weight");
            let Some(gate_info) = content.tensor_infos.get(&name("ffn_gate")) else {
                bail!("GGUF has no {}", name("ffn_gate"));
            };
            let mlp = gate_info.shape.dims().first().copied().unwrap_or(0);
            layers.push(Layer {
                attention_norm: weight(&name("attn_norm"), &[hidden])?,
                qkv: Tensor::cat(
                    &[
                        weight(&name("attn_q"), &[q_rows, hidden])?,
                        weight(&name("attn_k"), &[kv_rows, hidden])?,
                        weight(&name("attn_v"), &[kv_rows, hidden])?,
                    ],
                    0,
                )?,
                o_proj: weight(&name("attn_output"), &[hidden, q_rows])?,
                mlp_norm: weight(&name("ffn_norm"), &[hidden])?,
                gate_up: Tensor::cat(
                    &[
                        weight(&name("ffn_gate"), &[mlp, hidden])?,
                        weight(&name("ffn_up"), &[mlp, hidden])?,
                    ],
                    0,
                )?,
                down: weight(&name("ffn_down"), &[hidden, mlp])?,
            });
        }
        let output_norm = weight("output_norm.weight", &[hidden])?;
        let rope = Rope::new(
            config.head_dim,
            config.rope_base,
            config.context_length,
            (DType::F32, &Device::Cpu),
        )?;
        Ok(Self { config, embedding, layers, output_norm, output, rope })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The output projection `[hidden, Hq * D]` of a layer, if there is such a layer.
    pub fn output_projection(&self, layer: usize) -> Option<&Tensor> {
        self.layers.get(layer).map(|layer| &layer.o_proj)
    }

    /// Heads, head dim and layers, as the cache counts them.
    pub fn geometry(&self) -> Result<Geometry> {
        let Config { layers, query_heads, kv_heads, head_dim, .. } = self.config;
        let shape = LayerShape::new(query_heads as u32, kv_heads as u32, head_dim as u32);
        let geometry = shape.and_then(|shape| Geometry::uniform(layers, shape, Dtype::F32));
        geometry.map_err(Error::wrap)
    }

    /// The output projections `[hidden, Hq * D]` of all layers.
    pub fn output_projections(&self) -> Vec<Tensor> {
        self.layers.iter().map(|layer| layer.o_proj.clone()).collect()
    }

    /// How queries and keys are turned: GGUF files hold their rows in the order of neighbours.
    pub fn rope(&self) -> Result<kvbudget::Rope> {
        let Config { head_dim, rope_base, .. } = self.config;
        kvbudget::Rope::with_base(rope_base, head_dim as u32, Pairs::Neighbours)
            .map_err(Error::wrap)
    }

    /// Runs the tokens `ids` of all sequences, back to back as `spans` say, and returns their last hidden
    /// states `[N, hidden]`, normalised and ready for [`Llama::logits`].
    ///
    /// The hook holds all state between calls; the model has none.
    pub fn forward(
        &self,
        ids: &[u32],
        spans: &[Span],
        hook: &mut dyn AttentionHook,
    ) -> Result<Tensor> {
        let Config { query_heads, kv_heads, head_dim, rms_eps, .. } = self.config;
        let new = ids.len();
        let (cos, sin) = self.rope.at(new, spans)?;

        let mut x = self.embed(ids)?;
        for (index, layer) in self.layers.iter().enumerate() {
            hook.hidden(index, &x, spans)?;
            let normed = rms_norm(&x, &layer.attention_norm, rms_eps)?;
            let heads = query_heads + 2 * kv_heads;
            let qkv = linear(&normed, &layer.qkv)?.reshape((new, heads, head_dim))?;
            // Each token is a batch entry of its own: positions need not be consecutive.
            let qk = qkv.narrow(1, 0, query_heads + kv_heads)?.contiguous()?.unsqueeze(2)?;
            let qk = rope_i(&qk, &cos, &sin)?.squeeze(2)?;
            let q = qk.narrow(1, 0, query_heads)?;
            let k = qk.narrow(1, query_heads, kv_heads)?;
            let v = qkv.narrow(1, query_heads + kv_heads, kv_heads)?;
            let attended = hook.attend(index, &q, &k, &v, spans)?;
            if attended.dims() != q.dims() {
                bail!("hook returned {:?} for queries {:?}", attended.dims(), q.dims());
            }
            let concat = attended.reshape((new, query_heads * head_dim))?;
            x = (x + linear(&concat, &layer.o_proj)?)?;

            let normed = rms_norm(&x, &layer.mlp_norm, rms_eps)?;
            let gated = linear(&normed, &layer.gate_up)?.apply_op1_no_bwd(&SwiGlu)?;
            x = (x + linear(&gated, &layer.down)?)?;
        }
        rms_norm(&x, &self.output_norm, rms_eps)
    }

    /// Input embeddings `[N, hidden]` of tokens.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embedding.embedding(&Tensor::new(ids, &Device::Cpu)?)
    }

    /// Logits `[N, vocabulary]` of hidden states `[N, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.output)
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}
