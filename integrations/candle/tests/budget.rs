//! The budget cache on a tiny llama, against attention that masks what the plans evict.

#[path = "common/masked_attention.rs"]
mod masked_attention;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Result, Tensor};
use kvbudget::plan::Promise;
use kvbudget::score::{Needs, Queries};
use kvbudget::{Budget, PRESETS, Plan, PolicyConfig, Reference, Trigger, preset, reference};
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Llama, Span};
use masked_attention::MaskedAttention;
use tiny_model::{KV_HEADS, LAYERS, Tiny, tiny_ids};

/// f32 sums in another order, over three layers: below 1e-5 of the largest logit is seen.
const TOLERANCE: f32 = 1e-4;
/// One prompt long enough for matrix products, one shorter than any window, one between.
const PROMPTS: [u32; 3] = [100, 7, 41];

fn model() -> Result<Llama> {
    let mut tiny = Tiny::new()?;
    tiny.metadata.retain(|(key, _)| key != "llama.context_length");
    tiny.metadata.push(("llama.context_length".into(), Value::U32(512)));
    tiny.load()
}

/// The published combinations that score from the prompt alone, or from what is gathered of it.
fn policies() -> Vec<PolicyConfig> {
    let all = PRESETS
        .iter()
        .chain(&["expected-attention"])
        .map(|name| preset(name).expect("a preset has its own name"));
    let needs = |p: &PolicyConfig| -> Needs {
        p.build::<kvbudget::backend::cpu::Cpu>().expect("presets build").needs()
    };
    all.filter(|p| !needs(p).second_pass).collect()
}

fn cache(model: &Llama, policy: PolicyConfig, budget: &str) -> Result<BudgetCache> {
    let budget = budget.parse().expect("the budget is well formed");
    let mut cache =
        BudgetCache::new(model.geometry()?, model.output_projections(), policy, budget)?;
    if cache.wants_rope() {
        cache = cache.with_rope(model.rope()?);
    }
    for _ in PROMPTS {
        cache.add_sequence()?;
    }
    Ok(cache)
}

/// A batch that runs on two hooks at once and compares their logits.
struct Pair<'m> {
    model: &'m Llama,
    positions: [u32; 3],
    worst: f32,
}

impl<'m> Pair<'m> {
    fn new(model: &'m Llama) -> Self {
        Self { model, positions: [0; 3], worst: 0.0 }
    }

    fn run(
        &mut self,
        tokens: [u32; 3],
        a: &mut dyn AttentionHook,
        b: &mut dyn AttentionHook,
    ) -> Result<()> {
        let spans: Vec<Span> =
            self.positions.iter().zip(tokens).map(|(&p, n)| Span::new(p, n)).collect();
        self.positions.iter_mut().zip(tokens).for_each(|(p, n)| *p += n);
        let ids = tiny_ids(tokens.iter().sum::<u32>() as usize);
        let a = self.model.logits(&self.model.forward(&ids, &spans, a)?)?;
        let b = self.model.logits(&self.model.forward(&ids, &spans, b)?)?;
        let largest = b.abs()?.max_all()?.to_scalar::<f32>()?;
        let apart = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
        // A NaN must not pass as a small difference.
        assert!(apart.is_finite() && largest > 1.0, "{apart} of {largest}");
        self.worst = self.worst.max(apart / largest);
        Ok(())
    }

    fn close(&self) {
        assert!(self.worst < TOLERANCE, "{}", self.worst);
    }
}

/// Decode steps, then a second turn: a long one, a short one and none.
const TURNS: [[u32; 3]; 5] = [[1, 1, 1], [1, 0, 1], [70, 5, 0], [1, 1, 1], [1, 1, 1]];

#[test]
fn full_budget_equals_dense_attention() -> Result<()> {
    let model = model()?;
    for policy in policies() {
        let mut cache = cache(&model, policy, "100%")?;
        let mut dense = DenseAttention::new(LAYERS);
        let mut pair = Pair::new(&model);
        pair.run(PROMPTS, &mut cache, &mut dense)?;
        for plan in cache.compress()? {
            assert_eq!(plan.slots, plan.tokens as u64 * (LAYERS * KV_HEADS) as u64);
        }
        for tokens in TURNS {
            pair.run(tokens, &mut cache, &mut dense)?;
        }
        pair.close();
    }
    Ok(())
}

