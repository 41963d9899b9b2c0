//! Qwen3 through the hook, against candle-transformers' own model on the same random weights.

#[path = "common/masked_attention.rs"]
mod masked_attention;

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::qwen3 as theirs;
use kvbudget::{Budget, preset};
use kvbudget_candle::qwen3::{Config, Qwen3};
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Span};
use masked_attention::MaskedAttention;

/// f32 sums in another order.
const TOLERANCE: f32 = 1e-4;
const PROMPT: usize = 90;
const ROPE_BASE: f64 = 1e6;
const RMS_EPS: f64 = 1e-6;

fn config() -> Config {
    Config {
        layers: 3,
        hidden: 24,
        mlp: 40,
        vocabulary: 50,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 8,
        context_length: 256,
        rope_base: ROPE_BASE,
        rms_eps: RMS_EPS,
        tied: true,
    }
}

fn their_config() -> theirs::Config {
    let ours = config();
    theirs::Config {
        vocab_size: ours.vocabulary,
        hidden_size: ours.hidden,
        intermediate_size: ours.mlp,
        num_hidden_layers: ours.layers,
        num_attention_heads: ours.query_heads,
        head_dim: ours.head_dim,
        attention_bias: false,
        num_key_value_heads: ours.kv_heads,
        max_position_embeddings: ours.context_length,
        sliding_window: None,
        max_window_layers: 0,
        tie_word_embeddings: true,
        rope_theta: ROPE_BASE,
        rms_norm_eps: RMS_EPS,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

/// Random weights under the names of the published checkpoints.
fn weights() -> Result<HashMap<String, Tensor>> {
    let Config { layers, hidden, mlp, vocabulary, query_heads, kv_heads, head_dim, .. } = config();
    let mut state = 11u64;
    let mut tensor = |mean: f32, deviation: f32, shape: &[usize]| {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            mean + deviation * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
        };
        let values = (0..shape.iter().product()).map(|_| next()).collect::<Vec<f32>>();
        Tensor::from_vec(values, shape, &Device::Cpu)
    };
    let mut all = HashMap::new();
    all.insert("model.embed_tokens.weight".into(), tensor(0.0, 1.0, &[vocabulary, hidden])?);
    all.insert("model.norm.weight".into(), tensor(1.0, 0.3, &[hidden])?);
    for layer in 0..layers {
        for (name, mean, deviation, shape) in [
            ("input_layernorm", 1.0, 0.3, vec![hidden]),
            ("self_attn.q_proj", 0.0, 0.6, vec![query_heads * head_dim, hidden]),
            ("self_attn.k_proj", 0.0, 0.6, vec![kv_heads * head_dim, hidden]),
            ("self_attn.v_proj", 0.0, 0.6, vec![kv_heads * head_dim, hidden]),
            ("self_attn.o_proj", 0.0, 0.3, vec![hidden, query_heads * head_dim]),
            ("self_attn.q_norm", 1.5, 0.5, vec![head_dim]),
            ("self_attn.k_norm", 1.5, 0.5, vec![head_dim]),
            ("post_attention_layernorm", 1.0, 0.3, vec![hidden]),
            ("mlp.gate_proj", 0.0, 0.4, vec![mlp, hidden]),
            ("mlp.up_proj", 0.0, 0.4, vec![mlp, hidden]),
            ("mlp.down_proj", 0.0, 0.3, vec![hidden, mlp]),
        ] {
            let weight = tensor(mean, deviation, &shape)?;
            all.insert(format!("model.layers.{layer}.{name}.weight"), weight);
        }
    }
    Ok(all)
}

fn ours() -> Result<Qwen3> {
    Qwen3::load(config(), VarBuilder::from_tensors(weights()?, DType::F32, &Device::Cpu))
}

fn ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * i * 7 + i * 3 + 5) as u32 % 50).collect()
}

/// Largest difference of logits, relative to the largest logit.
fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
    let apart = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / largest;
    assert!(apart.is_finite());
    Ok(apart)
}

/// The last token's logits after a prompt and two decode steps.
fn last_logits(model: &Qwen3, hook: &mut dyn AttentionHook) -> Result<Vec<Tensor>> {
    let mut logits = Vec::new();
    for (position, tokens) in [(0, PROMPT), (PROMPT, 1), (PROMPT + 1, 1)] {
        let span = Span::new(position as u32, tokens as u32);
        let hidden = model.forward(&ids(position + tokens)[position..], &[span], hook)?;
        logits.push(model.logits(&hidden.narrow(0, tokens - 1, 1)?)?);
    }
    Ok(logits)
}

#[test]
fn hook_leaves_the_model_as_it_is() -> Result<()> {
    let vb = VarBuilder::from_tensors(weights()?, DType::F32, &Device::Cpu);
    let mut theirs = theirs::ModelForCausalLM::new(&their_config(), vb)?;
    let ours = ours()?;
    let whole = "100%".parse().expect("a budget");
    let policy = preset("ada-snapkv").expect("a preset");
    let mut cache =
        BudgetCache::new(ours.geometry().clone(), ours.output_projections(), policy, whole)?;
    cache.add_sequence()?;
    let dense = last_logits(&ours, &mut DenseAttention::new(3))?;
    let full = last_logits(&ours, &mut cache)?;
    for (i, (position, tokens)) in
        [(0, PROMPT), (PROMPT, 1), (PROMPT + 1, 1)].into_iter().enumerate()
    {
        let input = Tensor::new(&ids(position + tokens)[position..], &Device::Cpu)?.unsqueeze(0)?;
        let expected = theirs.forward(&input, position)?.squeeze(0)?;
        for got in [&dense[i], &full[i]] {
            let apart = apart(got, &expected)?;
            assert!(apart < TOLERANCE, "step {i}: {apart}");
        }
    }
    Ok(())
}

#[test]
fn half_the_cache_is_half_the_cache() -> Result<()> {
    let model = ours()?;
    let half: Budget = "50%".parse().expect("a budget");
    for name in ["ada-snapkv", "layer-defensivekv"] {
        let policy = preset(name).expect("a preset");
        let mut cache =
            BudgetCache::new(model.geometry().clone(), model.output_projections(), policy, half)?;
        cache.add_sequence()?;
        let mut masked = MaskedAttention::new(model.geometry(), 1);
        let spans = [Span::new(0, PROMPT as u32)];
        let mut reading = cache.compressing();
        let hidden = model.forward(&ids(PROMPT), &spans, &mut reading)?;
        let plans = reading.finish()?;
        assert_eq!(plans[0].slots, half.resolve(model.geometry(), PROMPT as u64));
        assert_eq!(cache.sequences()[0].slots(), plans[0].slots);
        let expected = model.forward(&ids(PROMPT), &spans, &mut masked)?;
        assert!(apart(&hidden, &expected)? < TOLERANCE);
        masked.apply(0, &plans[0]);
        // A second prompt, long enough to attend within itself.
        let spans = [Span::new(PROMPT as u32, 20)];
        let hidden = model.forward(&ids(20), &spans, &mut cache)?;
        let apart = apart(&hidden, &model.forward(&ids(20), &spans, &mut masked)?)?;
        assert!(apart < TOLERANCE, "{name}: {apart}");
    }
    Ok(())
}
