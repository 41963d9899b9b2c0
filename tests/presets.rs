//! Every preset, end to end on random attention: plans keep their promises at every budget, parameters are
//! reachable by name, and the methods do what they are named for.

use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::plan::Promise;
use kvbudget::score::{Needs, Queries, Reconstruction};
use kvbudget::{
    Budget, Dtype, Error, ExpectedQueries, Geometry, INFORMED, LayerId, LayerShape, LayerView,
    PRESETS, Pairs, Plan, Planner, PolicyConfig, Profile, QueryMoments, Ragged, Reference, Result,
    Rope, Rows, Sequence, Span, SpanKind, Spans, preset, profiled, reference,
};

const DIM: u32 = 8;
const HIDDEN: u32 = 24;

/// Rows of the probe.
const PROBE: u32 = 7;

/// Every preset whose needs a [`Model`] meets.
fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().chain(INFORMED).copied()
}

/// Tensors of a small model: queries of all tokens and of a probe, so that every method has what it needs.
struct Model {
    tokens: u32,
    /// `(query heads, kv heads)` of each layer.
    heads: Vec<(u32, u32)>,
    /// `[k, v, q, o_proj]` of each layer.
    layers: Vec<[Vec<f32>; 4]>,
    /// Probe queries of each layer.
    probes: Vec<Vec<f32>>,
    /// Norms of hidden rows, the same for all layers.
    norms: Vec<f32>,
    /// What is expected of the queries to come, by layer.
    expected: Vec<ExpectedQueries>,
    /// Two frames.
    spans: Spans,
}

/// From the queries of all tokens.
fn expected(tokens: u32, &(hq, h): &(u32, u32), q: &[f32]) -> Result<ExpectedQueries> {
    let rope = Rope::with_base(10_000.0, DIM, Pairs::Halves)?;
    let mut moments = QueryMoments::new(LayerShape::new(hq, h, DIM)?);
    moments.push_rotated(&Rows::heads_first(HostSlice::F32(q), hq, tokens, DIM)?, &rope, 0)?;
    moments.expected(&rope, tokens..tokens + QueryMoments::FUTURE)
}

impl Model {
    fn new(tokens: u32, heads: &[(u32, u32)]) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(tokens);
        let mut noise = |n: u32| -> Vec<f32> {
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            (0..n).map(|_| 1.5 * (next() + next() + next())).collect()
        };
        let mut layer = |&(hq, h): &(u32, u32)| {
            let cache = h * tokens * DIM;
            [noise(cache), noise(cache), noise(hq * tokens * DIM), noise(HIDDEN * hq * DIM)]
        };
        let layers: Vec<_> = heads.iter().map(&mut layer).collect();
        let probes = heads.iter().map(|&(hq, _)| noise(hq * PROBE * DIM)).collect();
        let norms = noise(tokens).into_iter().map(|x| 20.0 + x).collect();
        let frames = [tokens / 10..tokens / 2, tokens / 2 + 1..tokens * 9 / 10];
        let frames = frames.into_iter().filter(|frame| !frame.is_empty());
        let spans = frames.map(|positions| Span { kind: SpanKind::Frame, positions }).collect();
        let spans = Spans::new(spans).unwrap();
        let heads = heads.to_vec();
        let expected =
            heads.iter().zip(&layers).map(|(heads, [_, _, q, _])| expected(tokens, heads, q));
        let expected = expected.collect::<Result<_>>().unwrap();
        Self { tokens, heads, layers, probes, norms, expected, spans }
    }

    fn sequence(&self) -> Sequence<'_> {
        Sequence { spans: Some(&self.spans), ..self.tokens.into() }
    }

    fn geometry(&self) -> Geometry {
        let shape = |&(hq, h): &(u32, u32)| LayerShape::new(hq, h, DIM).unwrap();
        Geometry::new(self.heads.iter().map(shape).collect(), Dtype::F32).unwrap()
    }

    fn view(&self, l: usize) -> HostLayer<'_> {
        let ((hq, h), [k, v, q, o]) = (self.heads[l], &self.layers[l]);
        let rows = |data, heads, len, dim| {
            Rows::heads_first(HostSlice::F32(data), heads, len, dim).unwrap()
        };
        let shape = LayerShape::new(hq, h, DIM).unwrap();
        LayerView::new(
            shape,
            self.tokens,
            rows(k, h, self.tokens, DIM),
            rows(v, h, self.tokens, DIM),
        )
        .and_then(|view| view.with_queries(rows(q, hq, self.tokens, DIM)))
        .and_then(|view| view.with_probe(rows(&self.probes[l], hq, PROBE, DIM)))
        .and_then(|view| view.with_output_projection(rows(o, 1, HIDDEN, hq * DIM)))
        .and_then(|view| view.with_hidden_norms(rows(&self.norms, 1, self.tokens, 1)))
        .and_then(|view| view.with_expected(&self.expected[l]))
        .and_then(|view| view.with_spans(&self.spans))
        .unwrap()
    }

    fn plan(&self, config: &PolicyConfig, budget: Budget) -> Result<Plan> {
        let (cpu, geometry, policy) = (Cpu::new(), self.geometry(), config.build::<Cpu>()?);
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[self.sequence()])?;
        for l in 0..self.layers.len() {
            planner.push(&[self.view(l)])?;
        }
        planner.finish().map(|mut plans| plans.remove(0))
    }
}

