//! Planning on the device: a deferred planner waits for nothing, and caches are cut by what it lends.

use kvbudget::backend::Backend;
use kvbudget::backend::cuda::cache::FlatCache;
use kvbudget::backend::cuda::{Cuda, DeviceLayer};
use kvbudget::{
    Budget, Dtype, Error, Geometry, LayerId, Plan, Planner, Policy, Position, Ragged, Result,
    preset,
};

use crate::device::Gpu;
use crate::reference::Layer;

const TOKENS: u32 = 300;

fn geometry(view: &DeviceLayer<'_>, layers: usize) -> Geometry {
    Geometry::new(vec![view.shape(); layers], Dtype::BF16).expect("a geometry")
}

fn eager(cuda: &Cuda, policy: &Policy<Cuda>, views: &[DeviceLayer<'_>]) -> Result<Plan> {
    let (geometry, budget) = (geometry(&views[0], views.len()), Budget::keep(1, 5)?);
    let mut planner = Planner::new(cuda, policy, &geometry, budget, &[TOKENS])?;
    for view in views {
        planner.push(std::slice::from_ref(view))?;
    }
    Ok(planner.finish()?.remove(0))
}

/// Slots of a layer's heads as a selection has them.
fn slots(cuda: &Cuda, planner: &Planner<'_, Cuda>, layer: LayerId) -> Ragged<Position> {
    let (selection, first) = planner.selected(0, layer).expect("a settled layer");
    let all = cuda.selection_to_host(selection).expect("a selection");
    let heads = first..first + crate::reference::HEADS as usize;
    heads.map(|s| all.row(s).iter().map(|&slot| Position(slot)).collect()).collect()
}

#[test]
fn pushes_leave_everything_on_the_device() {
    let gpu = Gpu::new();
    let layers = [Layer::new(&gpu.cuda, TOKENS, 128), Layer::new(&gpu.cuda, TOKENS, 128)];
    let views = [layers[0].view(true), layers[1].view(false)];
    // Two stages, mass thresholds and what layers prefer take numbers from the device.
    let presets = [
        ("snapkv", false),
        ("ada-snapkv", false),
        ("tova", false),
        ("keydiff", false),
        ("ada-criticalkv", true),
        ("cake", true),
        ("layer-defensivekv", true),
    ];
    for (name, waits) in presets {
        let policy: Policy<Cuda> = preset(name).and_then(|config| config.build()).expect(name);
        let plan = eager(&gpu.cuda, &policy, &views).expect(name);

        let (geometry, budget) = (geometry(&views[0], 2), Budget::keep(1, 5).expect("a fifth"));
        let planner = Planner::new(&gpu.cuda, &policy, &geometry, budget, &[TOKENS]);
        let mut planner = planner.and_then(Planner::deferred).expect(name);
        simcuda::clear_counters(gpu.ordinal);
        for view in &views {
            planner.push(std::slice::from_ref(view)).expect(name);
        }
        assert_eq!(simcuda::waits(gpu.ordinal) > 0, waits, "{name}");
        for (layer, view) in [LayerId(0), LayerId(1)].into_iter().zip(&views) {
            assert!(planner.held(0, layer).is_none(), "{name}: nothing has been read");
            let kept = slots(&gpu.cuda, &planner, layer);
            assert_eq!(kept, plan.layers[layer.index()], "{name}");
            let (selection, first) = planner.selected(0, layer).expect("a settled layer");
            let room: Vec<u32> = kept.lens().map(|n| n as u32).collect();
            let cache = FlatCache::gather_selected(&gpu.cuda, view, selection, first, &room);
            let cache = cache.expect("room for it");
            cache.check().expect("exactly the room");
            let held = cache.read().expect("a cache").positions().to_vec();
            assert_eq!(held, kept.iter().map(<[_]>::to_vec).collect::<Vec<_>>(), "{name}");
        }
        assert_eq!(planner.finish().expect(name).remove(0), plan, "{name}");
    }
}

#[test]
fn nan_are_an_error_at_the_end() {
    let gpu = Gpu::new();
    let layer = Layer::new(&gpu.cuda, TOKENS, 128);
    let view = layer.view(false);
    let policy: Policy<Cuda> = preset("snapkv").and_then(|c| c.build()).unwrap();
    let (geometry, budget) = (geometry(&view, 1), Budget::keep(1, 5).unwrap());
    let planner = Planner::new(&gpu.cuda, &policy, &geometry, budget, &[TOKENS]);
    let mut planner = planner.and_then(Planner::deferred).unwrap();
    let mut rows = vec![vec![1.0; TOKENS as usize]; crate::reference::HEADS as usize];
    rows[3][5] = f32::NAN;
    let scores = gpu.cuda.upload(rows.into_iter().collect()).unwrap();
    planner.push_scored(&[view], scores).unwrap();
    let error = planner.finish().unwrap_err();
    assert!(matches!(error, Error::NanScores { layer: LayerId(0), count: 1 }), "{error}");
}