#[test]
fn compressed_equals_masked_attention() -> Result<()> {
    let model = model()?;
    let geometry = model.geometry()?;
    for policy in policies() {
        // Tova wants heads of equal lengths when it compresses again.
        let text = if policy.name == "tova" { "12/head" } else { "30%" };
        let budget: Budget = text.parse().expect("a budget");
        let unit = policy.align.unit;
        let mut cache = cache(&model, policy, text)?;
        let mut masked = MaskedAttention::new(&geometry, PROMPTS.len());
        let mut pair = Pair::new(&model);
        pair.run(PROMPTS, &mut cache, &mut masked)?;
        let compress = |cache: &mut BudgetCache, masked: &mut MaskedAttention| -> Result<()> {
            for (i, plan) in cache.compress()?.iter().enumerate() {
                let sequence = &cache.sequences()[i];
                let wanted = budget.resolve(&geometry, plan.tokens.into());
                // Whole chunks may leave some of it.
                assert!(plan.slots == wanted || unit > 1 && plan.slots < wanted, "{plan:?}");
                assert_eq!((sequence.slots(), sequence.bytes_reserved()), (plan.slots, plan.bytes));
                masked.apply(i, plan);
            }
            Ok(())
        };
        compress(&mut cache, &mut masked)?;
        for tokens in TURNS {
            pair.run(tokens, &mut cache, &mut masked)?;
        }
        compress(&mut cache, &mut masked)?;
        for tokens in TURNS {
            pair.run(tokens, &mut cache, &mut masked)?;
        }
        pair.close();
    }
    Ok(())
}

#[test]
fn one_slot_too_few_is_noticed() -> Result<()> {
    let model = model()?;
    let mut cache = cache(&model, preset("ada-snapkv").expect("a preset"), "30%")?;
    let mut masked = MaskedAttention::new(&model.geometry()?, PROMPTS.len());
    let mut pair = Pair::new(&model);
    pair.run(PROMPTS, &mut cache, &mut masked)?;
    let plans = cache.compress()?;
    plans.iter().enumerate().for_each(|(i, plan)| masked.apply(i, plan));
    let newest = plans[0].layers[1].row(1).last().expect("the newest token is kept");
    masked.evict(0, 1, 1, newest.index());
    pair.run([1, 1, 1], &mut cache, &mut masked)?;
    assert!(pair.worst > TOLERANCE, "{}", pair.worst);
    Ok(())
}

/// Prompts in chunks, the last one with `compressing`, or compressed after the last.
fn prefilled(
    model: &Llama,
    policy: PolicyConfig,
    chunks: &[[u32; 3]],
    while_reading: bool,
) -> Result<(BudgetCache, Vec<Plan>, Tensor)> {
    let mut cache = cache(model, policy, "30%")?;
    let (last, earlier) = chunks.split_last().expect("there are chunks");
    let ids = |tokens: &[u32; 3]| tiny_ids(tokens.iter().sum::<u32>() as usize);
    for tokens in earlier {
        let spans = cache.spans(tokens);
        model.forward(&ids(tokens), &spans, &mut cache)?;
    }
    let spans = cache.spans(last);
    let (hidden, plans) = if while_reading {
        let mut compressing = cache.compressing();
        let hidden = model.forward(&ids(last), &spans, &mut compressing)?;
        (hidden, compressing.finish()?)
    } else {
        (model.forward(&ids(last), &spans, &mut cache)?, cache.compress()?)
    };
    Ok((cache, plans, hidden))
}

