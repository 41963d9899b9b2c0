//! The forward pass against plain loops in f64, and token by token against all at once.

#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Result};
use kvbudget_candle::{DenseAttention, Llama, Span};
use tiny_model::{
    HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, QUERY_HEADS, RMS_EPS, ROPE_BASE, Tiny, VOCABULARY, tiny_ids,
};

/// f32 sums in another order: the largest difference seen is below 1e-5 of the largest logit.
const TOLERANCE: f64 = 1e-4;

type Matrix = Vec<Vec<f64>>;

fn logits(model: &Llama, ids: &[u32], chunk: usize) -> Result<Matrix> {
    let mut hook = DenseAttention::new(LAYERS);
    let mut rows = Vec::new();
    for (index, part) in ids.chunks(chunk).enumerate() {
        let span = Span::new((index * chunk) as u32, part.len() as u32);
        let hidden = model.forward(part, &[span], &mut hook)?;
        rows.extend(model.logits(&hidden)?.to_dtype(DType::F64)?.to_vec2::<f64>()?);
    }
    Ok(rows)
}

fn relative_difference(a: &Matrix, b: &Matrix) -> f64 {
    let largest = a.iter().flatten().fold(0.0f64, |m, x| m.max(x.abs()));
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.fold(0.0f64, |m, (x, y)| m.max((x - y).abs())) / largest
}

#[test]
fn forward_equals_plain_loops() -> Result<()> {
    let ids = tiny_ids(17);
    let tied = Tiny::new()?;
    let mut untied = Tiny::new()?;
    let output = (tied.weight("token_embd.weight") * 0.5)?.roll(3, 1)?;
    untied.weights.push(("output.weight".into(), output));
    for tiny in [tied, untied] {
        let expected = plain_logits(&tiny, &ids)?;
        let difference = relative_difference(&expected, &logits(&tiny.load()?, &ids, 17)?);
        assert!(difference < TOLERANCE, "{difference}");
    }
    Ok(())
}

#[test]
fn decode_equals_prefill() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let ids = tiny_ids(40);
    let prefill = logits(&model, &ids, 40)?;
    for chunk in [1, 7] {
        let difference = relative_difference(&prefill, &logits(&model, &ids, chunk)?);
        assert!(difference < TOLERANCE, "chunks of {chunk}: {difference}");
    }
    Ok(())
}

#[test]
fn wrong_position_is_refused() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let mut hook = DenseAttention::new(LAYERS);
    model.forward(&[1, 2, 3], &[Span::new(0, 3)], &mut hook)?;
    for (position, good) in [(2, false), (4, false), (3, true)] {
        let run = model.forward(&[4], &[Span::new(position, 1)], &mut hook);
        assert_eq!(run.is_ok(), good, "{position}");
    }
    Ok(())
}

#[test]
fn bad_tokens_are_refused() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let run = |ids: &[u32]| {
        let span = Span::new(0, ids.len() as u32);
        model.forward(ids, &[span], &mut DenseAttention::new(LAYERS))
    };
    assert!(run(&[]).is_err());
    assert!(run(&[VOCABULARY as u32]).is_err());
    assert!(run(&[0; 65]).is_err());
    Ok(())
}