fn budgets() -> Vec<Budget> {
    ["0%", "1%", "7%", "20%", "50%", "99%", "100%", "5/head", "40/head", "101 slots", "3 kB"]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect()
}

/// The budget is met exactly by every preset, from nothing to everything, on short and long sequences.
#[test]
fn every_preset_meets_every_budget() {
    for (tokens, heads) in [
        (1, vec![(2, 1)]),
        (9, vec![(4, 2), (4, 2)]),
        (33, vec![(3, 3)]),
        (150, vec![(4, 2), (2, 2), (6, 1)]),
    ] {
        let model = Model::new(tokens, &heads);
        let geometry = model.geometry();
        for name in presets() {
            let config = preset(name).unwrap();
            for budget in budgets() {
                let plan = model
                    .plan(&config, budget)
                    .unwrap_or_else(|e| panic!("{name} {budget} T={tokens}: {e}"));
                let slots = budget.resolve(&geometry, tokens.into());
                let unit = config.align.unit;
                if unit == 1 {
                    assert_eq!(plan.slots, slots, "{name} {budget} T={tokens}");
                }
                let mean = slots / geometry.heads() as u64;
                let protected = config.protect.for_budget(mean).positions(tokens);
                let promise =
                    Promise { budget: Some(budget), protected, unit, ..Promise::default() };
                plan.check(&geometry, &promise)
                    .unwrap_or_else(|e| panic!("{name} {budget} T={tokens}: {e}"));
            }
        }
    }
}

/// Scores are the same at every budget: planners that share them plan what planners of their own do.
#[test]
fn one_scoring_serves_every_budget() {
    let model = Model::new(150, &[(4, 2), (2, 2), (6, 1)]);
    let (cpu, geometry) = (Cpu::new(), model.geometry());
    for name in presets() {
        let config = preset(name).unwrap();
        let policy = config.build::<Cpu>().unwrap();
        let planner = |budget| Planner::new(&cpu, &policy, &geometry, budget, &[model.sequence()]);
        let mut planners: Vec<_> = budgets().into_iter().map(|b| planner(b).unwrap()).collect();
        for l in 0..model.layers.len() {
            let view = [model.view(l)];
            let scored = policy.score(&cpu, LayerId(l as u32), &view).unwrap();
            for planner in &mut planners {
                planner.push_scored(&view, scored.clone()).unwrap();
            }
        }
        for (planner, budget) in planners.into_iter().zip(budgets()) {
            let shared = planner.finish().unwrap().remove(0);
            assert_eq!(shared, model.plan(&config, budget).unwrap(), "{name} {budget}");
        }
    }
}

/// Chunks and pages for every preset: kept or freed whole, within the budget.
#[test]
fn every_preset_can_keep_whole_pages() {
    let model = Model::new(150, &[(4, 2), (4, 2)]);
    for name in presets() {
        let mut config = preset(name).unwrap();
        config.set("unit", "16").unwrap();
        for budget in budgets() {
            let plan = model.plan(&config, budget).unwrap();
            let promise = Promise { unit: 16, ..Promise::default() };
            plan.check(&model.geometry(), &promise)
                .unwrap_or_else(|e| panic!("{name} {budget}: {e}"));
        }
    }
}

