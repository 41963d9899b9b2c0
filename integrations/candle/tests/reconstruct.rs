//! The second pass computes what dense attention computes, leaves the cache alone, and its profile is used.

#[path = "common/tiny_model.rs"]
mod tiny_model;

use anyhow::Result;
use candle_core::Tensor;
use kvbudget::{Budget, PolicyConfig, Profile, preset, profiled};
use kvbudget_candle::reconstruct::{Calibration, calibrate, reconstruct};
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Llama, Span};
use tiny_model::{KV_HEADS, LAYERS, Tiny, tiny_ids};

const CONTEXT: u32 = 30;
const INSTRUCTION: [u32; 3] = [4, 9, 2];

fn cache(model: &Llama, policy: PolicyConfig, budget: &str) -> Result<BudgetCache> {
    let (geometry, o_proj) = (model.geometry()?, model.output_projections());
    let mut cache = BudgetCache::new(geometry, o_proj, policy, budget.parse()?)?;
    cache.add_sequence()?;
    let ids = tiny_ids(CONTEXT as usize);
    model.forward(&ids, &[Span::new(0, CONTEXT)], &mut cache)?;
    Ok(cache)
}

#[test]
fn the_second_pass_attends_like_dense_and_leaves_no_trace() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let context = tiny_ids(CONTEXT as usize);
    let cache = cache(&model, preset("knorm")?, "100%")?;
    let sequence = &cache.sequences()[0];
    let slots = sequence.slots();

    let mut hidden: Vec<Tensor> = Vec::new();
    let scores = reconstruct(sequence, &INSTRUCTION, &context, &mut |ids, spans, hook| {
        hidden.push(model.forward(ids, spans, hook)?);
        Ok(())
    })?;
    assert_eq!((sequence.slots(), sequence.tokens()), (slots, CONTEXT));

    let mut dense = DenseAttention::new(LAYERS);
    model.forward(&context, &[Span::new(0, CONTEXT)], &mut dense)?;
    let repeated = [INSTRUCTION.as_slice(), &context].concat();
    let span = Span::new(CONTEXT, repeated.len() as u32);
    let want = model.forward(&repeated, &[span], &mut dense)?;
    let difference = (&hidden[0] - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference < 1e-4, "{difference}");

    // Probabilities, one row per head: each query's mass is at most 1, and something is looked at.
    assert_eq!(scores.len(), LAYERS);
    for layer in &scores {
        assert_eq!(layer.lens().collect::<Vec<_>>(), [CONTEXT as usize; KV_HEADS]);
        assert!(layer.data().iter().all(|p| (0.0..=1.0).contains(p)));
        assert!(layer.data().iter().any(|&p| p > 0.1));
    }
    let (policy, budgets) = (preset("reconstruct")?.build()?, ["50%".parse()?, "10%".parse()?]);
    let plans = cache.plans(0, &policy, &budgets, Some(&scores))?;
    assert_eq!((plans[0].slots, plans[1].slots), (slots / 2, slots / 10));
    let refused = cache.plans(0, &policy, &budgets, Some(&scores[1..])).unwrap_err();
    assert!(refused.to_string().contains("scores of"), "{refused}");
    Ok(())
}

#[test]
fn a_compressed_cache_cannot_be_reconstructed() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let mut cache = cache(&model, preset("knorm")?, "50%")?;
    cache.compress()?;
    let mut forward = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
        model.forward(ids, spans, hook).map(drop)
    };
    let refused = reconstruct(&cache.sequences()[0], &INSTRUCTION, &[1, 2], &mut forward);
    assert!(refused.unwrap_err().to_string().contains("has been compressed"));
    let nothing = reconstruct(&cache.sequences()[0], &INSTRUCTION, &[], &mut forward);
    assert!(nothing.unwrap_err().to_string().contains("got none"));
    Ok(())
}

#[test]
fn a_calibrated_profile_shares_out_the_budget() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let calibration = Calibration {
        prefix: vec![1, 2],
        instruction: INSTRUCTION.to_vec(),
        texts: vec![tiny_ids(24), tiny_ids(28)[4..].to_vec()],
        budgets: vec!["25%".parse()?, "50%".parse()?],
    };
    let empty = BudgetCache::new(
        model.geometry()?,
        model.output_projections(),
        preset("knorm")?,
        Budget::keep(1, 1)?,
    )?;
    let mut texts = 0;
    let profile: Profile = calibrate(
        "tiny",
        empty,
        &calibration,
        &mut |ids, spans, hook| model.forward(ids, spans, hook).map(drop),
        |plans| texts += plans.len(),
    )?;
    assert_eq!(texts, 4);
    for point in profile.curve() {
        let shares = point.shares.concat();
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        assert!((mean - point.keep.as_f64()).abs() < 1e-2, "{mean} at {}", point.keep);
        assert!(shares.iter().any(|s| (s - mean).abs() > 0.02), "all heads are alike");
    }
    let mut cache = cache(&model, profiled(profile), "25%")?;
    let plan = cache.compress()?.remove(0);
    assert_eq!(plan.slots, (LAYERS * KV_HEADS) as u64 * u64::from(CONTEXT) / 4);
    Ok(())
}
