//! Decode steps: what they compute, and that nothing in them allocates, copies or waits, which a capture would refuse.

use cudarc::driver::sys::{CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Contest, Pool, Pooling, Reduce, TopK, WindowAttention};
use kvbudget::{Error, Storage};

use super::lent::Blocks;
use super::*;

const GROUP: u32 = 2;
const WINDOW: u32 = 4;

/// One new token and the queries of the last ones, in buffers that stay where they are.
struct Step {
    tensors: [Tensor; 3],
}

impl Step {
    fn new(shape: Shape, random: &mut Random) -> Self {
        let token = |random: &mut Random| shape.tensor(random, shape.heads, 1, Place::HeadsFirst);
        let (k, v) = (token(random), token(random));
        let q = shape.tensor(random, shape.heads * GROUP, WINDOW, Place::TokensFirst);
        Self { tensors: [k, v, q] }
    }

    fn tensors(&self) -> [&Tensor; 3] {
        [&self.tensors[0], &self.tensors[1], &self.tensors[2]]
    }

    /// Overwrites the buffers, in the order of the stream.
    #[allow(unsafe_code, reason = "the engine's part of a step")]
    fn copy_to(&self, buffers: &[Rows<'_, DeviceSlice<'_>>], stream: &CudaStream) {
        with_rows(&Cpu::new(), &self.tensors(), |rows| {
            for (from, to) in rows.iter().zip(buffers) {
                let bytes = bytes_of(from.storage(), 0..from.storage().elements());
                let (address, stream) = (to.storage().address(), stream.cu_stream());
                // SAFETY: a buffer of as many elements; memory that is not pinned is staged before the call returns.
                unsafe { cudarc::driver::result::memcpy_htod_async(address, &bytes, stream) }
                    .unwrap();
            }
        });
    }
}

const OP: Attend = Attend { scale: 0.125 };

pub fn config() -> Recompress {
    let score = WindowAttention::plain(WINDOW, Reduce::Mean);
    let pool = Some((Pooling::Avg, 3));
    Recompress { score, pool, budget: Share::PerLayer(150), floor: 20, sinks: 3, recent: 8 }
}

/// Attention of the window's queries on the host.
fn host_attention(twins: &Twins, step: &Step) -> (Ragged<f32>, Ragged<f32>) {
    let cpu = Cpu::new();
    let (heads, dim) = ((twins.shape.heads * GROUP) as usize, twins.shape.dim);
    let mut out = cpu.zeros(&vec![WINDOW * dim; heads]).unwrap();
    let mut lse = cpu.zeros(&vec![WINDOW; heads]).unwrap();
    with_rows(&cpu, &step.tensors(), |rows| {
        let view = twins.host.attend_view(rows[2]).unwrap();
        cpu.attend(&OP, &[view], &mut out, Some(&mut lse)).unwrap();
    });
    (out, lse)
}

fn assert_close(what: &str, got: &Ragged<f32>, want: &Ragged<f32>) {
    assert_eq!(got.offsets(), want.offsets());
    for (i, (got, want)) in got.data().iter().zip(want.data()).enumerate() {
        assert!((got - want).abs() <= 1e-5 + 1e-5 * want.abs(), "{what} {i}: {got}, not {want}");
    }
}

/// What the device should do, by the host's operations.
fn recompress_host(twins: &mut Twins, step: &Step, config: &Recompress) {
    let cpu = Cpu::new();
    let (lens, shape) = (twins.host.lens().to_vec(), twins.shape);
    let mut scores = cpu.zeros(&lens).unwrap();
    with_rows(&cpu, &step.tensors(), |rows| {
        let view = twins.host.view(shape.layer()).unwrap().with_queries(rows[2]).unwrap();
        cpu.window_attention(&config.score, &[view], &mut scores, None).unwrap();
    });
    if let Some((kind, kernel)) = config.pool {
        cpu.pool(&Pool { kind, kernel, lens: &lens }, &mut scores).unwrap();
    }
    let total: u64 = lens.iter().map(|&n| u64::from(n)).sum();
    let least = config.floor.max(config.sinks + config.recent);
    let floors: Vec<u64> = lens.iter().map(|&n| least.min(n).into()).collect();
    let contests: Vec<Contest> = match config.budget {
        Share::PerLayer(budget) => {
            vec![Contest { segments: 0..lens.len(), budget: budget.min(total), floors }]
        }
        Share::PerHead(budget) => (0..lens.len())
            .map(|s| Contest {
                segments: s..s + 1,
                budget: budget.min(lens[s]).into(),
                floors: vec![floors[s]],
            })
            .collect(),
    };
    let ranges = |&n: &u32| {
        let sinks = config.sinks.min(n);
        vec![0..sinks, n.saturating_sub(config.recent).max(sinks)..n]
    };
    let protected = lens.iter().map(ranges).collect();
    let op = TopK { contests: &contests, protected: &protected };
    let slots = cpu.top_k(&op, &[(&scores, 0..lens.len())]).unwrap();
    let held = twins.host.positions().iter().zip(slots.iter());
    let kept: Ragged<Position> =
        held.map(|(held, slots)| slots.iter().map(|&s| held[s as usize]).collect()).collect();
    twins.host.compact(&kept).unwrap();
}