/// ChunkKV: every head of a layer keeps the same chunks.
#[test]
fn shared_chunks_are_the_same_for_all_heads() {
    let model = Model::new(150, &[(4, 2), (4, 2)]);
    let mut config = preset("snapkv").unwrap();
    config.set("unit", "10").unwrap();
    config.set("share_heads", "true").unwrap();
    let plan = model.plan(&config, "40%".parse().unwrap()).unwrap();
    for layer in &plan.layers {
        assert_eq!(layer.row(0), layer.row(1));
        assert!(layer.len(0) > 32);
    }
    config.set("share_heads", "false").unwrap();
    let plan = model.plan(&config, "40%".parse().unwrap()).unwrap();
    assert!(plan.layers.iter().any(|layer| layer.row(0) != layer.row(1)));
}

#[test]
fn streaming_keeps_sinks_and_the_newest() {
    let model = Model::new(100, &[(2, 1), (2, 1)]);
    let plan = model.plan(&preset("streaming").unwrap(), Budget::TokensPerHead(10)).unwrap();
    let kept: Vec<u32> = plan.layers[1].row(0).iter().map(|p| p.0).collect();
    assert_eq!(kept, [0, 1, 2, 3, 94, 95, 96, 97, 98, 99]);
}

#[test]
fn h2o_keeps_half_of_its_budget_for_recent_tokens() {
    let model = Model::new(100, &[(2, 1)]);
    let plan = model.plan(&preset("h2o").unwrap(), Budget::TokensPerHead(40)).unwrap();
    let kept: Vec<u32> = plan.layers[0].row(0).iter().map(|p| p.0).collect();
    assert!(kept[20..].iter().copied().eq(80..100), "{kept:?}");
}

/// Ada and global budgets differ by head, equal ones do not; pyramids fall with depth and still sum up.
#[test]
fn allocations_have_their_shapes() {
    let model = Model::new(200, &[(4, 2), (4, 2), (4, 2), (4, 2)]);
    let budget: Budget = "30%".parse().unwrap();
    let lens = |name: &str| -> Vec<usize> {
        let mut config = preset(name).unwrap();
        if name == "layer-defensivekv" {
            // Attention is nearly flat here: with 0.9 the first sets would use up equal shares.
            config.set("threshold", "0.2").unwrap();
        }
        let plan = model.plan(&config, budget).unwrap();
        plan.layers.iter().flat_map(|l| l.lens().collect::<Vec<_>>()).collect()
    };
    assert_eq!(lens("snapkv"), vec![60; 8]);
    let pyramid = lens("pyramidkv");
    assert!(pyramid.is_sorted_by(|a, b| a >= b) && pyramid[0] > pyramid[7] + 20, "{pyramid:?}");
    assert_eq!(pyramid.iter().sum::<usize>(), 480);
    let ada = lens("ada-snapkv");
    assert!(ada.chunks(2).all(|layer| layer[0] + layer[1] == 120) && ada[0] != ada[1], "{ada:?}");
    let global = lens("layer-defensivekv");
    assert!(global.chunks(2).any(|layer| layer[0] + layer[1] != 120), "{global:?}");
    assert_eq!(global.iter().sum::<usize>(), 480);
}

/// Explicit weights share the budget in proportion.
#[test]
fn weights_are_followed() {
    let model = Model::new(100, &[(2, 2), (2, 2)]);
    let mut config = preset("knorm").unwrap();
    config.set("layer_weights", "3, 1").unwrap();
    config.set("head_weights", "1,1;4,1").unwrap();
    let plan = model.plan(&config, Budget::Slots(100)).unwrap();
    let lens: Vec<usize> = plan.layers.iter().flat_map(|l| l.lens().collect::<Vec<_>>()).collect();
    assert_eq!(lens, [38, 37, 20, 5]);
    config.set("layer_weights", "1").unwrap();
    assert!(matches!(model.plan(&config, Budget::Slots(100)), Err(Error::Shape { .. })));
    config.set("layer_weights", "1,-1").unwrap();
    assert!(matches!(model.plan(&config, Budget::Slots(100)), Err(Error::Parameter { .. })));
}