#[test]
fn unsupported_models_are_refused() -> Result<()> {
    for (key, value) in [
        ("general.architecture", Value::String("qwen2".into())),
        ("llama.rope.scaling.type", Value::String("yarn".into())),
        ("llama.rope.dimension_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(3)),
        ("llama.attention.head_count_kv", Value::U32(0)),
        ("llama.attention.head_count", Value::U32(0)),
        ("llama.attention.key_length", Value::U32(7)),
        ("llama.attention.value_length", Value::U32(4)),
        ("llama.embedding_length", Value::U32(25)),
        ("llama.block_count", Value::U32(4)),
    ] {
        let mut tiny = Tiny::new()?;
        tiny.metadata.retain(|(other, _)| other != key);
        tiny.metadata.push((key.into(), value));
        assert!(tiny.load().is_err(), "{key}");
    }
    Ok(())
}

#[test]
fn load_errors_say_what_is_wrong() -> Result<()> {
    let refused = |tiny: &Tiny, words: &[&str]| {
        let error = tiny.load().err().expect("the model is bad").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut tiny = Tiny::new()?;
        tiny.metadata.retain(|(other, _)| other != key);
        refused(&tiny, &["GGUF metadata has no", key]);
    }
    let mut tiny = Tiny::new()?;
    tiny.metadata[0].1 = Value::String("qwen2".into());
    refused(&tiny, &["architecture is \"qwen2\"", "only \"llama\""]);
    let mut tiny = Tiny::new()?;
    tiny.weights.retain(|(name, _)| name != "blk.1.attn_k.weight");
    refused(&tiny, &["blk.1.attn_k.weight"]);
    Ok(())
}

/// A llama as its papers define it, one token at a time and one number at a time.
fn plain_logits(tiny: &Tiny, ids: &[u32]) -> Result<Matrix> {
    let matrix =
        |name: &str| -> Result<Matrix> { tiny.weight(name).to_dtype(DType::F64)?.to_vec2() };
    let vector =
        |name: &str| -> Result<Vec<f64>> { tiny.weight(name).to_dtype(DType::F64)?.to_vec1() };
    let embedding = matrix("token_embd.weight")?;
    let mut states: Matrix = ids.iter().map(|&id| embedding[id as usize].clone()).collect();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let [q, k, v, o] = ["attn_q", "attn_k", "attn_v", "attn_output"].map(|p| matrix(&name(p)));
        let (q, k, v, o) = (q?, k?, v?, o?);
        let norm = vector(&name("attn_norm"))?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, state) in states.iter_mut().enumerate() {
            let x = normalise(state, &norm);
            let mut query = product(&q, &x);
            let mut key = product(&k, &x);
            rotate(&mut query, position);
            rotate(&mut key, position);
            keys.push(key);
            values.push(product(&v, &x));
            let attended: Vec<f64> =
                (0..QUERY_HEADS).flat_map(|head| attend(&query, &keys, &values, head)).collect();
            add(state, &product(&o, &attended));
        }

        let [gate, up, down] = ["ffn_gate", "ffn_up", "ffn_down"].map(|p| matrix(&name(p)));
        let (gate, up, down) = (gate?, up?, down?);
        let norm = vector(&name("ffn_norm"))?;
        for state in &mut states {
            let x = normalise(state, &norm);
            let (gate, up) = (product(&gate, &x), product(&up, &x));
            let gated: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(state, &product(&down, &gated));
        }
    }
    let norm = vector("output_norm.weight")?;
    let untied = tiny.weights.iter().any(|(name, _)| name == "output.weight");
    let output = if untied { matrix("output.weight")? } else { embedding };
    Ok(states.iter().map(|state| product(&output, &normalise(state, &norm))).collect())
}

fn product(weight: &Matrix, x: &[f64]) -> Vec<f64> {
    weight.iter().map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

fn normalise(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / HIDDEN as f64;
    let scale = (mean + f64::from(RMS_EPS)).powf(-0.5);
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn add(state: &mut [f64], change: &[f64]) {
    state.iter_mut().zip(change).for_each(|(s, c)| *s += c);
}

/// RoPE on neighbouring pairs, in every head.
fn rotate(heads: &mut [f64], position: usize) {
    for head in heads.chunks_exact_mut(HEAD_DIM) {
        for (index, pair) in head.chunks_exact_mut(2).enumerate() {
            let exponent = 2.0 * index as f64 / HEAD_DIM as f64;
            let angle = position as f64 * f64::from(ROPE_BASE).powf(-exponent);
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (pair[0], pair[1]);
            (pair[0], pair[1]) = (a * cos - b * sin, a * sin + b * cos);
        }
    }
}

fn attend(query: &[f64], keys: &Matrix, values: &Matrix, head: usize) -> Vec<f64> {
    let kv_head = head / (QUERY_HEADS / KV_HEADS);
    let (from, kv_from) = (head * HEAD_DIM, kv_head * HEAD_DIM);
    let weights: Vec<f64> = keys
        .iter()
        .map(|key| {
            let dot: f64 = (0..HEAD_DIM).map(|d| query[from + d] * key[kv_from + d]).sum();
            (dot / (HEAD_DIM as f64).sqrt()).exp()
        })
        .collect();
    let total: f64 = weights.iter().sum();
    let value = |d: usize| -> f64 {
        weights.iter().zip(values).map(|(w, value)| w * value[kv_from + d]).sum()
    };
    (0..HEAD_DIM).map(|d| value(d) / total).collect()
}
