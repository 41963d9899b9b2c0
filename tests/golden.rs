//! Reference modes, and ExpectedAttention, against the published codes: the vectors of `tests/golden/`, generated there.
//!
//! Kept positions must be equal; the vectors have no ties at a cut (`min_gap` says how far from one).
//! Scores of the scorers that the published code exposes are compared as well.

use std::collections::BTreeMap;
use std::path::Path;

use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::{
    Budget, Dtype, ExpectedQueries, Geometry, LayerId, LayerShape, LayerView, Pairs, Planner,
    Policy, Position, QueryMoments, Reference, Rope, Rows, preset, reference,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// Tensors of a golden input, by name.
struct Input(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Input {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(folder().join(name)).expect("golden file");
        let tensors = SafeTensors::deserialize(&bytes).expect("golden file is safetensors");
        let read = |view: &safetensors::tensor::TensorView<'_>| {
            let data = view.data();
            data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        Self(
            tensors
                .tensors()
                .iter()
                .map(|(name, view)| (name.clone(), (view.shape().to_vec(), read(view))))
                .collect(),
        )
    }

    fn rows(&self, name: &str) -> Rows<'_, HostSlice<'_>> {
        let (shape, data) = &self.0[name];
        let dims: Vec<u32> = shape.iter().map(|&n| n as u32).collect();
        let (heads, len, dim) = match dims[..] {
            [heads, len, dim] => (heads, len, dim),
            [len, dim] => (1, len, dim),
            _ => panic!("{name}: {shape:?}"),
        };
        Rows::heads_first(HostSlice::F32(data), heads, len, dim).expect("golden tensor")
    }

    fn layers(&self) -> Vec<LayerView<'_, HostSlice<'_>>> {
        let count = self.0.keys().filter(|name| name.ends_with(".k")).count();
        (0..count)
            .map(|l| {
                let rows = |what: &str| self.rows(&format!("l{l}.{what}"));
                let (q, k) = (rows("q"), rows("k"));
                let shape =
                    LayerShape::new(q.heads() as u32, k.heads() as u32, k.dim() as u32).unwrap();
                LayerView::new(shape, k.len(0) as u32, k, rows("v"))
                    .and_then(|view| view.with_queries(q))
                    .and_then(|view| view.with_output_projection(rows("o_proj")))
                    .expect("golden layer")
            })
            .collect()
    }
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn preset_of(policy: &str) -> &str {
    match policy {
        "adakv" => "ada-snapkv",
        "adapyramid" => "ada-pyramidkv",
        "criticaladakv" => "ada-criticalkv",
        "layerdefensivekv" => "layer-defensivekv",
        other => other,
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Runs one case; the kept positions by layer and head.
fn run(mode: Reference, case: &Value, input: &Input) -> (Vec<Vec<Vec<u64>>>, Policy<Cpu>) {
    let mut config = reference(mode, preset_of(case["policy"].as_str().unwrap())).unwrap();
    for (key, value) in case["set"].as_object().unwrap() {
        match (key.as_str(), text(value)) {
            // Names the inner press, which every wrapper here shares.
            ("scorer", name) => assert_eq!(name, "snapkv"),
            ("skip", skip) => assert_eq!(skip, "0"),
            // DefensiveKV reduces by maximum, always; its scorer has no such parameter.
            ("group" | "pooling", _) if mode == Reference::DefensiveKv => {}
            ("sinks", n) if case["policy"] == "lagkv" => config.set("lag_sinks", &n).unwrap(),
            (key, value) => config.set(key, &value).unwrap_or_else(|e| panic!("{case}: {e}")),
        }
    }
    let budget = match case.get("keep") {
        Some(keep) => Budget::keep(keep[0].as_u64().unwrap(), keep[1].as_u64().unwrap()).unwrap(),
        None => Budget::TokensPerHead(case["tokens_per_head"].as_u64().unwrap()),
    };
    let layers = input.layers();
    let geometry = Geometry::new(layers.iter().map(|l| l.shape()).collect(), Dtype::F32).unwrap();
    let policy = config.build::<Cpu>().unwrap();
    let cpu = Cpu::new();
    let mut planner =
        Planner::new(&cpu, &policy, &geometry, budget, &[layers[0].tokens()]).unwrap();
    for layer in &layers {
        planner
            .push(std::slice::from_ref(layer))
            .unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
    }
    let plan = planner.finish().unwrap().remove(0);
    let heads = |row: &[Position]| row.iter().map(|p| u64::from(p.0)).collect();
    (plan.layers.iter().map(|l| l.iter().map(heads).collect()).collect(), policy)
}

fn check(name: &str, mode: Reference, expected_cases: usize, left_out: &[&str]) {
    let file = std::fs::read(folder().join(format!("{name}.json"))).expect("golden cases");
    let golden: Value = serde_json::from_slice(&file).expect("golden cases are JSON");
    let stored = Input::read(&format!("{name}-scores.safetensors"));
    let mut inputs = BTreeMap::new();
    let (mut ran, mut scored) = (0, 0);
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        if left_out.contains(&name) {
            continue;
        }
        let file = case["input"].as_str().unwrap();
        let input = inputs.entry(file.to_owned()).or_insert_with(|| Input::read(file));
        let (kept, policy) = run(mode, case, input);
        let expected: Vec<Vec<Vec<u64>>> = serde_json::from_value(case["kept"].clone()).unwrap();
        assert_eq!(kept, expected, "{name}: kept positions");
        scored += compare_scores(case, input, &policy, &stored);
        ran += 1;
    }
    assert_eq!(ran, expected_cases, "cases of {name}");
    if mode != Reference::DefensiveKv {
        assert!(scored > 0, "no scores were compared for {name}");
    }
}

/// Past scores of plain scorers, within 1e-5 of their size; the number of layers compared.
fn compare_scores(case: &Value, input: &Input, policy: &Policy<Cpu>, stored: &Input) -> usize {
    let inner = ["snapkv", "adakv", "adapyramid", "pyramidkv", "tova", "knorm", "keydiff", "lagkv"];
    let Some(name) = case["scores"].as_str() else { return 0 };
    if !inner.contains(&case["policy"].as_str().unwrap()) {
        return 0;
    }
    let layers = input.layers();
    for (l, layer) in layers.iter().enumerate() {
        let scorer = policy.config().scorer.build::<Cpu>();
        let scores = scorer
            .score(&Cpu::new(), LayerId(l as u32), std::slice::from_ref(layer))
            .unwrap()
            .scores;
        let (shape, expected) = &stored.0[&format!("{name}.l{l}")];
        let window = match case["policy"].as_str().unwrap() {
            "tova" => 1,
            _ => case["set"].get("window").map_or(0, |w| w.as_u64().unwrap() as usize),
        };
        let past = layer.tokens() as usize - window;
        for (h, row) in expected.chunks(shape[1]).enumerate() {
            for (t, (&want, &got)) in row.iter().zip(scores.row(h)).take(past).enumerate() {
                let got = if case["policy"] == "tova" { got / shape[0] as f32 } else { got };
                let close = (want - got).abs() <= 1e-6 + 1e-5 * want.abs();
                assert!(close, "{name} layer {l} head {h} slot {t}: {want} published, {got} here");
            }
        }
    }
    layers.len()
}

#[test]
fn kvpress() {
    check("kvpress", Reference::Kvpress, 75, &[]);
}

#[test]
fn adakv() {
    // `skip` (layers that stay uniform) has no counterpart here.
    check("adakv", Reference::AdaKv, 38, &["adakv-layers-skip2"]);
}

#[test]
fn defensivekv() {
    check("defensivekv", Reference::DefensiveKv, 20, &[]);
}

/// kvpress's ExpectedAttention: the statistics of queries before RoPE, the same after RoPE, and the scores.
#[test]
fn expected_attention() {
    let stored = Input::read("expected.safetensors");
    let (q, k, v) = (stored.rows("q"), stored.rows("k"), stored.rows("v"));
    let (tokens, dim) = (q.len(0) as u32, q.dim());
    let shape = LayerShape::new(q.heads() as u32, k.heads() as u32, dim as u32).unwrap();
    let frequencies = stored.0["frequencies"].1.iter().map(|&f| f.into()).collect();
    let rope = Rope::new(frequencies, Pairs::Halves).unwrap();

    let mut moments = QueryMoments::new(shape);
    let past = |data| {
        let (head, row) = (tokens as usize * dim, dim);
        Rows::strided(data, q.heads() as u32, tokens - 4, dim as u32, head, row).unwrap()
    };
    moments.push(&past(HostSlice::F32(&stored.0["q"].1[4 * dim..]))).unwrap();
    let expected = moments.expected(&rope, tokens..tokens + QueryMoments::FUTURE).unwrap();
    let close = |name: &str, got: Vec<f32>| {
        let want = &stored.0[name].1;
        assert_eq!(got.len(), want.len(), "{name}");
        let largest = want.iter().fold(0f32, |a, x| a.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!(
                (got - want).abs() <= 1e-5 * largest,
                "{name} {i}: {want} published, {got} here"
            );
        }
    };
    let all = |of: fn(&ExpectedQueries, usize) -> &[f32]| {
        (0..shape.query_heads()).flat_map(|head| of(&expected, head).to_vec()).collect()
    };
    close("mean", all(ExpectedQueries::mean));
    close("covariance", all(ExpectedQueries::covariance));

    let view = LayerView::new(shape, tokens, k, v).unwrap().with_expected(&expected).unwrap();
    for (name, epsilon) in [("scores", "0"), ("scores-epsilon", "0.02")] {
        let mut config = preset("expected-attention").unwrap();
        config.set("epsilon", epsilon).unwrap();
        let policy = config.build::<Cpu>().unwrap();
        let scores = policy.score(&Cpu::new(), LayerId(0), &[view]).unwrap().scores;
        let want = stored.0[name].1.chunks(tokens as usize);
        for (h, (got, want)) in scores.iter().zip(want).enumerate() {
            // Sinks are protected here, and padded there.
            for (t, (&got, &want)) in got.iter().zip(want).enumerate().skip(4) {
                let near = (got - want).abs() <= 2e-5 * want.abs();
                assert!(near, "{name}, head {h}, slot {t}: {want} published, {got} here");
            }
        }
    }
}

/// The comparison can fail: another parameter gives other positions.
#[test]
fn a_changed_parameter_is_noticed() {
    let file = std::fs::read(folder().join("kvpress.json")).unwrap();
    let golden: Value = serde_json::from_slice(&file).unwrap();
    let mut case = golden["cases"][0].clone();
    case["set"]["kernel"] = 9.into();
    let input = Input::read(case["input"].as_str().unwrap());
    let (kept, _) = run(Reference::Kvpress, &case, &input);
    let expected: Vec<Vec<Vec<u64>>> = serde_json::from_value(case["kept"].clone()).unwrap();
    assert_ne!(kept, expected);
}
