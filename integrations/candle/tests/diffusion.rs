//! Denoising with an evicted prompt on a small random model, held to attention in plain loops over all rows.

#[path = "../examples/diffusion/against_dense.rs"]
mod against_dense;
#[path = "common/bidirectional_attention.rs"]
mod bidirectional_attention;
#[path = "../examples/diffusion/model.rs"]
mod model;

use against_dense::{Dense, dense_options};
use anyhow::Result;
use bidirectional_attention::{Bidirectional, Frozen, Layer};
use candle_core::{DType, Tensor};
use kvbudget::allocate::Layers;
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::plan::Promise;
use kvbudget::{
    Budget, LayerView, Plan, Planner, Policy, PolicyConfig, Ragged, RefreshPolicy, Rows, Sequence,
    Spans, preset,
};
use kvbudget_candle::Span;
use kvbudget_candle::diffusion::{Denoiser, Options, Step, importance};
use kvbudget_candle::qwen3::Qwen3;
use model::{MASK, model, prompt};

/// f32 against f64, through four layers of sharp attention.
const TOLERANCE: f64 = 1e-3;
const PROMPT: usize = 40;
const MASKS: usize = 8;
const TOKENS: usize = PROMPT + MASKS;
/// Slots per head of the prompt.
const KEEP: usize = 10;

fn few() -> Budget {
    Budget::TokensPerHead((KEEP + MASKS) as u64)
}

fn all() -> Budget {
    Budget::TokensPerHead(TOKENS as u64)
}

fn options(budget: Budget, prompt_every: u32, response_every: u32) -> Result<Options> {
    let refresh = RefreshPolicy::new(prompt_every, response_every)?;
    Ok(Options { budget, refresh, ..dense_options()? })
}

/// A pass over prompt and response, and its logits of the masks.
fn plain(model: &Qwen3, ids: &[u32], frozen: Option<Frozen<'_>>) -> Result<(Tensor, Vec<Layer>)> {
    let mut hook = frozen.map_or_else(Bidirectional::default, Bidirectional::frozen);
    let hidden = model.forward(ids, &[Span::new(0, ids.len() as u32)], &mut hook)?;
    let masked: Vec<u32> =
        (0..).zip(ids).filter(|(_, id)| **id == MASK).map(|(row, _)| row).collect();
    let hidden = hidden.index_select(&Tensor::new(masked, hidden.device())?, 0)?;
    Ok((model.logits(&hidden)?, hook.layers))
}

fn apart(got: &Tensor, want: &Tensor) -> Result<f64> {
    let largest = |x: &Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
    let apart = f64::from(largest(&(got - want)?)? / largest(want)?);
    assert!(apart.is_finite());
    Ok(apart)
}