#[test]
fn compressing_while_reading_ends_where_compressing_after_does() -> Result<()> {
    let model = model()?;
    for policy in policies() {
        for chunks in [&[PROMPTS][..], &[[60, 3, 40], [40, 4, 1]]] {
            let (mut one, a, hidden) = prefilled(&model, policy.clone(), chunks, true)?;
            let (mut two, b, expected) = prefilled(&model, policy.clone(), chunks, false)?;
            assert_eq!(hidden.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
            for (a, b) in a.iter().zip(&b) {
                assert_eq!(a.layers, b.layers, "{}", policy.name);
                let promise = Promise { unit: policy.align.unit, ..Promise::default() };
                a.check(&model.geometry()?, &promise).expect("the plan holds");
            }
            for (i, plan) in a.iter().enumerate() {
                assert_eq!(one.sequences()[i].bytes_reserved(), plan.bytes);
            }
            // The caches hold what the plans say, so they go on alike.
            let mut pair = Pair::new(&model);
            pair.positions = PROMPTS;
            pair.run([1, 1, 1], &mut one, &mut two)?;
            assert_eq!(pair.worst, 0.0);
        }
    }
    Ok(())
}

/// The published codes settle nothing before the last layer, and want more tokens than their window.
#[test]
fn reference_modes_compress_while_reading_too() -> Result<()> {
    let model = model()?;
    for name in ["snapkv", "ada-snapkv", "criticalkv"] {
        let policy = reference(Reference::Kvpress, name).expect("kvpress has it");
        let alone = [[PROMPTS[0], 0, 0]];
        let (one, a, _) = prefilled(&model, policy.clone(), &alone, true)?;
        let mut two = BudgetCache::new(
            model.geometry()?,
            model.output_projections(),
            policy,
            "30%".parse().expect("a budget"),
        )?;
        two.add_sequence()?;
        model.forward(&tiny_ids(100), &[Span::new(0, 100)], &mut two)?;
        assert_eq!(a[0].layers, two.compress()?[0].layers);
        assert_eq!(one.sequences()[0].bytes_reserved(), a[0].bytes);
    }
    Ok(())
}

/// Caches take at most the budget and one layer while the prompt is read, whatever the policy contests.
#[test]
fn peak_is_budget_and_one_layer() -> Result<()> {
    let model = model()?;
    let geometry = model.geometry()?;
    let budget: Budget = "30%".parse().expect("a budget");
    let tokens = u64::from(PROMPTS[0]);
    let alone = [PROMPTS[0], 0, 0];
    let layer = geometry.bytes(tokens) / LAYERS as u64;
    for policy in policies() {
        let (cache, plans, _) = prefilled(&model, policy.clone(), &[alone], true)?;
        let whole = plans[0].bytes;
        let wanted = budget.resolve(&geometry, tokens) * geometry.slot_bytes(kvbudget::LayerId(0));
        // Whole chunks may leave some of it.
        assert!(whole == wanted || policy.align.unit > 1 && whole < wanted, "{}", policy.name);
        let peak = cache.peak_bytes();
        assert!((whole..=whole + layer).contains(&peak), "{}: {peak}", policy.name);

        let (cache, ..) = prefilled(&model, policy, &[alone], false)?;
        assert!(cache.peak_bytes() >= geometry.bytes(tokens));
    }
    Ok(())
}

#[test]
fn trigger_keeps_the_budget() -> Result<()> {
    let model = model()?;
    let geometry = model.geometry()?;
    let budget: Budget = "10/head".parse().expect("a budget");
    let slots = budget.resolve(&geometry, 1000);
    for (trigger, most) in [
        (Trigger::every(8).expect("not zero"), slots + 8 * geometry.heads() as u64),
        (Trigger::above(slots + 20), slots + 20 + geometry.heads() as u64),
    ] {
        let policy = preset("ada-snapkv").expect("a preset");
        let mut cache =
            BudgetCache::new(geometry.clone(), Vec::new(), policy, budget)?.with_trigger(trigger);
        cache.add_sequence()?;
        model.forward(&tiny_ids(100), &[Span::new(0, 100)], &mut cache)?;
        cache.compress()?;
        cache.reserve(0, 16)?;
        let mut times = 0;
        for position in 100..150 {
            model.forward(&[7], &[Span::new(position, 1)], &mut cache)?;
            assert!(cache.sequences()[0].slots() <= most);
            for (sequence, plan) in cache.recompress_if_due()? {
                assert_eq!((sequence, plan.slots), (0, slots));
                assert_eq!(cache.sequences()[0].slots(), slots);
                assert_eq!(plan.tokens, position + 1);
                times += 1;
            }
        }
        assert!(times >= 6, "{times}");
        assert_eq!(cache.sequences()[0].tokens(), 150);
    }
    Ok(())
}

/// What a question adds to the statistics of queries goes again with it, and a copy's own are not those of its source.
#[test]
fn rolled_back_questions_leave_no_trace() -> Result<()> {
    let model = model()?;
    let policy = || preset("expected-attention").expect("a preset");
    let (config, half): (_, Budget) = (policy(), "50%".parse().expect("a budget"));
    let built = policy().build().expect("presets build");
    let none = Span::new(0, 0);
    let mut cache = cache(&model, config, "50%")?;
    model.forward(&tiny_ids(100), &[Span::new(0, 100), none, none], &mut cache)?;
    let before = cache.plan(0, &built, half)?;
    let mark = cache.sequences()[0].mark();
    let copy = cache.sequences()[0].gather(&before, 60).expect("the plan fits");
    cache.push_sequence(copy);
    model.forward(&tiny_ids(60), &[Span::new(100, 60), none, none, none], &mut cache)?;
    let longer = cache.plan(0, &built, half)?;
    cache.sequence_mut(0)?.roll_back(&mark)?;
    assert_eq!(cache.plan(0, &built, half)?, before);
    model.forward(&tiny_ids(60), &[Span::new(100, 60), none, none, none], &mut cache)?;
    assert_eq!(cache.plan(0, &built, half)?, longer);
    Ok(())
}

/// One dense prefill, many compressed copies; planning changes nothing.
#[test]
fn forks_leave_their_source_alone() -> Result<()> {
    let model = model()?;
    let geometry = model.geometry()?;
    let dense = preset("random").expect("a preset");
    let whole: Budget = "100%".parse().expect("a budget");
    let mut source = BudgetCache::new(geometry, model.output_projections(), dense.clone(), whole)?
        .with_queries(Queries::All)
        .with_rope(model.rope()?);
    source.add_sequence()?;
    model.forward(&tiny_ids(100), &[Span::new(0, 100)], &mut source)?;
    let mut forks = cache(&model, dense, "100%")?;
    for _ in PROMPTS {
        forks.remove_sequence(0)?;
    }
    let mut masked = MaskedAttention::new(&model.geometry()?, policies().len());
    let spans = vec![Span::new(0, 100); policies().len()];
    let ids: Vec<u32> = policies().iter().flat_map(|_| tiny_ids(100)).collect();
    model.forward(&ids, &spans, &mut masked)?;
    for (i, policy) in policies().iter().enumerate() {
        let policy = policy.build().expect("presets build");
        let budgets = ["25%", "60%"].map(|b| b.parse().expect("a budget"));
        let plan = source.plan(0, &policy, budgets[0])?;
        // One scoring for all budgets; reference modes score for one.
        if policy.config().reference.is_none() {
            let plans = source.plans(0, &policy, &budgets, None)?;
            assert_eq!(plans, [plan.clone(), source.plan(0, &policy, budgets[1])?]);
        } else {
            assert!(source.plans(0, &policy, &budgets, None).is_err());
        }
        forks.push_sequence(source.sequences()[0].gather(&plan, 4).expect("the plan fits"));
        masked.apply(i, &plan);
    }
    assert!(source.sequences()[0].is_dense());
    let spans = vec![Span::new(100, 1); policies().len()];
    let ids = vec![9; spans.len()];
    let expected = model.forward(&ids, &spans, &mut masked)?;
    let apart = (model.forward(&ids, &spans, &mut forks)? - expected)?.abs()?;
    let apart = apart.max_all()?.to_scalar::<f32>()?;
    assert!(apart < TOLERANCE, "{apart}");
    Ok(())
}

#[test]
fn half_precision_and_strided_tensors_are_borrowed_as_they_are() -> Result<()> {
    let shape = kvbudget::LayerShape::new(4, 2, 8).expect("a shape");
    let random =
        |tokens: usize, heads: usize| Tensor::randn(0f32, 1.0, (tokens, heads, 8), &Device::Cpu);
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let ours = kvbudget_candle::host::dtype(dtype)?;
        let geometry = kvbudget::Geometry::uniform(1, shape, ours).expect("a geometry");
        for tokens in [5, 80] {
            let whole = "100%".parse().expect("a budget");
            let policy = preset("streaming").expect("a preset");
            let mut cache = BudgetCache::new(geometry.clone(), Vec::new(), policy, whole)?;
            cache.add_sequence()?;
            let qkv = random(tokens, 8)?.to_dtype(dtype)?;
            let parts = [(0, 4), (4, 2), (6, 2)].map(|(at, n)| qkv.narrow(1, at, n));
            let [q, k, v] = parts;
            let (q, k, v) = (q?, k?, v?);
            let spans = [Span::new(0, tokens as u32)];
            let got = cache.attend(0, &q, &k, &v, &spans)?;
            assert_eq!((got.dtype(), got.dims()), (dtype, q.dims()));
            let expected = MaskedAttention::new(&geometry, 1).attend(0, &q, &k, &v, &spans)?;
            let apart = (got.to_dtype(DType::F32)? - expected)?.abs()?.max_all()?;
            let apart = apart.to_scalar::<f32>()?;
            assert!(apart < tolerance, "{dtype:?}, {tokens} tokens: {apart}");
        }
    }
    Ok(())
}