/// The work of a step, ready to be run or captured.
struct Decoder {
    out: Floats,
    lse: Floats,
    workspace: Workspace,
}

impl Decoder {
    fn new(gpu: &Gpu, twins: &Twins) -> Self {
        let heads = (twins.shape.heads * GROUP) as usize;
        let out = gpu.cuda.zeros(&vec![WINDOW * twins.shape.dim; heads]).unwrap();
        let lse = gpu.cuda.zeros(&vec![WINDOW; heads]).unwrap();
        let bytes = twins.device.attend_bytes(heads, WINDOW);
        let workspace = Workspace::new(&gpu.cuda, bytes).unwrap();
        Self { out, lse, workspace }
    }

    fn step(&mut self, twins: &mut Twins, buffers: &[Rows<'_, DeviceSlice<'_>>]) {
        twins.device.append(&buffers[0], &buffers[1]).unwrap();
        let (out, lse) = (&mut self.out, Some(&mut self.lse));
        twins.device.attend(&OP, &buffers[2], out, lse, &mut self.workspace).unwrap();
    }

    /// The host's turn, then all that can be seen.
    fn follow(&self, gpu: &Gpu, twins: &mut Twins, step: &Step) {
        with_rows(&Cpu::new(), &step.tensors(), |rows| {
            twins.host.append(&rows[0], &rows[1]).unwrap();
        });
        twins.compare();
        let (out, lse) = host_attention(twins, step);
        assert_close("output", &gpu.cuda.to_host(&self.out).unwrap(), &out);
        assert_close("log-sum-exp", &gpu.cuda.to_host(&self.lse).unwrap(), &lse);
    }
}

/// A step without a graph.
pub fn step(gpu: &Gpu) {
    let (shape, random) = (Shape { heads: 3, dim: 64, dtype: Dtype::F16 }, &mut Random(8));
    let mut twins = Twins::new(gpu, shape, random, (90, 80, 60), Place::TokensFirst, None);
    twins.append(gpu, random, 12, Place::TokensFirst);
    let mut decoder = Decoder::new(gpu, &twins);
    let step = Step::new(shape, random);
    with_rows(gpu, &step.tensors(), |buffers| decoder.step(&mut twins, buffers));
    decoder.follow(gpu, &mut twins, &step);
}

/// What is captured, as a graph.
pub fn capture(stream: &Arc<CudaStream>, work: impl FnOnce()) -> cudarc::driver::CudaGraph {
    stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    work();
    stream.end_capture(Flags(0)).unwrap().unwrap()
}

/// A device whose work goes to a stream that may be captured.
#[allow(unsafe_code, reason = "the stream is the test's")]
pub fn gpu_on_a_stream() -> (Arc<CudaStream>, Gpu) {
    simcuda::install();
    let ordinal = simcuda::device();
    let context = CudaContext::new(ordinal).unwrap();
    let stream = context.new_stream().unwrap();
    // SAFETY: a stream of the device's primary context, which outlives the test's use of it.
    let cuda = unsafe { Cuda::on_stream(ordinal, stream.cu_stream().cast()) }.unwrap();
    (stream, Gpu { cuda, ordinal })
}

