//! Methods that are told more than a prefill leaves behind: their plans are those of the CPU.

use kvbudget::backend::cpu::Cpu;
use kvbudget::{Budget, Dtype, Geometry, Plan, Planner, PolicyConfig, Sequence, Spans, preset};
use kvbudget_testkit::data::{Layer, Place, TestDevice, with_layers};
use kvbudget_testkit::generate::Spec;

use crate::device::Gpu;

fn plans<D: TestDevice>(
    device: &D,
    layers: &[Layer],
    spans: &Spans,
    config: &PolicyConfig,
) -> Vec<Plan> {
    let policy = config.build::<D::Backend>().expect("a policy");
    let geometry = Geometry::uniform(1, layers[0].shape, Dtype::BF16).expect("a geometry");
    let held: Vec<_> =
        layers.iter().map(|l| l.positions.as_ref().map(|p| [p.as_slice()])).collect();
    let mut sequences = Vec::new();
    for (layer, held) in layers.iter().zip(&held) {
        let held = held.as_ref().map(|held| held.as_slice());
        sequences.push(Sequence { tokens: layer.tokens, held, spans: Some(spans) });
    }
    let budget = Budget::keep(1, 4).expect("a budget");
    let mut planner =
        Planner::new(device.backend(), &policy, &geometry, budget, &sequences).expect("a planner");
    with_layers(device, layers, |views| planner.push(views)).expect("a layer");
    planner.finish().expect("plans")
}

/// The preset with parameters, over a dense and a compressed sequence.
fn as_on_the_cpu(name: &str, parameters: &[(&str, &str)], spans: &str) {
    let base = Spec {
        tokens: 150,
        queries: 8,
        probe: 5,
        dtype: Dtype::BF16,
        hidden_norms: Some(Place::HeadsFirst),
        expected: true,
        ..Spec::default()
    };
    let layers = [
        Spec { place: Place::TokensFirst, ..base.clone() }.build(),
        Spec { place: Place::Paged { page: 16 }, kept: Some(vec![100, 80]), ..base }.build(),
    ];
    let spans = spans.parse().expect("spans");
    let mut config = preset(name).expect("a preset");
    for (key, value) in parameters {
        config.set(key, value).expect("a parameter");
    }
    let want = plans(&Cpu::new(), &layers, &spans, &config);
    assert_eq!(plans(&Gpu::new(), &layers, &spans, &config), want, "{name} {parameters:?}");
}

#[test]
fn guikv() {
    for subspace in ["first", "pivoted", "svd"] {
        let parameters = [("rank", "4"), ("subspace", subspace)];
        as_on_the_cpu("guikv", &parameters, "frame:4..50,frame:52..90,frame:91..140");
    }
}

#[test]
fn epicache() {
    as_on_the_cpu("epicache", &[], "system:0..10");
}

#[test]
fn maskkv() {
    as_on_the_cpu("maskkv", &[], "mask:120..140,decoded:140..150");
}

#[test]
fn expected_attention() {
    for epsilon in ["0", "0.02"] {
        as_on_the_cpu("expected-attention", &[("epsilon", epsilon)], "");
    }
}
