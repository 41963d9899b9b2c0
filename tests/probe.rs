//! EpiCache and MaskKV against vectors computed by hand from the papers' formulas, and what their plans promise.

use kvbudget::allocate::Sensitivity;
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::{
    Budget, Dtype, Geometry, LayerId, LayerShape, LayerView, Plan, Planner, PolicyConfig, Ragged,
    Rows, Sequence, Spans, preset,
};

fn rows(data: &[f32], heads: u32, dim: u32) -> Rows<'_, HostSlice<'_>> {
    let len = data.len() as u32 / heads / dim;
    Rows::heads_first(HostSlice::F32(data), heads, len, dim).unwrap()
}

fn near(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).for_each(|(&g, w)| assert!((f64::from(g) - w).abs() < 2e-6, "{got:?}"));
}

/// Scores of one layer of one KV head of dim 2.
fn scores(name: &str, group: u32, keys: &[f32], probe: &[f32]) -> Vec<f32> {
    let shape = LayerShape::new(group, 1, 2).unwrap();
    let k = rows(keys, 1, 2);
    let view = LayerView::new(shape, keys.len() as u32 / 2, k, k).unwrap();
    let view = view.with_probe(rows(probe, group, 2)).unwrap();
    let policy = preset(name).unwrap().build::<Cpu>().unwrap();
    policy.score(&Cpu::new(), LayerId(0), &[view]).unwrap().scores.row(0).to_vec()
}

/// EpiCache: the most that any row of any head of the group pays.
#[test]
fn scores_are_the_worst_case_over_probe_and_group() {
    let keys = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, -1.0, 0.5];
    let probe = [1.0, 0.5, 0.0, 1.0, 0.2, 0.2, 2.0, 0.0, -1.0, 0.0, 0.0, -1.0];
    near(&scores("epicache", 2, &keys, &probe), &[0.434363, 0.312964, 0.434363, 0.505229]);
}

/// MaskKV: the votes of the masks, whose own keys take part in the softmax. Their mean: the paper's sum by two.
#[test]
fn masks_vote() {
    let keys = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5, -1.0, 0.0];
    let got = scores("maskkv", 1, &keys, &[1.0, 1.0, 0.0, 2.0]);
    near(&got[..3], &[0.271311 / 2.0, 0.525358 / 2.0, 0.720401 / 2.0]);
    let prompt: f32 = got[..3].iter().sum();
    near(&[prompt, got.iter().sum()], &[0.758535, 1.0]);
}

/// Plans by scores `[layer][head]` over heads of dim 1; the slots of every head.
fn planned(
    config: &PolicyConfig,
    tokens: u32,
    spans: &Spans,
    budget: Budget,
    scores: &[Vec<Vec<f32>>],
) -> kvbudget::Result<Plan> {
    let (cpu, policy) = (Cpu::new(), config.build::<Cpu>()?);
    let shape = |heads: usize| LayerShape::new(heads as u32, heads as u32, 1);
    let shapes = scores.iter().map(|layer| shape(layer.len())).collect::<kvbudget::Result<_>>()?;
    let geometry = Geometry::new(shapes, Dtype::F32)?;
    let sequence = Sequence { spans: Some(spans), ..tokens.into() };
    let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[sequence])?;
    for layer in scores {
        let k = vec![0.0; layer.len() * tokens as usize];
        let k = rows(&k, layer.len() as u32, 1);
        let view: HostLayer<'_> = LayerView::new(shape(layer.len())?, tokens, k, k)?;
        let scores = cpu.upload(Ragged::from_iter(layer.iter().cloned()))?;
        planner.push_scored(&[view], scores)?;
    }
    Ok(planner.finish()?.remove(0))
}

fn slots(plan: &Plan) -> Vec<usize> {
    (0..plan.layers.len() as u32)
        .flat_map(|l| plan.head_budgets(LayerId(l)).collect::<Vec<_>>())
        .collect()
}

/// Scores that differ slot by slot and sum to `mass` over the first `free` of all.
fn of_mass(mass: f64, free: u32, tokens: u32) -> Vec<f32> {
    let sum = f64::from(free * (free + 1) / 2);
    (0..tokens)
        .map(|t| if t < free { (mass * f64::from(t + 1) / sum) as f32 } else { 0.0 })
        .collect()
}

