//! Operations whose order of additions both backends share, or that have none: every bit is the CPU backend's.

use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::cpu::Cpu;
use kvbudget::backend::ops::{NormScale, Positional};
use kvbudget::{Ragged, Result};
use kvbudget_testkit::data::{Floats, Layer, Place, TestDevice, segment_lens, with_layers};
use kvbudget_testkit::generate::{LENGTHS, Rng, Scores, Spec};

use crate::device::Gpu;

/// Lengths around tiles of 1024 as well.
fn lens() -> Vec<u32> {
    LENGTHS.into_iter().chain([1023, 1024, 2049, 5000]).collect()
}

fn rows(kind: Scores, seed: u64) -> Ragged<f32> {
    lens().into_iter().map(|n| kind.row(n, seed + u64::from(n))).collect()
}

/// Bits; which NaN is left open.
fn bits(rows: &Ragged<f32>) -> Vec<Vec<u32>> {
    let plain = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
    rows.iter().map(|row| row.iter().map(plain).collect()).collect()
}

/// A use of a backend that both backends get.
trait Use {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>>;
}

fn same(gpu: &Gpu, what: &str, case: impl Use) {
    fn run<D: TestDevice>(device: &D, case: &impl Use) -> Vec<Vec<u32>> {
        let rows = case.on(device).expect("a valid use");
        bits(&device.backend().to_host(&rows).expect("rows can be read"))
    }
    let (got, want) = (run(gpu, &case), run(&Cpu::new(), &case));
    for (r, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}, row {r}");
        let differs = (0..got.len()).find(|&t| got[t] != want[t]);
        assert_eq!(differs.map(|t| (t, got[t], want[t])), None, "{what}, row {r}");
    }
    assert_eq!(got.len(), want.len(), "{what}");
}

/// Changes `rows` in place, with the help of `other`.
struct InPlace<F>(Ragged<f32>, Ragged<f32>, F);
trait Change {
    fn change<B: Backend>(&self, b: &B, rows: &mut B::Floats, other: &B::Floats) -> Result<()>;
}
impl<F: Change> Use for InPlace<F> {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>> {
        let backend = device.backend();
        let mut rows = backend.upload(self.0.clone())?;
        self.2.change(backend, &mut rows, &backend.upload(self.1.clone())?)?;
        Ok(rows)
    }
}

struct Weigh(f32);
impl Change for Weigh {
    fn change<B: Backend>(&self, b: &B, rows: &mut B::Floats, other: &B::Floats) -> Result<()> {
        b.weigh(self.0, other, rows)
    }
}
struct Raise;
impl Change for Raise {
    fn change<B: Backend>(&self, b: &B, rows: &mut B::Floats, other: &B::Floats) -> Result<()> {
        b.raise(other, rows)
    }
}
struct ShareHeads(Vec<usize>);
impl Change for ShareHeads {
    fn change<B: Backend>(&self, b: &B, rows: &mut B::Floats, _: &B::Floats) -> Result<()> {
        b.share_heads(&self.0, rows)
    }
}

#[test]
fn weigh_and_raise() {
    let gpu = &Gpu::new();
    for kind in Scores::ALL {
        for other in [Scores::Random, Scores::Extremes, Scores::Zeros, Scores::Subnormal] {
            let what = format!("{kind:?}, {other:?}");
            for epsilon in [0.0, 1e-4] {
                same(gpu, &what, InPlace(rows(kind, 1), rows(other, 2), Weigh(epsilon)));
            }
            same(gpu, &what, InPlace(rows(kind, 1), rows(other, 2), Raise));
        }
    }
}

#[test]
fn share_heads() {
    let gpu = &Gpu::new();
    for kind in Scores::ALL {
        let heads = vec![1, 3, 0, 8, 2];
        let lens = [9, 1025, 1025, 1025].into_iter().chain([130; 8]).chain([0, 0]);
        let rows: Ragged<f32> = (0..).zip(lens).map(|(seed, n)| kind.row(n, seed)).collect();
        same(gpu, &format!("{kind:?}"), InPlace(rows, Ragged::default(), ShareHeads(heads)));
    }
}

struct Coarsen(Ragged<f32>, Ragged<Range<u32>>);
impl Use for Coarsen {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>> {
        let backend = device.backend();
        backend.coarsen(&self.1, &backend.upload(self.0.clone())?)
    }
}

#[test]
fn coarsen() {
    let gpu = &Gpu::new();
    for (kind, size) in
        Scores::ALL.into_iter().flat_map(|kind| [1, 20, 513].map(|size| (kind, size)))
    {
        let rng = &mut Rng::new(3);
        // Of different sizes, overlapping, and an empty one.
        let unit = |start: u32, n: u32, rng: &mut Rng| {
            start..(start + rng.below(2 * size + 1) as u32).min(n)
        };
        let of_row = |n: u32, rng: &mut Rng| -> Vec<_> {
            (0..n).step_by(size as usize).map(|start| unit(start, n, rng)).collect()
        };
        let units: Ragged<Range<u32>> = lens().into_iter().map(|n| of_row(n, rng)).collect();
        same(gpu, &format!("{kind:?}, {size}"), Coarsen(rows(kind, 4), units));
    }
}

struct Pick(Ragged<f32>, Ragged<u32>);
impl Use for Pick {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>> {
        let backend = device.backend();
        backend.pick(&self.1, &backend.upload(self.0.clone())?)
    }
}

#[test]
fn pick() {
    let gpu = &Gpu::new();
    for kind in Scores::ALL {
        let rng = &mut Rng::new(5);
        let slots: Ragged<u32> = lens().into_iter().map(|n| rng.choose(n - n / 3, n)).collect();
        same(gpu, &format!("{kind:?}"), Pick(rows(kind, 6), slots));
    }
}

/// A full and a compressed layer; heads of very different lengths.
fn layers() -> Vec<Layer> {
    let base = Spec {
        tokens: 2500,
        kv_heads: 3,
        dim: 4,
        place: Place::Ragged { slack: 0 },
        ..Spec::default()
    };
    vec![base.build(), Spec { kept: Some(vec![1300, 0, 2499]), ..base }.build()]
}

struct Scale(NormScale);
impl Use for Scale {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>> {
        let layers = layers();
        let backend = device.backend();
        let norms = segment_lens(&layers).into_iter().map(|n| Scores::Random.row(n, n.into()));
        let mut norms = backend.upload(norms.collect())?;
        with_layers(device, &layers, |views| backend.scale_norms(self.0, views, &mut norms))?;
        Ok(norms)
    }
}

#[test]
fn scale_by_heads() {
    let gpu = &Gpu::new();
    same(gpu, "heads", Scale(NormScale::Heads));
    same(gpu, "none", Scale(NormScale::None));
}

struct Position(Positional);
impl Use for Position {
    fn on<D: TestDevice>(&self, device: &D) -> Result<Floats<D>> {
        let layers = layers();
        let backend = device.backend();
        let mut out = backend.zeros(&segment_lens(&layers))?;
        with_layers(device, &layers, |views| backend.positional(self.0, views, &mut out))?;
        Ok(out)
    }
}

#[test]
fn positional() {
    let gpu = &Gpu::new();
    same(gpu, "recency", Position(Positional::Recency));
    for (seed, layer) in [(0, 0), (u64::MAX, 79), (7, u32::MAX)] {
        same(gpu, "random", Position(Positional::Random { seed, layer }));
    }
}
