//! The CUDA backend on a GPU, at the reference sizes of `benches/cuda.md`; without one it says so and ends.
//!
//! First the conformance suite of what is timed, then times: of many calls in a row, from the first launch to the moment
//! the device is idle, so what the host does counts where it takes longer. Rates are of the bytes that must be read and
//! written, beside the device's own copy of 1 GiB in the same run; value norms are of the arithmetic.

use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use kvbudget::backend::Backend;
use kvbudget::backend::cuda::cache::FlatCache;
use kvbudget::backend::cuda::{Cuda, DeviceSlice, Tensor};
use kvbudget::backend::ops::{TopK, ValueNorm};
use kvbudget_testkit::data::{Elements, TestDevice};
use kvbudget_testkit::suite;

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/cuda/reference.rs"]
mod reference;

use reference::{DIM, GROUP, HEADS, HIDDEN, Layer, ROW, SCORING, TOKENS};

/// The GPU as the suite wants it.
struct Gpu(Cuda);

impl TestDevice for Gpu {
    type Backend = Cuda;
    type Memory = Tensor;
    fn backend(&self) -> &Cuda {
        &self.0
    }
    fn upload(&self, elements: &Elements) -> Tensor {
        let tensor = match elements {
            Elements::F32(e) => self.0.tensor(e),
            Elements::F16(e) => self.0.tensor(e),
            Elements::BF16(e) => self.0.tensor(e),
        };
        tensor.expect("a tensor can be copied")
    }
    fn lend<'a>(&self, memory: &'a Tensor) -> DeviceSlice<'a> {
        memory.lend()
    }
}

/// Times calls that only ask the device for work.
fn time(
    group: &mut BenchmarkGroup<'_, WallTime>,
    cuda: &Cuda,
    name: &str,
    work: Throughput,
    mut call: impl FnMut(),
) {
    group.throughput(work);
    group.bench_function(name, |b| {
        b.iter_custom(|calls| -> Duration {
            cuda.synchronize().expect("nothing failed before");
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            cuda.synchronize().expect("nothing failed");
            start.elapsed()
        });
    });
}

fn bench(c: &mut Criterion, cuda: &Cuda) {
    let mut group = c.benchmark_group("cuda");
    let mut time = |name: &str, work, call: &mut dyn FnMut()| {
        time(&mut group, cuda, name, work, call);
    };
    let gib: Range<usize> = 0..8;
    let rows = cuda.zeros(&[1 << 25; 8]).expect("1 GiB");
    time("copy", Throughput::Bytes(2 << 30), &mut || {
        cuda.slice(&rows, gib.clone()).expect("another GiB");
    });
    drop(rows);

    let layer = Layer::new(cuda, TOKENS, HIDDEN);
    let slots = u64::from(HEADS * TOKENS);
    let mut out = cuda.zeros(&layer.lens()).expect("room for scores");
    for lse in [true, false] {
        let name = if lse { "window attention, LSE given" } else { "window attention" };
        let views = [layer.view(lse)];
        time(name, Throughput::Bytes(slots * (ROW + 4)), &mut || {
            cuda.window_attention(&SCORING, &views, &mut out, None).expect("scores");
        });
    }
    let views = [layer.view(false)];
    let flops = 2 * slots * u64::from(GROUP * DIM * HIDDEN);
    time("value norms (elements are flops)", Throughput::Elements(flops), &mut || {
        cuda.value_norm(ValueNorm::L1, &views, &mut out).expect("norms");
    });

    let scores = (0..HEADS).map(|h| reference::noise(TOKENS as usize, u64::from(h)).collect());
    let scores = cuda.upload(scores.collect()).expect("room for scores");
    let (contests, protected) = ([layer.contest()], layer.protected());
    let op = TopK { contests: &contests, protected: &protected };
    let budget = contests[0].budget;
    let select = || cuda.top_k(&op, &[(&scores, 0..HEADS as usize)]).expect("a selection");
    time("selection", Throughput::Bytes(slots * 4 + budget * 4), &mut || drop(select()));

    let (selection, capacity) = (select(), layer.lens());
    time("gather, keys and values", Throughput::Bytes(budget * 2 * 2 * ROW), &mut || {
        FlatCache::gather_selected(cuda, &views[0], &selection, 0, &capacity).expect("a cache");
    });

    let mut out = cuda.zeros(&vec![DIM; (HEADS * GROUP) as usize]).expect("room for an output");
    let (op, sequences) = (reference::attention(), [layer.attend()]);
    time("attend, one token", Throughput::Bytes(slots * 2 * ROW), &mut || {
        cuda.attend(&op, &sequences, &mut out, None).expect("an output");
    });
}

fn main() {
    let gpu = match Cuda::new(0) {
        Ok(cuda) => Gpu(cuda),
        Err(error) => {
            println!("no GPU ({error}): nothing verified, nothing timed");
            return;
        }
    };
    let timed = ["window_attention", "value_norm", "top_k", "attend"];
    for (name, case) in suite::cases::<Gpu>() {
        if timed.iter().any(|op| name.starts_with(op)) {
            case(&gpu);
        }
    }
    let mut criterion = Criterion::default().configure_from_args();
    bench(&mut criterion, &gpu.0);
    criterion.final_summary();
}