/// Every parameter that a preset lists can be set to the value it has, and unknown ones are answered with the list.
#[test]
fn parameters_are_reached_by_name() {
    let model = Model::new(150, &[(4, 2), (4, 2)]);
    let budget: Budget = "30%".parse().unwrap();
    for name in presets() {
        let original = preset(name).unwrap();
        let mut config = original.clone();
        for (key, value) in original.parameters() {
            config.set(key, &value).unwrap_or_else(|e| panic!("{name} {key}={value}: {e}"));
            let error = config.set(key, "…").unwrap_err().to_string();
            assert!(error.contains('…'), "{name} {key}: {error}");
        }
        assert_eq!(model.plan(&config, budget), model.plan(&original, budget), "{name}");
        let error = config.set("windw", "1").unwrap_err().to_string();
        for (key, _) in original.parameters() {
            assert!(error.contains(key), "{error}");
        }
    }
    let error = preset("snapkw").unwrap_err().to_string();
    assert!(presets().all(|name| error.contains(name)), "{error}");
}

/// Parameters change plans: none is read and dropped.
#[test]
fn parameters_matter() {
    let model = Model::new(300, &[(4, 2), (4, 2)]);
    let changes = [
        ("snapkv", "window", "8"),
        ("snapkv", "kernel", "1"),
        ("snapkv", "pooling", "avg"),
        ("snapkv", "group", "max"),
        ("snapkv", "sinks", "9"),
        ("snapkv", "ranges", "100..110"),
        ("pyramidkv", "beta", "2"),
        ("ada-snapkv", "alpha", "1"),
        ("ada-snapkv", "form", "blend"),
        ("criticalkv", "first_stage", "0"),
        ("criticalkv", "epsilon", "10"),
        ("criticalkv", "value_norm", "l2"),
        ("defensivekv", "threshold", "0.3"),
        ("defensivekv", "kernel", "1"),
        ("layer-defensivekv", "norm_scale", "none"),
        ("layer-defensivekv", "value_norm", "l2"),
        ("cake", "window", "8"),
        ("cake", "kernel", "1"),
        ("cake", "gamma", "0"),
        ("cake", "tau1", "0.3"),
        ("cake", "tau2", "2"),
        ("andpro", "window", "8"),
        ("andpro", "sinks", "9"),
        ("andpro", "kernel", "1"),
        ("andpro", "anchor", "full"),
        ("andpro", "normalise", "true"),
        ("andpro", "unit", "1"),
        ("reach", "value_norm", "l2"),
        ("lagkv", "lag", "16"),
        ("lagkv", "lag_sinks", "40"),
        ("h2o", "recent_share", "0.9"),
        ("guikv", "window", "20"),
        ("guikv", "kernel", "1"),
        ("guikv", "saliency", "50"),
        ("guikv", "temperature", "0.1"),
        ("guikv", "rank", "1"),
        ("guikv", "subspace", "first"),
        ("guikv", "subspace", "pivoted"),
        ("random", "seed", "1"),
        ("epicache", "rows", "mean"),
        ("epicache", "group", "mean"),
        ("epicache", "alpha", "1"),
        ("epicache", "similarity", "0.9,0.5"),
        ("maskkv", "rows", "max"),
    ];
    let budget: Budget = "30%".parse().unwrap();
    for (name, key, value) in changes {
        let mut config = preset(name).unwrap();
        if name.contains("defensive") {
            // Attention is nearly flat here: with 0.9 the first sets would use up equal shares.
            config.set("threshold", "0.2").unwrap();
        }
        if name == "guikv" {
            // A subspace of all 8 directions leaves nothing to tell slots apart by.
            config.set("rank", "3").unwrap();
        }
        let before = model.plan(&config, budget).unwrap();
        config.set(key, value).unwrap();
        let after = model.plan(&config, budget).unwrap();
        assert_ne!(before.layers, after.layers, "{name} {key}={value} changed nothing");
    }
}

/// Nothing was seen: nothing is kept, and nothing is indexed.
#[test]
fn sequences_of_no_tokens_keep_nothing() {
    let model = Model::new(0, &[(4, 2)]);
    for name in presets() {
        let plan = model.plan(&preset(name).unwrap(), Budget::Slots(4));
        assert_eq!(plan.unwrap_or_else(|e| panic!("{name}: {e}")).slots, 0, "{name}");
    }
}