/// Denoises to the end. Shows each step, its number and the tokens it has seen.
fn denoise(
    denoiser: &mut Denoiser<'_>,
    prompt: &[u32],
    mut look: impl FnMut(usize, &Step, &Denoiser<'_>, &[u32]) -> Result<()>,
) -> Result<()> {
    for number in 0..denoiser.response().len() {
        let seen = [prompt, denoiser.response()].concat();
        let step = denoiser.step()?;
        look(number, &step, denoiser, &seen)?;
        let (row, token) = denoiser.surest(&step, 1)?[0];
        denoiser.write(row, token)?;
    }
    assert!(denoiser.response().iter().all(|&token| token != MASK));
    Ok(())
}

/// Largest difference between the prompt slots that the caches hold and a pass's rows at their positions.
fn prompt_slots_apart(denoiser: &Denoiser<'_>, model: &Qwen3, pass: &[Layer]) -> Result<f64> {
    let mut apart = 0f64;
    let shapes = model.geometry().layers();
    for ((cache, layer), &shape) in denoiser.caches().zip(pass).zip(shapes) {
        let view = cache.view(shape)?;
        for (head, positions) in cache.positions().iter().enumerate() {
            for (slot, p) in positions.iter().enumerate().filter(|(_, p)| p.index() < PROMPT) {
                for (held, rows) in [(view.k(), &layer.k), (view.v(), &layer.v)] {
                    let HostSlice::F32(data) = held.storage() else { panic!("f32") };
                    let got = &data[held.start(head, slot)..][..shape.head_dim()];
                    let pairs = got.iter().zip(&rows[p.index()][head]);
                    apart = pairs.fold(apart, |a, (&x, y)| a.max((f64::from(x) - y).abs()));
                }
            }
        }
    }
    Ok(apart)
}

/// A step that refreshes everything is a step of the dense model, whatever was evicted before and is after it.
#[test]
fn refreshed_in_every_step_it_is_the_dense_model() -> Result<()> {
    let (model, prompt) = (model(1, 4)?, prompt(1, PROMPT));
    for budget in [all(), few()] {
        let mut denoiser = Denoiser::new(&model, options(budget, 1, 1)?, &prompt, MASKS)?;
        denoise(&mut denoiser, &prompt, |number, step, _, seen| {
            let apart = apart(&step.logits, &plain(&model, seen, None)?.0)?;
            assert!(apart < TOLERANCE, "{budget}, step {number}: {apart}");
            Ok(())
        })?;
    }
    Ok(())
}

/// In a model of one layer nothing that is decoded reaches the prompt's keys and values: a full cache is exact, however old.
#[test]
fn a_full_cache_of_one_layer_is_the_dense_model() -> Result<()> {
    let (model, prompt) = (model(2, 1)?, prompt(2, PROMPT));
    let mut denoiser = Denoiser::new(&model, options(all(), 50, 1)?, &prompt, MASKS)?;
    denoise(&mut denoiser, &prompt, |number, step, _, seen| {
        assert_eq!(step.refresh.prompt, number == 0);
        let apart = apart(&step.logits, &plain(&model, seen, None)?.0)?;
        assert!(apart < TOLERANCE, "step {number}: {apart}");
        Ok(())
    })
}

/// Between refreshes the prompt is what it was at the last one, less what the plan evicts; the response sees itself as it is.
#[test]
fn a_cached_step_sees_the_prompt_of_the_last_refresh() -> Result<()> {
    let (model, prompt) = (model(3, 4)?, prompt(3, PROMPT));
    for (budget, once) in [(all(), false), (few(), false), (few(), true)] {
        let mut options = options(budget, 3, 1)?;
        if once {
            options.refresh = options.refresh.selecting_once();
        }
        let mut denoiser = Denoiser::new(&model, options, &prompt, MASKS)?;
        let (mut last, mut first_plan) = (Vec::new(), None);
        denoise(&mut denoiser, &prompt, |number, step, denoiser, seen| {
            let name = format!("{budget}, step {number}");
            let plan = denoiser.plan().expect("a plan");
            let (dense, pass) = plain(&model, seen, None)?;
            assert_eq!(step.refresh.prompt, number % 3 == 0, "{name}");
            assert_eq!(step.refresh.select, number % 3 == 0 && (number == 0 || !once), "{name}");
            if step.refresh.prompt {
                last = pass;
                assert!(apart(&step.logits, &dense)? < TOLERANCE, "{name}");
            } else {
                let stale = prompt_slots_apart(denoiser, &model, &pass)?;
                assert!(stale > 0.01, "{name}: {stale}");
                let frozen = Frozen { tokens: PROMPT, layers: &last, plan };
                let apart = apart(&step.logits, &plain(&model, seen, Some(frozen))?.0)?;
                assert!(apart < TOLERANCE, "{name}: {apart}");
            }
            let apart = prompt_slots_apart(denoiser, &model, &last)?;
            assert!(apart < TOLERANCE, "{name}: {apart}");
            let first_plan = first_plan.get_or_insert_with(|| plan.clone());
            let same = plan.layers == first_plan.layers;
            assert_eq!(same, once || budget == all() || number < 3, "{name}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Logits of all steps.
fn logits(model: &Qwen3, prompt: &[u32], options: Options) -> Result<Vec<Vec<Vec<f32>>>> {
    let mut denoiser = Denoiser::new(model, options, prompt, MASKS)?;
    let mut logits = Vec::new();
    denoise(&mut denoiser, prompt, |_, step, _, _| {
        logits.push(step.logits.to_vec2()?);
        Ok(())
    })?;
    Ok(logits)
}

#[test]
fn rows_that_moved_are_computed_between_refreshes() -> Result<()> {
    let (model, prompt) = (model(4, 4)?, prompt(4, PROMPT));
    // All of them, because they moved or because they were due: the same.
    let mut when_due = options(few(), 50, 50)?;
    when_due.refresh = when_due.refresh.with_share("1".parse()?);
    let in_every_step = logits(&model, &prompt, options(few(), 50, 1)?)?;
    assert_eq!(logits(&model, &prompt, when_due)?, in_every_step);

    let mut denoiser = Denoiser::new(&model, options(few(), 50, 5)?, &prompt, MASKS)?;
    let mut written = MASKS as u32;
    denoise(&mut denoiser, &prompt, |number, step, denoiser, _| {
        let expected = if number % 5 == 0 { MASKS } else { MASKS / 4 };
        assert_eq!(step.refresh.response, number % 5 == 0);
        assert!(step.computed.iter().all(|rows| rows.len() == expected), "{number}");
        // The token just written is all that differs where the first layer looks.
        assert!(
            number == 0 || step.computed[0].contains(&written),
            "{number}: {:?}",
            step.computed
        );
        written = denoiser.surest(step, 1)?[0].0;
        Ok(())
    })?;

    // In one layer the response's keys and values are its tokens' alone: what is computed is exact, what is not is as it was.
    let (one, mut half) = (self::model(4, 1)?, options(all(), 50, 50)?);
    half.refresh = half.refresh.with_share("1/2".parse()?);
    let mut denoiser = Denoiser::new(&one, half, &prompt, MASKS)?;
    let mut last: Vec<Vec<f32>> = Vec::new();
    denoise(&mut denoiser, &prompt, |number, step, _, seen| {
        let dense = plain(&one, seen, None)?.0.to_vec2::<f32>()?;
        let mut now = vec![Vec::new(); MASKS];
        for ((&row, got), exact) in step.masks.iter().zip(step.logits.to_vec2()?).zip(&dense) {
            let apart = |want: &[f32]| {
                got.iter().zip(want).map(|(a, b): (&f32, _)| (a - b).abs()).fold(0.0, f32::max)
            };
            let computed = step.computed[0].contains(&row);
            let want = if computed { exact } else { &last[row as usize] };
            assert!(apart(want) < 1e-3, "step {number}, row {row}: {}", apart(want));
            assert!(computed || apart(exact) > 1e-2, "step {number}, row {row}");
            now[row as usize] = got;
        }
        last = now;
        Ok(())
    })?;

    let mut none = options(few(), 50, 5)?;
    none.refresh = none.refresh.with_delta(-1.0)?;
    let mut denoiser = Denoiser::new(&model, none, &prompt, MASKS)?;
    denoise(&mut denoiser, &prompt, |number, step, _, _| {
        assert!(number % 5 == 0 || step.computed.iter().all(Vec::is_empty), "{number}");
        Ok(())
    })
}

/// Of each layer: what entered it against that and what attention added.
#[test]
fn importance_is_what_attention_changes() -> Result<()> {
    let model = model(5, 4)?;
    let sequences = [0, 1].map(|seed| [prompt(seed, PROMPT), vec![MASK; MASKS]].concat());
    let measured = importance("random", &model, &sequences)?.importance.expect("measured");
    let mut expected = [0.0; 4];
    for ids in &sequences {
        let (_, layers) = plain(&model, ids, None)?;
        let layers = layers.iter().zip(model.output_projections()).zip(&mut expected);
        for ((Layer { x, attended, .. }, o_proj), expected) in layers {
            let after = (x + attended.flatten_from(1)?.matmul(&o_proj.t()?)?)?;
            let rows = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec2::<f64>();
            for (a, b) in rows(x)?.iter().zip(&rows(&after)?) {
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
                *expected += (1.0 - cosine) / (2 * TOKENS) as f64;
            }
        }
    }
    for (got, want) in measured.iter().zip(expected) {
        assert!((got - want).abs() < 1e-4 && want > 0.01, "{measured:?}, {expected:?}");
    }
    assert!(importance("random", &model, &[]).is_err());
    Ok(())
}

/// `maskkv` with the importance of the model's own layers.
fn measured_maskkv(model: &Qwen3) -> Result<PolicyConfig> {
    let mut policy = preset("maskkv")?;
    let sequences = [7, 8].map(|seed| [prompt(seed, PROMPT), vec![MASK; MASKS]].concat());
    importance("random", model, &sequences)?.apply(&mut policy)?;
    Ok(policy)
}

/// What `maskkv` keeps when each row of a pass has so many votes.
fn planned(
    model: &Qwen3,
    policy: &PolicyConfig,
    spans: &Spans,
    pass: &[Layer],
    voters: &[usize],
) -> Result<Plan> {
    let (cpu, policy): (_, Policy<Cpu>) = (Cpu::new(), policy.build()?);
    let sequence = Sequence { spans: Some(spans), ..(TOKENS as u32).into() };
    let mut planner = Planner::new(&cpu, &policy, model.geometry(), few(), &[sequence])?;
    for (layer, &shape) in pass.iter().zip(model.geometry().layers()) {
        let nothing = vec![0f32; shape.kv_heads() * TOKENS * shape.head_dim()];
        let (heads, dim) = (shape.kv_heads() as u32, shape.head_dim() as u32);
        let rows = Rows::heads_first(HostSlice::F32(&nothing), heads, TOKENS as u32, dim)?;
        let votes = layer.votes(voters).into_iter();
        let scores: Ragged<f32> = votes
            .map(|head| head.into_iter().map(|vote| vote as f32).collect::<Vec<_>>())
            .collect();
        let view = LayerView::new(shape, TOKENS as u32, rows, rows)?;
        planner.push_scored(&[view], cpu.upload(scores)?)?;
    }
    Ok(planner.finish()?.remove(0))
}

/// The plan is that of plain votes by the rows still masked, and by no others; it meets its budget, layer by layer and in sum,
/// and the response stays.
#[test]
fn masks_vote_and_the_response_stays() -> Result<()> {
    let (model, prompt) = (model(6, 4)?, prompt(6, PROMPT));
    let policy = measured_maskkv(&model)?;
    let Layers::Boundary(boundary) = &policy.layers else { panic!("boundary layers") };
    let options = Options { policy: policy.clone(), ..options(few(), 3, 1)? };
    let mut denoiser = Denoiser::new(&model, options, &prompt, MASKS)?;
    denoise(&mut denoiser, &prompt, |number, step, denoiser, seen| {
        let plan = denoiser.plan().expect("a plan");
        plan.check(model.geometry(), &Promise::default())?;
        let heads = model.geometry().slots(1) as usize;
        assert_eq!(plan.slots as usize, heads * (KEEP + MASKS));
        let held: usize = denoiser.caches().flat_map(|c| c.lens()).map(|&n| n as usize).sum();
        assert_eq!(held, heads * (KEEP + MASKS));
        for head in plan.layers.iter().flat_map(|layer| layer.iter()) {
            assert_eq!(head.iter().filter(|p| p.index() >= PROMPT).count(), MASKS);
        }
        // 0.4 equally, the rest by the importance of the ends and of the middle.
        let total: f64 = boundary.importance.iter().sum();
        for (l, layer) in plan.layers.iter().enumerate() {
            let group = if matches!(l, 0 | 3) { [0, 3] } else { [1, 2] };
            let share = group.iter().map(|&l| boundary.importance[l]).sum::<f64>() / total / 2.0;
            let expected = (heads * KEEP) as f64 * (0.4 / 4.0 + 0.6 * share);
            let got = layer.total() as f64 - (MASKS * layer.rows()) as f64;
            assert!((got - expected).abs() <= 1.0, "layer {l}: {got}, {expected}");
        }
        if step.refresh.select {
            let position = |row: &u32| PROMPT + *row as usize;
            let masks: Vec<usize> = step.masks.iter().map(position).collect();
            let spans: Spans = format!("prompt:0..{PROMPT},mask:{PROMPT}..{TOKENS}").parse()?;
            let (_, pass) = plain(&model, seen, None)?;
            let plan_of = |voters: &[usize]| planned(&model, &policy, &spans, &pass, voters);
            assert_eq!(plan.layers, plan_of(&masks)?.layers, "step {number}");
            let response: Vec<usize> = (PROMPT..TOKENS).collect();
            assert_eq!(
                plan.layers == plan_of(&response)?.layers,
                masks == response,
                "step {number}"
            );
        }
        Ok(())
    })
}

/// At the same memory: the mean error of logits on the dense model's path, of eight models with a prompt each.
#[test]
fn masks_know_better_than_noise() -> Result<()> {
    let names = ["maskkv", "streaming", "random"];
    let mut errors = [const { Vec::new() }; 3];
    for seed in 0..8 {
        let (model, prompt) = (model(seed, 4)?, prompt(seed, 96));
        let dense = Dense::run(&model, &prompt, 16)?;
        for (name, errors) in names.iter().zip(&mut errors) {
            let mut policy = match *name {
                "maskkv" => measured_maskkv(&model)?,
                name => preset(name)?,
            };
            policy.set("protect_spans", "mask,decoded")?;
            let budget = Budget::TokensPerHead(16 + 16);
            let refresh = RefreshPolicy::new(50, 1)?;
            let followed = dense.follow(&model, Options { policy, budget, refresh, mask: MASK })?;
            assert_eq!((followed.errors.len(), followed.rows), (15, 16.0 + 96.0 / 16.0));
            errors.push(followed.mean_error());
        }
    }
    println!("{names:?}: {errors:.3?}");
    let [maskkv, others @ ..] = &errors;
    for other in others {
        assert!(maskkv.iter().zip(other).all(|(m, o)| *m < 0.8 * o), "{names:?}: {errors:.3?}");
    }
    Ok(())
}

/// The model's attention is peaked enough for eviction to mean something: a sixth of the prompt has most of what masks pay to it.
#[test]
fn the_random_model_looks_at_something() -> Result<()> {
    for seed in 0..8 {
        let (model, prompt) = (model(seed, 4)?, prompt(seed, 96));
        let (_, pass) = plain(&model, &[prompt, vec![MASK; 16]].concat(), None)?;
        let rows = (96..112).flat_map(|row| pass.iter().flat_map(move |layer| layer.votes(&[row])));
        let (mut best, mut all) = (0.0, 0.0);
        for mut votes in rows {
            votes.truncate(96);
            votes.sort_by(|a, b| b.total_cmp(a));
            best += votes[..16].iter().sum::<f64>();
            all += votes.iter().sum::<f64>();
        }
        println!("seed {seed}: {:.2}", best / all);
        assert!(best / all > 0.6, "seed {seed}: {}", best / all);
    }
    Ok(())
}

#[test]
fn mistakes_are_named() -> Result<()> {
    let (model, prompt) = (model(9, 1)?, prompt(9, PROMPT));
    let error = |options: Options, prompt: &[u32], masks: usize| {
        let denoiser = Denoiser::new(&model, options, prompt, masks);
        denoiser.and_then(|mut denoiser| denoiser.step()).err().expect("a mistake").to_string()
    };
    assert!(error(dense_options()?, &[], MASKS).contains("0 and 8"));
    assert!(error(dense_options()?, &prompt, 0).contains("40 and 0"));
    let tight = options(Budget::TokensPerHead(MASKS as u64 - 1), 1, 1)?;
    assert!(error(tight, &prompt, MASKS).contains("14 slots has no room for the 16"));
    let policy = preset("random")?;
    let unprotected = Options { policy, ..options(few(), 1, 1)? };
    assert!(error(unprotected, &prompt, MASKS).contains("protect its spans"));
    let long = model::prompt(0, 2000);
    assert!(error(dense_options()?, &long, MASKS).contains("context of 1024"));

    let mut denoiser = Denoiser::new(&model, dense_options()?, &prompt, 1)?;
    let step = denoiser.step()?;
    let (row, token) = denoiser.surest(&step, 9)?[0];
    assert!(denoiser.write(row, MASK).is_err() && denoiser.write(1, token).is_err());
    denoiser.write(row, token)?;
    assert!(denoiser.write(row, token).is_err());
    assert!(denoiser.step().err().expect("nothing to do").to_string().contains("masked"));
    Ok(())
}
