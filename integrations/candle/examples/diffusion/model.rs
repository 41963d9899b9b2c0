//! A small Qwen3 with random weights, and prompts for it. Nothing is trained, so nothing here has a meaning.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use kvbudget_candle::qwen3::{Config, Qwen3};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The last token stands for one to be decoded.
pub const MASK: u32 = 127;
const CONFIG: Config = Config {
    layers: 4,
    hidden: 64,
    mlp: 128,
    vocabulary: MASK as usize + 1,
    query_heads: 4,
    kv_heads: 2,
    head_dim: 16,
    context_length: 1024,
    rope_base: 1e4,
    rms_eps: 1e-6,
    tied: false,
};
/// Deviation of the attention's logits. At 1, as plain random weights have it, queries look nearly everywhere: the best sixth of
/// a prompt has 40 % of what a mask pays to all of it. At 3 it has 87 %, and it matters what is evicted.
const SHARPNESS: f64 = 3.0;

/// A model of `layers` layers.
pub fn model(seed: u64, layers: usize) -> Result<Qwen3> {
    let config = Config { layers, ..CONFIG };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = HashMap::new();
    let mut add = |name: String, shape: &[usize], mean: f64, deviation: f64| -> Result<()> {
        // Uniform numbers of this deviation.
        let reach = deviation * 3f64.sqrt();
        let mut next = || (mean + reach * random.random_range(-1.0..=1.0)) as f32;
        let values = (0..shape.iter().product()).map(|_| next()).collect();
        weights.insert(format!("{name}.weight"), Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    };
    let Config { hidden, mlp, vocabulary, query_heads, kv_heads, head_dim, .. } = config;
    let unit = |inputs: usize| (inputs as f64).powf(-0.5);
    add("model.embed_tokens".into(), &[vocabulary, hidden], 0.0, 1.0)?;
    add("lm_head".into(), &[vocabulary, hidden], 0.0, unit(hidden))?;
    add("model.norm".into(), &[hidden], 1.0, 0.1)?;
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let heads = |n: usize| [n * head_dim, hidden];
        add(name("input_layernorm"), &[hidden], 1.0, 0.1)?;
        add(name("self_attn.q_proj"), &heads(query_heads), 0.0, unit(hidden))?;
        add(name("self_attn.k_proj"), &heads(kv_heads), 0.0, unit(hidden))?;
        add(name("self_attn.v_proj"), &heads(kv_heads), 0.0, unit(hidden))?;
        let output = query_heads * head_dim;
        add(name("self_attn.o_proj"), &[hidden, output], 0.0, unit(output))?;
        // Queries and keys are normalised, so their logits deviate by the product of these.
        for norm in ["self_attn.q_norm", "self_attn.k_norm"] {
            add(name(norm), &[head_dim], SHARPNESS.sqrt(), 0.1)?;
        }
        add(name("post_attention_layernorm"), &[hidden], 1.0, 0.1)?;
        add(name("mlp.gate_proj"), &[mlp, hidden], 0.0, unit(hidden))?;
        add(name("mlp.up_proj"), &[mlp, hidden], 0.0, unit(hidden))?;
        add(name("mlp.down_proj"), &[hidden, mlp], 0.0, unit(mlp))?;
    }
    Qwen3::load(config, VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))
}

/// Random tokens, none of them the mask.
pub fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..tokens).map(|_| random.random_range(0..MASK)).collect()
}