/// A batch of sequences of different lengths gets the plans that each would get alone, reference modes included.
#[test]
fn batches_are_independent() {
    let heads = [(4, 2), (2, 2)];
    let models = [Model::new(150, &heads), Model::new(40, &heads), Model::new(97, &heads)];
    let published = Reference::Kvpress.presets().iter().filter(|name| **name == "knorm");
    let configs = presets()
        .map(|name| preset(name).unwrap())
        .chain(published.map(|name| reference(Reference::Kvpress, name).unwrap()));
    for config in configs {
        let budget: Budget = "30%".parse().unwrap();
        let (cpu, geometry, policy) =
            (Cpu::new(), models[0].geometry(), config.build::<Cpu>().unwrap());
        let sequences = models.each_ref().map(Model::sequence);
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &sequences).unwrap();
        for l in 0..heads.len() {
            planner.push(&models.each_ref().map(|m| m.view(l))).unwrap();
        }
        let alone = models.each_ref().map(|m| m.plan(&config, budget).unwrap());
        assert_eq!(planner.finish().unwrap(), alone, "{}", config.name);
    }
}

/// What a method needs and does not get is named.
#[test]
fn missing_observations_are_named() {
    let model = Model::new(60, &[(4, 2)]);
    let geometry = model.geometry();
    let (view, [.., q, _]) = (model.view(0), &model.layers[0]);
    let bare = LayerView::new(view.shape(), 60, *view.k(), *view.v()).unwrap();
    let window: Vec<f32> = q[..4 * 40 * DIM as usize].to_vec();
    let window = Rows::heads_first(HostSlice::F32(&window), 4, 40, DIM).unwrap();
    let windowed = bare.with_queries(window).unwrap();
    let push = |name: &str, view: HostLayer<'_>| {
        let (cpu, policy) = (Cpu::new(), preset(name).unwrap().build::<Cpu>().unwrap());
        let budget = Budget::TokensPerHead(10);
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[60u32]).unwrap();
        planner.push(&[view]).err()
    };
    assert!(matches!(push("snapkv", bare), Some(Error::Missing { what: "queries (q)", .. })));
    assert!(matches!(
        push("h2o", windowed),
        Some(Error::TooFewQueries { needed: 60, got: 40, .. })
    ));
    assert!(matches!(push("criticalkv", windowed), Some(Error::Missing { .. })));
    assert_eq!(push("knorm", bare), None);
    assert_eq!(push("snapkv", windowed), None);
}

/// Reference modes exist for what was published, and miss the budget where the published code does.
#[test]
fn reference_modes_truncate_as_published() {
    let model = Model::new(100, &[(4, 2)]);
    let config = reference(Reference::Kvpress, "knorm").unwrap();
    // 100 · (1 - 0.9) truncates to 9.
    assert_eq!(model.plan(&config, "10%".parse().unwrap()).unwrap().slots, 2 * 9);
    assert_eq!(model.plan(&preset("knorm").unwrap(), "10%".parse().unwrap()).unwrap().slots, 20);
    let error = reference(Reference::DefensiveKv, "snapkv").unwrap_err().to_string();
    assert!(error.contains("layer-defensivekv"), "{error}");
    assert!(model.plan(&config, Budget::Slots(7)).is_err());
}

