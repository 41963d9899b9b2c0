//! A method whose parts go back and forth between host and device: its plans are those of the CPU.

use kvbudget::backend::cpu::Cpu;
use kvbudget::{Budget, Dtype, Geometry, Plan, Planner, Sequence, Spans, preset};
use kvbudget_testkit::data::{Layer, Place, TestDevice, with_layers};
use kvbudget_testkit::generate::Spec;

use crate::device::Gpu;

fn plans<D: TestDevice>(device: &D, layers: &[Layer], spans: &Spans, subspace: &str) -> Vec<Plan> {
    let mut config = preset("guikv").expect("a preset");
    for (key, value) in [("rank", "4"), ("subspace", subspace)] {
        config.set(key, value).expect("a parameter");
    }
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

#[test]
fn plans_are_those_of_the_cpu() {
    let base = Spec {
        tokens: 150,
        queries: 8,
        dtype: Dtype::BF16,
        hidden_norms: Some(Place::HeadsFirst),
        ..Spec::default()
    };
    let layers = [
        Spec { place: Place::TokensFirst, ..base.clone() }.build(),
        Spec { place: Place::Paged { page: 16 }, kept: Some(vec![100, 80]), ..base }.build(),
    ];
    let spans = "frame:4..50,frame:52..90,frame:91..140".parse().expect("spans");
    let gpu = Gpu::new();
    for subspace in ["first", "pivoted", "svd"] {
        let want = plans(&Cpu::new(), &layers, &spans, subspace);
        assert_eq!(plans(&gpu, &layers, &spans, subspace), want, "{subspace}");
    }
}
