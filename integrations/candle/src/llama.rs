//! The llama forward pass over GGUF weights, with attention left to a hook.
//!
//! Weights are dequantised to f32 when they are loaded: candle has no SIMD kernel for Q4_1 on x86,
//! and for a model of this size the f32 products are several times faster.

use std::io::{Read, Seek};

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Result, Tensor, bail};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_i;

use crate::attention::AttentionHook;

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
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    mlp_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// A llama in f32 on the CPU.
pub struct Llama {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    output_norm: Tensor,
    output: Tensor,
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
                q_proj: weight(&name("attn_q"), &[q_rows, hidden])?,
                k_proj: weight(&name("attn_k"), &[kv_rows, hidden])?,
                v_proj: weight(&name("attn_v"), &[kv_rows, hidden])?,
                o_proj: weight(&name("attn_output"), &[hidden, q_rows])?,
                mlp_norm: weight(&name("ffn_norm"), &[hidden])?,
                gate: weight(&name("ffn_gate"), &[mlp, hidden])?,
                up: weight(&name("ffn_up"), &[mlp, hidden])?,
                down: weight(&name("ffn_down"), &[hidden, mlp])?,
            });
        }
        let output_norm = weight("output_norm.weight", &[hidden])?;
        Ok(Self { config, embedding, layers, output_norm, output })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The output projection `[hidden, Hq * D]` of a layer, if there is such a layer.
    pub fn output_projection(&self, layer: usize) -> Option<&Tensor> {
        self.layers.get(layer).map(|layer| &layer.o_proj)
    }

    /// Runs the tokens `ids`, the first of them at `position`, and returns their last hidden
    /// states `[S, hidden]`, normalised and ready for [`Llama::logits`].
    ///
    /// The hook holds all state between calls; the model has none.
    pub fn forward(
        &self,
        ids: &[u32],
        position: usize,
        hook: &mut dyn AttentionHook,
    ) -> Result<Tensor> {
        let Config { query_heads, kv_heads, head_dim, context_length, rms_eps, .. } = self.config;
        let new = ids.len();
        if new == 0 {
            bail!("no tokens to run");
        }
        if position + new > context_length {
            bail!("{} tokens exceed the model's context of {context_length}", position + new);
        }
        let heads = |x: Tensor, heads: usize| {
            x.reshape((1, new, heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let (cos, sin) = self.rope_tables(position, new)?;

        let mut x = self.embedding.embedding(&Tensor::new(ids, &Device::Cpu)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, rms_eps)?;
            let q = heads(linear(&normed, &layer.q_proj)?, query_heads)?;
            let k = heads(linear(&normed, &layer.k_proj)?, kv_heads)?;
            let v = heads(linear(&normed, &layer.v_proj)?, kv_heads)?;
            let q = rope_i(&q, &cos, &sin)?;
            let k = rope_i(&k, &cos, &sin)?;
            let attended = hook.attend(index, &q, &k, &v, position)?;
            if attended.dims() != q.dims() {
                bail!("hook returned {:?} for queries {:?}", attended.dims(), q.dims());
            }
            let concat = attended.transpose(1, 2)?.reshape((new, query_heads * head_dim))?;
            x = (x + linear(&concat, &layer.o_proj)?)?;

            let normed = rms_norm(&x, &layer.mlp_norm, rms_eps)?;
            let gated = (silu(&linear(&normed, &layer.gate)?)? * linear(&normed, &layer.up)?)?;
            x = (x + linear(&gated, &layer.down)?)?;
        }
        rms_norm(&x, &self.output_norm, rms_eps)
    }

    /// Logits `[S, vocabulary]` of hidden states `[S, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.output)
    }

    /// Cosines and sines `[S, D / 2]`, computed in f64 since f32 angles are off at far positions.
    fn rope_tables(&self, position: usize, new: usize) -> Result<(Tensor, Tensor)> {
        let half = self.config.head_dim / 2;
        let angles: Vec<f64> = (position..position + new)
            .flat_map(|position| {
                (0..half).map(move |pair| {
                    let exponent = pair as f64 / half as f64;
                    position as f64 * self.config.rope_base.powf(-exponent)
                })
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_vec(values, (new, half), &Device::Cpu)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}