fn decode(shape: Shape, page: Option<u32>, blocks: Option<Blocks>, config: &Recompress) {
    let (stream, gpu) = gpu_on_a_stream();
    let mut random = Random(u64::from(shape.dim));
    let mut twins = Twins::new(&gpu, shape, &mut random, (90, 80, 60), Place::TokensFirst, page);
    if let Some(blocks) = blocks {
        twins.move_to_engine(&gpu, blocks);
    }
    // Heads that `some_of` emptied have no last tokens: grow all by a window first.
    twins.append(&gpu, &mut random, 12, Place::TokensFirst);
    let mut decoder = Decoder::new(&gpu, &twins);
    let mut recompression = twins.device.recompression(config, twins.shape.layer().query_heads());
    let recompression = recompression.as_mut().unwrap();

    let first = Step::new(shape, &mut random);
    with_rows(&gpu, &first.tensors(), |buffers| {
        // Once without a graph: modules are loaded on first use.
        decoder.step(&mut twins, buffers);
        decoder.follow(&gpu, &mut twins, &first);
        let again = |twins: &mut Twins, recompression: &mut Recompression| {
            twins.device.recompress(&buffers[2], recompression).unwrap();
        };
        again(&mut twins, recompression);
        recompress_host(&mut twins, &first, config);
        twins.compare();

        let step = capture(&stream, || decoder.step(&mut twins, buffers));
        let thin = capture(&stream, || again(&mut twins, recompression));
        twins.compare();
        for i in 0..12 {
            let next = Step::new(shape, &mut random);
            next.copy_to(buffers, &stream);
            step.launch().unwrap();
            decoder.follow(&gpu, &mut twins, &next);
            if i % 5 == 4 {
                thin.launch().unwrap();
                recompress_host(&mut twins, &next, config);
                twins.compare();
            }
        }
        twins.device.check().unwrap();
    });
}

#[test]
fn queries_are_lent_by_a_launch() {
    let gpu = Gpu::new();
    step(&gpu);
    let lent = simcuda::counters(gpu.ordinal, "lend").0;
    assert!(lent > 0 || simcuda::install() == simcuda::Installed::RealDriver);
}

#[test]
fn graphs_replay_while_lengths_grow() {
    decode(Shape { heads: 3, dim: 64, dtype: Dtype::BF16 }, None, None, &config());
    decode(Shape { heads: 2, dim: 128, dtype: Dtype::F16 }, Some(16), None, &config());
}

#[test]
fn graphs_over_an_engines_pages() {
    let shape = Shape { heads: 2, dim: 64, dtype: Dtype::BF16 };
    decode(shape, Some(8), Some(Blocks::Together), &config());
}

#[test]
fn graphs_of_other_budgets() {
    let per_head = Recompress { budget: Share::PerHead(40), pool: None, ..config() };
    decode(Shape { heads: 2, dim: 40, dtype: Dtype::F32 }, Some(7), None, &per_head);
    let maxima = Recompress { pool: Some((Pooling::Max, 5)), ..config() };
    decode(Shape { heads: 2, dim: 96, dtype: Dtype::BF16 }, None, None, &maxima);
}

#[test]
fn what_cannot_be_recompressed_says_so() {
    let gpu = Gpu::new();
    let shape = Shape { heads: 2, dim: 64, dtype: Dtype::F16 };
    let mut random = Random(5);
    let mut twins = Twins::new(&gpu, shape, &mut random, (40, 100, 8), Place::HeadsFirst, None);
    let refused =
        |config: Recompress| twins.device.recompression(&config, 4).map(drop).unwrap_err();
    let recent = refused(Recompress { recent: WINDOW - 1, ..config() });
    assert!(matches!(recent, Error::Parameter { name: "recent", .. }), "{recent}");
    let tight = refused(Recompress { budget: Share::PerHead(10), ..config() });
    assert!(matches!(tight, Error::Apportion { total: 10, floors: 20, .. }), "{tight}");
    let score = WindowAttention { window: 0, ..config().score };
    assert!(matches!(refused(Recompress { score, ..config() }), Error::Zero { .. }));

    let mut with = twins.device.recompression(&config(), 4).unwrap();
    let step = Step::new(shape, &mut random);
    let small = Workspace::new(&gpu.cuda, 16).unwrap();
    let mut decoder = Decoder { workspace: small, ..Decoder::new(&gpu, &twins) };
    with_rows(&gpu, &step.tensors(), |rows| {
        let q = rows[2];
        let Decoder { out, workspace, .. } = &mut decoder;
        let error = twins.device.attend(&OP, &q, out, None, workspace).unwrap_err();
        assert!(matches!(error, Error::Shape { what: "bytes of a workspace", .. }), "{error}");
        let few = Rows::heads_first(q.storage(), 4, WINDOW - 1, 64).unwrap();
        let error = twins.device.recompress(&few, &mut with).unwrap_err();
        assert!(matches!(error, Error::TooFewQueries { needed: 4, got: 3, .. }), "{error}");
        let mut other =
            Twins::new(&gpu, shape, &mut Random(6), (41, 100, 8), Place::HeadsFirst, None);
        assert!(other.device.recompress(&q, &mut with).is_err(), "other capacities");
        twins.compact(&mut random, 50, Order::Any);
        assert!(twins.device.recompress(&q, &mut with).is_err(), "no order");
    });
    twins.compare();
}