/// Reconstruction scores of the first `tokens` of a model: the rest repeats them, in two passes.
fn reconstructed(model: &Model, tokens: u32) -> Vec<Ragged<f32>> {
    let (cpu, dim) = (Cpu::new(), DIM as usize);
    let mut scores = Reconstruction::new(&cpu, &model.geometry(), tokens).unwrap();
    let all = model.tokens as usize;
    // Both passes run behind the context: keys of the context, then those of the pass.
    for pass in [tokens as usize..all - 5, all - 5..all] {
        let len = tokens + pass.len() as u32;
        for (l, ((hq, h), [k, _, q, _])) in model.heads.iter().zip(&model.layers).enumerate() {
            let rows = |data: &[f32], heads: u32, parts: &[std::ops::Range<usize>]| -> Vec<f32> {
                let row = |h: usize, t: usize| &data[(h * all + t) * dim..][..dim];
                let tokens = || parts.iter().flat_map(|part| part.clone());
                (0..heads as usize)
                    .flat_map(|h| tokens().flat_map(move |t| row(h, t)))
                    .copied()
                    .collect()
            };
            let k = rows(k, *h, &[0..tokens as usize, pass.clone()]);
            let q = rows(q, *hq, std::slice::from_ref(&pass));
            let shape = LayerShape::new(*hq, *h, DIM).unwrap();
            let k = Rows::heads_first(HostSlice::F32(&k), *h, len, DIM).unwrap();
            let q = Rows::heads_first(HostSlice::F32(&q), *hq, pass.len() as u32, DIM).unwrap();
            let view = LayerView::new(shape, len, k, k).and_then(|view| view.with_queries(q));
            scores.observe(&cpu, LayerId(l as u32), &view.unwrap()).unwrap();
        }
    }
    scores.into_scores()
}

/// The largest probability that any query of any pass gives a slot, in f64 loops.
#[test]
fn reconstruction_is_the_most_attention_of_the_second_pass() {
    let (model, tokens) = (Model::new(40, &[(4, 2), (3, 3)]), 25usize);
    let scores = reconstructed(&model, tokens as u32);
    let (all, dim) = (model.tokens as usize, DIM as usize);
    for (((hq, h), [k, _, q, _]), scores) in model.heads.iter().zip(&model.layers).zip(&scores) {
        let group = (hq / h) as usize;
        let row = |x: &'_ [f32], h: usize, t: usize| -> Vec<f64> {
            x[(h * all + t) * dim..][..dim].iter().map(|&x| f64::from(x)).collect()
        };
        for head in 0..*h as usize {
            let mut want = vec![0f64; tokens];
            for pass in [tokens..all - 5, all - 5..all] {
                for (g, at) in (0..group).flat_map(|g| pass.clone().map(move |at| (g, at))) {
                    let q = row(q, head * group + g, at);
                    let seen: Vec<usize> = (0..tokens).chain(pass.start..at + 1).collect();
                    let logit = |&t: &usize| {
                        let dot: f64 = q.iter().zip(row(k, head, t)).map(|(a, b)| a * b).sum();
                        (dot / f64::from(DIM).sqrt()).exp()
                    };
                    let sum: f64 = seen.iter().map(logit).sum();
                    for (t, want) in want.iter_mut().enumerate() {
                        *want = want.max(logit(&t) / sum);
                    }
                }
            }
            for (got, want) in scores.row(head).iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
            }
        }
    }
}

/// Plans by scores that came from elsewhere; a profile made of them gives every head what they gave.
#[test]
fn a_profile_gives_heads_what_was_measured() {
    let (model, tokens) = (Model::new(150, &[(4, 2), (4, 2)]), 100);
    let scores = reconstructed(&model, tokens);
    let (cpu, geometry) = (Cpu::new(), model.geometry());
    let context = Model { tokens, ..Model::new(tokens, &[(4, 2), (4, 2)]) };
    let config = preset("reconstruct").unwrap();
    let policy = config.build::<Cpu>().unwrap();
    assert!(policy.needs().second_pass);
    let measured: Vec<Plan> = ["10%", "50%"]
        .iter()
        .map(|budget| {
            let budget = budget.parse().unwrap();
            let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[tokens]).unwrap();
            // Without scores there is nothing to go by, and with those of another shape neither.
            let refused = planner.push(&[context.view(0)]).unwrap_err();
            assert!(matches!(refused, Error::Missing { method: "reconstruct", .. }), "{refused}");
            let other = cpu.zeros(&[tokens, tokens - 1]).unwrap();
            let refused = planner.push_scored(&[context.view(0)], other).unwrap_err();
            assert!(matches!(refused, Error::Shape { got: 99, .. }), "{refused}");
            for (l, scores) in scores.iter().enumerate() {
                planner.push_scored(&[context.view(l)], scores.clone()).unwrap();
            }
            planner.finish().unwrap().remove(0)
        })
        .collect();
    let shares = |plan: &Plan| -> Vec<usize> {
        (0..2).flat_map(|l| plan.head_budgets(LayerId(l)).collect::<Vec<_>>()).collect()
    };
    assert_ne!(shares(&measured[0]), [10; 4], "heads differ");
    let mut config = profiled(Profile::of_plans("random", &measured).unwrap());
    // Nothing comes first but the last token.
    for (key, value) in [("threshold", "0"), ("recent", "1"), ("sinks", "0")] {
        config.set(key, value).unwrap();
    }
    for plan in &measured {
        let got = context.plan(&config, plan.budget).unwrap();
        assert_eq!(shares(&got), shares(plan), "{}", plan.budget);
    }
    let other = Model::new(100, &[(4, 2)]);
    let refused = other.plan(&config, Budget::keep(1, 2).unwrap()).unwrap_err();
    assert!(matches!(refused, Error::Shape { expected: 1, got: 2, .. }), "{refused}");
}

