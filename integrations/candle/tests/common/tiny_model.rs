//! A tiny llama with random weights, as a GGUF file in memory: the loader is tested with it.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::Cursor;

use candle_core::quantized::gguf_file::{Content, Value, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use kvbudget_candle::Llama;

pub const LAYERS: usize = 3;
pub const HIDDEN: usize = 24;
pub const QUERY_HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
/// `QUERY_HEADS * HEAD_DIM` differs from `HIDDEN`, so that a transposed projection cannot pass.
pub const HEAD_DIM: usize = 8;
pub const MLP: usize = 40;
pub const VOCABULARY: usize = 50;
pub const CONTEXT_LENGTH: usize = 64;
pub const ROPE_BASE: f32 = 1e5;
pub const RMS_EPS: f32 = 1e-5;

/// The weights of a tiny llama and the GGUF file they make.
pub struct Tiny {
    pub weights: Vec<(String, Tensor)>,
    pub metadata: Vec<(String, Value)>,
}

impl Tiny {
    /// Random weights, large enough that attention is far from uniform.
    pub fn new() -> Result<Self> {
        let mut random = Random(7);
        let mut weights = Vec::new();
        let mut add = |name: String, shape: &[usize], mean: f32, deviation: f32| -> Result<()> {
            let count = shape.iter().product();
            let values: Vec<f32> =
                (0..count).map(|_| mean + deviation * random.uniform()).collect();
            weights.push((name, Tensor::from_vec(values, shape, &Device::Cpu)?));
            Ok(())
        };
        add("token_embd.weight".into(), &[VOCABULARY, HIDDEN], 0.0, 1.0)?;
        add("output_norm.weight".into(), &[HIDDEN], 1.0, 0.3)?;
        for layer in 0..LAYERS {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            add(name("attn_norm"), &[HIDDEN], 1.0, 0.3)?;
            add(name("attn_q"), &[QUERY_HEADS * HEAD_DIM, HIDDEN], 0.0, 0.6)?;
            add(name("attn_k"), &[KV_HEADS * HEAD_DIM, HIDDEN], 0.0, 0.6)?;
            add(name("attn_v"), &[KV_HEADS * HEAD_DIM, HIDDEN], 0.0, 0.6)?;
            add(name("attn_output"), &[HIDDEN, QUERY_HEADS * HEAD_DIM], 0.0, 0.3)?;
            add(name("ffn_norm"), &[HIDDEN], 1.0, 0.3)?;
            add(name("ffn_gate"), &[MLP, HIDDEN], 0.0, 0.4)?;
            add(name("ffn_up"), &[MLP, HIDDEN], 0.0, 0.4)?;
            add(name("ffn_down"), &[HIDDEN, MLP], 0.0, 0.3)?;
        }
        let size = |value: usize| Value::U32(value as u32);
        let metadata = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", size(LAYERS)),
            ("llama.embedding_length", size(HIDDEN)),
            ("llama.attention.head_count", size(QUERY_HEADS)),
            ("llama.attention.head_count_kv", size(KV_HEADS)),
            ("llama.attention.key_length", size(HEAD_DIM)),
            ("llama.context_length", size(CONTEXT_LENGTH)),
            ("llama.rope.freq_base", Value::F32(ROPE_BASE)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(RMS_EPS)),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_string(), value));
        Ok(Self { weights, metadata: metadata.to_vec() })
    }

    pub fn load(&self) -> Result<Llama> {
        let tensors: Vec<(&str, QTensor)> = self
            .weights
            .iter()
            .map(|(name, tensor)| Ok((name.as_str(), QTensor::quantize(tensor, GgmlDType::F32)?)))
            .collect::<Result<_>>()?;
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = Cursor::new(Vec::new());
        write(&mut file, &metadata, &tensors)?;
        file.set_position(0);
        let content = Content::read(&mut file)?;
        Llama::load(&content, &mut file)
    }

    pub fn weight(&self, name: &str) -> &Tensor {
        let found = self.weights.iter().find(|(other, _)| other == name);
        &found.expect("the tiny model has this weight").1
    }
}

/// Tokens that are neither sorted nor repeating soon.
pub fn tiny_ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * i * 7 + i * 3 + 5) as u32 % VOCABULARY as u32).collect()
}

/// A linear congruential generator: the tests need the same weights everywhere, not good ones.
struct Random(u64);

impl Random {
    /// In `[-1, 1)`.
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
