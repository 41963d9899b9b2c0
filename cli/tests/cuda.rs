//! Every preset end to end on the sample of a real model, on the CPU and through the kernels: the same plans.
//!
//! Scores of two devices differ in their last bits, so that where two of them are that close at a cut, another slot may
//! be kept: such swaps are counted, printed, and must be close indeed.

use std::io::Cursor;

use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::cuda::{Cuda, Tensor};
use kvbudget::{
    Budget, Geometry, LayerId, LayerView, PRESETS, Plan, Planner, Policy, PolicyConfig, Position,
    Rows, Storage,
};
use kvbudget_cli::dump::{Dump, Layer};
use kvbudget_cli::policies;

static SAMPLE: &[u8] = include_bytes!("../sample/smollm2.safetensors");
/// Relative distance of scores that two devices may order differently: sums of hundreds of f32 terms.
const CLOSE: f32 = 1e-4;

/// The last tokens of the sample's layers, as a sequence of their own: rows of its heads.
struct Sequence {
    tokens: u32,
    starts: Vec<u64>,
    lens: Vec<u32>,
}

impl Sequence {
    fn last(tokens: u32, layer: &Layer) -> Self {
        let [heads, len, _] = *layer.k.shape() else { panic!("keys have three dimensions") };
        let first = |h| u64::from(h * len + len - tokens);
        Self { tokens, starts: (0..heads).map(first).collect(), lens: vec![tokens; heads as usize] }
    }

    /// `[k, v, q, o_proj]` on any device as a view.
    fn view<'a, S: Storage>(
        &'a self,
        layer: &Layer,
        [k, v, q, o_proj]: [S; 4],
    ) -> LayerView<'a, S> {
        let shape = layer.shape();
        let rows =
            |storage| Rows::ragged(storage, shape.head_dim() as u32, &self.starts, &self.lens);
        let [heads, queries, dim] = *layer.q.shape() else { panic!("as have queries") };
        let [hidden, columns] = *layer.o_proj.as_ref().expect("the sample has one").shape() else {
            panic!("a projection is a matrix")
        };
        let view = || {
            LayerView::new(shape, self.tokens, rows(k)?, rows(v)?)?
                .with_queries(Rows::heads_first(q, heads, queries, dim)?)?
                .with_output_projection(Rows::heads_first(o_proj, 1, hidden, columns)?)
        };
        view().expect("the sample is consistent")
    }
}

fn host(layer: &Layer) -> [HostSlice<'_>; 4] {
    let o_proj = layer.o_proj.as_ref().expect("the sample has one");
    [&layer.k, &layer.v, &layer.q, o_proj].map(|tensor| tensor.slice())
}

fn upload(cuda: &Cuda, layer: &Layer) -> [Tensor; 4] {
    host(layer).map(|slice| {
        let tensor = match slice {
            HostSlice::F32(s) => cuda.tensor(s),
            HostSlice::F16(s) => cuda.tensor(s),
            HostSlice::BF16(s) => cuda.tensor(s),
        };
        tensor.expect("device memory")
    })
}

fn plan<B: Backend>(
    backend: &B,
    config: &PolicyConfig,
    geometry: &Geometry,
    budget: Budget,
    views: &[LayerView<'_, B::Storage<'_>>],
) -> kvbudget::Result<Plan> {
    let policy = config.build()?;
    let mut planner = Planner::new(backend, &policy, geometry, budget, &[views[0].tokens()])?;
    for view in views {
        planner.push(std::slice::from_ref(view))?;
    }
    Ok(planner.finish()?.remove(0))
}

/// Scores of the slots of a layer that one plan keeps and the other does not.
fn swapped(plans: [&Plan; 2], l: usize, scores: &kvbudget::Ragged<f32>) -> Vec<f32> {
    let mut found = Vec::new();
    for (h, scores) in scores.iter().enumerate() {
        let [a, b] = plans.map(|plan| plan.layers[l].row(h));
        let only = |these: &[Position], those: &[Position]| -> Vec<f32> {
            these.iter().filter(|p| !those.contains(p)).map(|p| scores[p.index()]).collect()
        };
        found.extend([only(a, b), only(b, a)].concat());
    }
    found
}

#[test]
fn presets_plan_the_same_on_both_devices() {
    simcuda::install();
    let ordinal = simcuda::device();
    let (cpu, cuda) = (Cpu::new(), Cuda::new(ordinal).expect("a device"));
    let mut dump = Dump::new(Cursor::new(SAMPLE)).expect("the sample");
    let geometry = dump.geometry().clone();
    let layers: Vec<Layer> = (0..geometry.layers().len())
        .map(|l| dump.layer(l, false).expect("a layer of the sample"))
        .collect();
    let on_device: Vec<_> = layers.iter().map(|layer| upload(&cuda, layer)).collect();
    let queries = layers[0].q.shape()[1];

    let (mut plans, mut slots, mut swaps) = (0, 0, 0);
    for name in PRESETS {
        let mut config = policies::config(name, None).expect("a preset");
        // The sample holds the queries of its last tokens only.
        let tokens = if *name == "h2o" { queries } else { dump.tokens() };
        if *name == "reach" {
            config.set("queries", &queries.to_string()).expect("a parameter");
            config.set("gap", "16").expect("a parameter");
        }
        let sequence = Sequence::last(tokens, &layers[0]);
        let on_cpu: Vec<_> = layers.iter().map(|layer| sequence.view(layer, host(layer))).collect();
        let on_cuda: Vec<_> = layers
            .iter()
            .zip(&on_device)
            .map(|(layer, [k, v, q, o])| sequence.view(layer, [k, v, q, o].map(Tensor::lend)))
            .collect();
        for percent in [5, 20] {
            let budget = Budget::keep(percent, 100).expect("a fraction");
            let ours = plan(&cpu, &config, &geometry, budget, &on_cpu).expect(name);
            let theirs = plan(&cuda, &config, &geometry, budget, &on_cuda).expect(name);
            assert_eq!(ours.slots, theirs.slots, "{name} at {percent} %");
            (plans, slots) = (plans + 1, slots + ours.slots);
            for (l, view) in on_cpu.iter().enumerate() {
                if ours.layers[l] == theirs.layers[l] {
                    continue;
                }
                let policy: Policy<Cpu> = config.build().expect("a preset");
                let scored = policy.score(&cpu, LayerId(l as u32), &[*view]).expect(name);
                let scores = scored.weighted.unwrap_or(scored.scores);
                let found = swapped([&ours, &theirs], l, &scores);
                let most = found.iter().copied().fold(f32::MIN, f32::max);
                let least = found.iter().copied().fold(f32::MAX, f32::min);
                let of = format!("{name} at {percent} %, layer {l}: scores {least}..{most}");
                println!("{of} swapped, {} slots", found.len());
                assert!(most - least <= CLOSE * most.abs(), "{of} are apart");
                swaps += found.len();
            }
        }
    }
    println!("{plans} plans of {slots} slots in all; {swaps} slots are in one of two only");
    assert_eq!(plans, 2 * PRESETS.len());
    simcuda::assert_clean(ordinal);
}
