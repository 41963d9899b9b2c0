//! Two small cases, of which `.ci/instruction-counts` counts the instructions: times on a shared machine survive no gate of 5 %.
//! The end of a prefill (score, select, gather) and a step with value norms (attend, norms, grams), each operation counted apart, for
//! the dear ones would hide the others.
//!
//! `counts OPERATION` runs one of them on this thread alone, over tensors from a fixed sequence.

use half::bf16;
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice, Isa};
use kvbudget::backend::ops::{
    Attend, Contest, Pool, Pooling, Reduce, TopK, ValueNorm, WindowAttention,
};
use kvbudget::cache::FlatCache;
use kvbudget::{LayerShape, LayerView, Position, Ragged, Rows};

const QUERY_HEADS: u32 = 8;
const HEADS: u32 = 2;
const DIM: u32 = 128;
const TOKENS: u32 = 1024;
const WINDOW: u32 = 32;
const HIDDEN: u32 = 128;

/// Numbers in [-2, 2) of a linear congruence, in bf16.
fn numbers(seed: u64, rows: u32, width: u32) -> Vec<bf16> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bf16::from_f32((state >> 40) as f32 / (1 << 22) as f32 - 2.0)
    };
    (0..rows * width).map(next).collect()
}

struct Case {
    cpu: Cpu,
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    o_proj: Vec<bf16>,
    scores: Ragged<f32>,
    out: Ragged<f32>,
}

impl Case {
    fn new() -> Self {
        Self {
            cpu: Cpu::new(),
            q: numbers(1, QUERY_HEADS * WINDOW, DIM),
            k: numbers(2, HEADS * TOKENS, DIM),
            v: numbers(3, HEADS * TOKENS, DIM),
            o_proj: numbers(4, HIDDEN, QUERY_HEADS * DIM),
            scores: Ragged::filled(vec![TOKENS as usize; HEADS as usize], 0.0),
            out: Ragged::filled(vec![DIM as usize; QUERY_HEADS as usize], 0.0),
        }
    }

    /// Keys and values as they are stored, `[H, T, D]`.
    fn view<'a>(q: &'a [bf16], k: &'a [bf16], v: &'a [bf16], o_proj: &'a [bf16]) -> HostLayer<'a> {
        let rows = |x, heads, len, dim| Rows::heads_first(HostSlice::BF16(x), heads, len, dim);
        let layer = || {
            let shape = LayerShape::new(QUERY_HEADS, HEADS, DIM)?;
            let (k, v) = (rows(k, HEADS, TOKENS, DIM)?, rows(v, HEADS, TOKENS, DIM)?);
            LayerView::new(shape, TOKENS, k, v)?
                .with_queries(rows(q, QUERY_HEADS, WINDOW, DIM)?)?
                .with_output_projection(rows(o_proj, 1, HIDDEN, QUERY_HEADS * DIM)?)
        };
        layer().expect("a layer")
    }

    fn layer(&self) -> HostLayer<'_> {
        Self::view(&self.q, &self.k, &self.v, &self.o_proj)
    }

    /// SnapKV's.
    fn score(&mut self) {
        let op = WindowAttention::plain(WINDOW, Reduce::Mean);
        let view = Self::view(&self.q, &self.k, &self.v, &self.o_proj);
        self.cpu.window_attention(&op, &[view], &mut self.scores, None).expect("scores");
        let lens = [TOKENS - WINDOW; HEADS as usize];
        let pool = Pool { kind: Pooling::Avg, kernel: 5, lens: &lens };
        self.cpu.pool(&pool, &mut self.scores).expect("pooled scores");
    }

    /// AdaKV's, of a fifth.
    fn select(&self) -> Ragged<Position> {
        let (heads, share) = (HEADS as usize, u64::from(TOKENS / 5));
        let floors = vec![share / 5; heads];
        let contests = [Contest { segments: 0..heads, budget: share * heads as u64, floors }];
        let protected = Ragged::filled(vec![1; heads], TOKENS - WINDOW..TOKENS);
        let op = TopK { contests: &contests, protected: &protected };
        let kept = self.cpu.top_k(&op, &[(&self.scores, 0..heads)]).expect("a selection");
        kept.iter().map(|row| row.iter().map(|&slot| Position(slot)).collect()).collect()
    }

    fn gather(&self, kept: &Ragged<Position>) -> FlatCache {
        FlatCache::gather(&self.layer(), kept, 16).expect("a cache")
    }

    /// A token over what is left.
    fn attend(&mut self, cache: &FlatCache) {
        let q = HostSlice::BF16(&self.q[..(QUERY_HEADS * DIM) as usize]);
        let q = Rows::heads_first(q, QUERY_HEADS, 1, DIM).expect("queries");
        let op = Attend { scale: (DIM as f32).powf(-0.5) };
        let sequence = cache.attend_view(q).expect("a cache");
        self.cpu.attend(&op, &[sequence], &mut self.out, None).expect("attention");
    }

    fn norms(&mut self, op: ValueNorm) {
        let view = Self::view(&self.q, &self.k, &self.v, &self.o_proj);
        self.cpu.value_norm(op, &[view], &mut self.scores).expect("norms");
    }
}

/// The script counts what is inside of this function.
#[inline(never)]
fn measured<T>(run: impl FnOnce() -> T) -> T {
    std::hint::black_box(run())
}

/// Runs one operation in [`measured`], and what it needs before that.
fn count(name: &str) {
    let mut case = Case::new();
    match name {
        "score" => return measured(|| case.score()),
        "norms" => return measured(|| case.norms(ValueNorm::L1)),
        "grams" => return measured(|| case.norms(ValueNorm::L2)),
        _ => case.score(),
    }
    if name == "select" {
        measured(|| case.select());
        return;
    }
    let kept = case.select();
    match name {
        "gather" => drop(measured(|| case.gather(&kept))),
        "attend" => {
            let cache = case.gather(&kept);
            measured(|| case.attend(&cache));
        }
        other => panic!("no operation {other:?}"),
    }
}

fn main() {
    let Some(name) = std::env::args().nth(1).filter(|arg| !arg.starts_with("--")) else {
        println!("nothing counted: .ci/instruction-counts runs this");
        return;
    };
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    // Everything on this thread: others would wait, and be counted.
    one.expect("a pool").install(|| count(&name));
    println!("{name} with {:?}", Isa::best());
}