/// What a policy says it needs is what it asks of the views.
#[test]
fn needs_are_what_is_asked_for() {
    let tokens = 300; // More than any window.
    let model = Model::new(tokens, &[(4, 2)]);
    let bare = |needs: kvbudget::score::Needs| {
        let view = model.view(0);
        let (k, v, q) = (*view.k(), *view.v(), view.q("test").unwrap().storage());
        let mut bare = LayerView::new(view.shape(), tokens, k, v).unwrap();
        let rows = match needs.queries {
            Queries::None => 0,
            Queries::Last(n) => n,
            Queries::All => tokens,
        };
        if rows > 0 {
            // Not the last ones: which they are is the engine's to know.
            let stride = (tokens * DIM) as usize;
            let q = Rows::strided(q, 4, rows, DIM, stride, DIM as usize).unwrap();
            bare = bare.with_queries(q).unwrap();
        }
        if needs.probe {
            bare = bare.with_probe(*view.probe("test").unwrap()).unwrap();
        }
        if needs.o_proj {
            bare = bare.with_output_projection(*view.o_proj("test").unwrap()).unwrap();
        }
        if needs.hidden_norms {
            bare = bare.with_hidden_norms(*view.hidden_norms("test").unwrap()).unwrap();
        }
        if needs.expected_queries {
            bare = bare.with_expected(&model.expected[0]).unwrap();
        }
        if needs.spans {
            bare = bare.with_spans(&model.spans).unwrap();
        }
        bare
    };
    for name in presets() {
        let policy = preset(name).unwrap().build::<Cpu>().unwrap();
        let (cpu, geometry) = (Cpu::new(), model.geometry());
        let half = Budget::keep(1, 2).unwrap();
        let push = |needs: Needs| {
            let spans = needs.spans.then_some(&model.spans);
            let sequence = Sequence { spans, ..tokens.into() };
            let mut planner = Planner::new(&cpu, &policy, &geometry, half, &[sequence]).unwrap();
            planner.push(&[bare(needs)]).map(drop)
        };
        let needs = policy.needs();
        push(needs).unwrap_or_else(|e| panic!("{name}: {e}"));
        if needs.queries > Queries::None {
            let fewer = match needs.queries {
                Queries::Last(n) if n > 1 => Queries::Last(n - 1),
                Queries::All => Queries::Last(tokens - 1),
                _ => Queries::None,
            };
            let needs = Needs { queries: fewer, ..needs };
            assert!(push(needs).is_err(), "{name} can do with {fewer:?}");
        }
        if needs.probe {
            let error = push(Needs { probe: false, ..needs }).unwrap_err();
            assert!(error.to_string().contains("q_probe"), "{name}: {error}");
        }
        if needs.o_proj {
            let needs = Needs { o_proj: false, ..needs };
            assert!(push(needs).is_err(), "{name} can do without o_proj");
        }
        if needs.hidden_norms {
            let needs = Needs { hidden_norms: false, ..needs };
            assert!(push(needs).is_err(), "{name} can do without hidden norms");
        }
        if needs.expected_queries {
            let error = push(Needs { expected_queries: false, ..needs }).unwrap_err();
            assert!(error.to_string().contains("expected_mean"), "{name}: {error}");
        }
        if needs.spans {
            let needs = Needs { spans: false, ..needs };
            assert!(push(needs).is_err(), "{name} can do without spans");
        }
    }
}