/// Heads of which the masks pay these parts of their attention to the prompt: 10 % equally, the rest in proportion. The
/// paper rounds down, to 535, 160, 285 and 410 of 1392; here nothing is lost.
#[test]
fn heads_share_by_their_preference_for_the_prompt() {
    let (prompt, tokens) = (900, 903);
    let spans: Spans = "prompt:0..900,mask:900..903".parse().unwrap();
    let config = preset("maskkv").unwrap();
    let heads: Vec<_> = [0.8, 0.2, 0.4, 0.6].map(|mass| of_mass(mass, prompt, tokens)).to_vec();
    let with = |config: &PolicyConfig, per_head| {
        let budget = Budget::TokensPerHead(per_head);
        planned(config, tokens, &spans, budget, std::slice::from_ref(&heads)).unwrap()
    };
    let plan = with(&config, 348 + 3);
    assert_eq!(slots(&plan), [536 + 3, 160 + 3, 285 + 3, 411 + 3]);
    for (head, free) in plan.layers[0].iter().zip([536, 160, 285, 411]) {
        // The best of the prompt, which are its last here, and all masks.
        let kept: Vec<u32> = head.iter().map(|p| p.0).collect();
        assert!(kept.iter().copied().eq(prompt - free..tokens), "{kept:?}");
    }
    let mut uniform = config.clone();
    uniform.set("alpha", "1").unwrap();
    assert_eq!(slots(&with(&uniform, 351)), [351; 4]);
    // A head cannot take more than the prompt: the others get what it leaves.
    assert_eq!(slots(&with(&config, 753)), [903, 434, 772, 903]);
    assert_eq!(slots(&with(&config, 903)), [903; 4]);
}

/// Importance of the ends against the middle, golden budgets of 1024 slots, beside what the masks take.
#[test]
fn layers_share_by_ends_and_middle() {
    let (prompt, tokens) = (700, 702);
    let spans: Spans = "mask:700..702".parse().unwrap();
    let scores = vec![vec![of_mass(1.0, prompt, tokens)]; 4];
    let with = |settings: &[(&str, &str)]| {
        let mut config = preset("maskkv").unwrap();
        for (key, value) in settings {
            config.set(key, value).unwrap();
        }
        let plan = planned(&config, tokens, &spans, Budget::Slots(1024 + 8), &scores).unwrap();
        slots(&plan).into_iter().map(|n| n - 2).collect::<Vec<_>>()
    };
    let importance = ("importance", "0.5,0.1,0.1,0.3");
    assert_eq!(with(&[]), [256; 4]);
    assert_eq!(with(&[importance]), [348, 164, 164, 348]);
    assert_eq!(with(&[importance, ("beta", "1")]), [256; 4]);
    // The first layer alone against the rest has half of all importance.
    assert_eq!(with(&[importance, ("beta", "0"), ("last", "0")]), [512, 171, 171, 170]);
}

/// EpiCache's budgets in the paper's form, of a mean of 8192: a quarter of it for the least, no more than there is for the
/// greatest, and the sum exact where the published code's is not.
#[test]
fn layers_share_by_sensitivity_within_bounds() {
    let with = |tokens: u32, settings: &[(&str, &str)]| {
        let mut config = preset("epicache").unwrap();
        config.set("similarity", "0.95,0.9,0.8,0.99").unwrap();
        for (key, value) in settings {
            config.set(key, value).unwrap();
        }
        let scores = vec![vec![of_mass(1.0, 9, tokens)]; 4];
        let budget = Budget::TokensPerHead(8192);
        slots(&planned(&config, tokens, &Spans::default(), budget, &scores).unwrap())
    };
    assert_eq!(with(24000, &[("sharpness", "1.1"), ("floor", "0")]), [4143, 8881, 19038, 706]);
    assert_eq!(with(24000, &[]), [2048, 5734, 22938, 2048]);
    assert_eq!(with(20000, &[]), [2144, 8576, 20000, 2048]);
    assert_eq!(with(24000, &[("sharpness", "0")]), [8192; 4]);
    assert_eq!(with(8192, &[]), [8192; 4]);
    let published = Sensitivity::published(&[0.95, 0.9, 0.8, 0.99], 8192, 2.0);
    let weights = published.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let scaled = with(40000, &[("layer_weights", &weights)]);
    assert_eq!(scaled.iter().sum::<usize>(), 4 * 8192);
    assert_eq!(published.iter().sum::<u64>(), 35719);
}

/// What spans protect stays in every head at every budget that has room for it; budgets are met to the slot.
#[test]
fn protected_spans_survive() {
    let tokens = 60;
    let spans: Spans = "system:0..5,prompt:5..40,decoded:40..46,mask:46..60".parse().unwrap();
    let noise = |seed: u32| -> Vec<f32> {
        (0..tokens).map(|t| ((t * 37 + seed * 11) % 59) as f32 / 59.0).collect()
    };
    let scores = vec![vec![noise(1), noise(2)], vec![noise(3)], vec![noise(4), noise(5)]];
    for (name, protected) in [("epicache", 0..5), ("maskkv", 40..60)] {
        let mut config = preset(name).unwrap();
        let key = if name == "epicache" { "similarity" } else { "importance" };
        config.set(key, "0.9,0.2,0.5").unwrap();
        for per_head in 0..=62 {
            let budget = Budget::TokensPerHead(per_head);
            let plan = planned(&config, tokens, &spans, budget, &scores).unwrap();
            assert_eq!(plan.slots, 5 * per_head.min(60), "{name} {per_head}");
            for head in plan.layers.iter().flat_map(|layer| layer.iter()) {
                let kept = protected.clone().filter(|t| head.iter().any(|p| p.0 == *t)).count();
                assert!(per_head < 20 || kept == protected.len(), "{name} {per_head}: {head:?}");
            }
        }
    }
}