#[test]
fn mistakes_are_named() -> Result<()> {
    let model = model()?;
    let snapkv = || preset("ada-snapkv").expect("a preset");
    let said = |result: Result<Tensor>, words: &[&str]| {
        let error = result.expect_err("a mistake").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    let mut one = cache(&model, snapkv(), "30%")?;
    let ids = tiny_ids(8);
    let run = |cache: &mut BudgetCache, spans: &[Span]| model.forward(&ids, spans, cache);
    said(run(&mut one, &[Span::new(0, 8)]), &["3 spans", "got 1"]);
    let none = Span::new(0, 0);
    run(&mut one, &[Span::new(0, 8), none, none])?;
    said(run(&mut one, &[Span::new(7, 8), none, none]), &["sequence 0", "position 8", "got 7"]);
    said(run(&mut one, &[Span::new(8, 7), none, none]), &["7 tokens", "got 8"]);
    said(run(&mut one, &[Span::new(505, 8), none, none]), &["513 tokens", "context of 512"]);
    assert_eq!(one.sequences()[0].tokens(), 8);
    run(&mut one, &[Span::new(8, 8), none, none])?;

    let x = Tensor::zeros((1, 2, 8), DType::F32, &Device::Cpu)?;
    let spans = [Span::new(16, 1), none, none];
    said(one.attend(0, &x, &x, &x, &spans), &["q: expected [1, 4, 8]", "got [1, 2, 8]"]);
    said(one.attend(9, &x, &x, &x, &spans), &["below 3", "got 9"]);
    let mut reading = one.compressing();
    said(reading.attend(1, &x, &x, &x, &spans), &["expected layer 0", "got 1"]);
    let unfinished = reading.finish().expect_err("no forward pass").to_string();
    assert!(unfinished.contains("3 layers, got 0"), "{unfinished}");

    assert!(one.remove_sequence(3).is_err());
    assert!(one.compress_sequence(3).is_err());
    let critical = preset("criticalkv").expect("a preset");
    let whole: Budget = "100%".parse().expect("a budget");
    let error = BudgetCache::new(model.geometry()?, Vec::new(), critical, whole);
    let error = error.err().expect("no output projections").to_string();
    assert!(error.contains("3 layers") && error.contains("got 0"), "{error}");
    Ok(())
}

#[test]
fn empty_sequences_are_compressed_to_nothing() -> Result<()> {
    let model = model()?;
    for policy in policies() {
        let mut cache = cache(&model, policy, "30%")?;
        let plans = cache.compress()?;
        assert!(plans.iter().all(|plan| plan.slots == 0), "{plans:?}");
        model.forward(&[1, 2], &cache.spans(&[1, 0, 1]), &mut cache)?;
    }
    Ok(())
}
