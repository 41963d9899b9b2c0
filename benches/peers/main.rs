//! Our side of `benches/peers/run.py`, which starts it with a file of tensors, says on standard input what to run, and reads
//! numbers, nanoseconds for the most: both sides work on the same tensors in turn.
//!
//! The file (safetensors): `q [Hq, W, D]`, `k`, `v` `[H, T, D]`, `o_proj [hidden, Hq·D]`. A line: `[cold] [one] OPERATION [PATH]`;
//! `cold` empties the caches before the clock starts, `one` uses one thread.

mod limits;

use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use bytemuck::cast_slice;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::backend::ops::{
    Attend, Contest, Pool, Pooling, Reduce, TopK, ValueNorm, WindowAttention,
};
use kvbudget::backend::{AttendView, Backend};
use kvbudget::cache::FlatCache;
use kvbudget::{LayerShape, LayerView, Position, Ragged, Rows};
use limits::{Limits, Products};
use rayon::{ThreadPool, ThreadPoolBuilder};
use safetensors::{Dtype, SafeTensors};

struct Tensor {
    dtype: Dtype,
    shape: Vec<u32>,
    /// The elements, from a cache line on, as PyTorch's are.
    bytes: Vec<u8>,
    start: usize,
}

impl Tensor {
    fn read(file: &SafeTensors<'_>, name: &str) -> Self {
        const LINE: usize = 64;
        let tensor = file.tensor(name).expect(name);
        let mut bytes = vec![0; tensor.data().len() + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        bytes[start..][..tensor.data().len()].copy_from_slice(tensor.data());
        bytes.truncate(start + tensor.data().len());
        let shape = tensor.shape().iter().map(|&n| n as u32).collect();
        Self { dtype: tensor.dtype(), shape, bytes, start }
    }

    fn slice(&self) -> HostSlice<'_> {
        let bytes = &self.bytes[self.start..];
        match self.dtype {
            Dtype::F32 => HostSlice::F32(cast_slice(bytes)),
            Dtype::F16 => HostSlice::F16(cast_slice(bytes)),
            Dtype::BF16 => HostSlice::BF16(cast_slice(bytes)),
            other => panic!("a tensor of {other:?}"),
        }
    }

    fn rows(&self) -> Rows<'_, HostSlice<'_>> {
        let (heads, len, dim) = match *self.shape {
            [heads, len, dim] => (heads, len, dim),
            [len, dim] => (1, len, dim),
            _ => panic!("a tensor of {:?}", self.shape),
        };
        Rows::heads_first(self.slice(), heads, len, dim).expect("a tensor of that shape")
    }
}

/// Tokens appended by one measurement.
const APPENDED: u32 = 256;
/// Slots to spare in each head of a gathered cache.
const SLACK: u32 = 16;

struct Peer {
    cpu: Cpu,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o_proj: Tensor,
    scores: Ragged<f32>,
    kept: Ragged<u32>,
    /// Scores of all layers, in a buffer apart: `[layers * H, T]`.
    all_scores: Ragged<f32>,
    cache: Option<FlatCache>,
    out: Ragged<f32>,
    limits: Limits,
    cold: bool,
}

impl Peer {
    fn new(path: &str) -> Self {
        let bytes = std::fs::read(path).expect(path);
        let file = SafeTensors::deserialize(&bytes).expect(path);
        let [q, k, v, o_proj] = ["q", "k", "v", "o_proj"].map(|name| Tensor::read(&file, name));
        let rows = |n: u32, len: u32| Ragged::filled(vec![len as usize; n as usize], 0f32);
        Self {
            cpu: Cpu::new(),
            scores: rows(k.shape[0], k.shape[1]),
            kept: Ragged::default(),
            all_scores: Ragged::default(),
            cache: None,
            out: rows(q.shape[0], q.shape[2]),
            limits: Limits::new(),
            cold: false,
            q,
            k,
            v,
            o_proj,
        }
    }

    fn window(&self) -> u32 {
        self.q.shape[1]
    }
    fn tokens(&self) -> u32 {
        self.k.shape[1]
    }
    fn heads(&self) -> usize {
        self.k.shape[0] as usize
    }

    fn view(&self) -> HostLayer<'_> {
        let shape = LayerShape::new(self.q.shape[0], self.k.shape[0], self.q.shape[2]);
        LayerView::new(shape.expect("a shape"), self.tokens(), self.k.rows(), self.v.rows())
            .and_then(|view| view.with_queries(self.q.rows()))
            .and_then(|view| view.with_output_projection(self.o_proj.rows()))
            .expect("a layer")
    }

    /// Empties the caches if the measurement is a cold one, then runs the clock.
    fn time(&mut self, run: impl FnOnce(&mut Self)) -> Duration {
        if self.cold {
            self.limits.read();
        }
        let start = Instant::now();
        run(self);
        start.elapsed()
    }

    /// SnapKV's scores; `defensive`: DefensiveKV's.
    fn score(&mut self, defensive: bool) {
        let mut scores = std::mem::take(&mut self.scores);
        let reduce = if defensive { Reduce::Max } else { Reduce::Mean };
        let op = WindowAttention {
            row_pool: defensive.then_some(5),
            ..WindowAttention::plain(self.window(), reduce)
        };
        let layers = [self.view()];
        self.cpu.window_attention(&op, &layers, &mut scores, None).expect("scores");
        if !defensive {
            let lens = vec![self.tokens() - self.window(); self.heads()];
            let pool = Pool { kind: Pooling::Avg, kernel: 5, lens: &lens };
            self.cpu.pool(&pool, &mut scores).expect("pooled scores");
        }
        self.scores = scores;
    }

    /// AdaKV's fifth of the slots: the window and a fifth of the fair share for sure.
    fn select(&mut self) {
        let (heads, tokens) = (self.heads(), self.tokens());
        let budget = heads as u64 * u64::from(tokens / 5);
        let floors = vec![u64::from((tokens / 25).max(self.window())); heads];
        let contests = [Contest { segments: 0..heads, budget, floors }];
        let protected = Ragged::filled(vec![1; heads], tokens - self.window()..tokens);
        let op = TopK { contests: &contests, protected: &protected };
        self.kept = self.cpu.top_k(&op, &[(&self.scores, 0..heads)]).expect("a selection");
    }

    /// A fifth of the slots of all layers together, by their scores alone.
    fn select_all(&mut self) {
        let rows = self.all_scores.rows();
        let budget = self.all_scores.total() as u64 / 5;
        let contests = [Contest { segments: 0..rows, budget, floors: vec![0; rows] }];
        let protected = Ragged::filled(vec![0; rows], 0..0);
        let op = TopK { contests: &contests, protected: &protected };
        self.kept = self.cpu.top_k(&op, &[(&self.all_scores, 0..rows)]).expect("a selection");
    }

    /// What was selected, as gathering wants it.
    fn positions(&self) -> Ragged<Position> {
        self.kept.iter().map(|row| row.iter().map(|&slot| Position(slot)).collect()).collect()
    }

    fn gather(&mut self, kept: &Ragged<Position>, slack: u32) {
        self.cache = None;
        self.cache = Some(FlatCache::gather(&self.view(), kept, slack).expect("a cache"));
    }

    /// Into the memory of the last one.
    fn regather(&mut self, kept: &Ragged<Position>) {
        let Some(mut cache) = self.cache.take() else {
            return self.gather(kept, SLACK);
        };
        cache.regather(&self.view(), kept, SLACK).expect("a cache");
        self.cache = Some(cache);
    }

    /// Every slot, thinned in place.
    fn compact(&mut self) -> Duration {
        let all = vec![(0..self.tokens()).map(Position).collect::<Vec<_>>(); self.heads()];
        self.gather(&all.into_iter().collect(), 0);
        let kept = self.positions();
        self.time(|peer| peer.cache.as_mut().expect("a cache").compact(&kept).expect("slots held"))
    }

    /// Nanoseconds for each token.
    fn append(&mut self) -> Duration {
        let kept = self.positions();
        self.gather(&kept, APPENDED);
        let mut cache = self.cache.take().expect("a cache");
        let time = self.time(|peer| {
            let (heads, tokens, dim) = (peer.k.shape[0], peer.tokens(), peer.k.shape[2]);
            for token in 0..APPENDED {
                let row = |tensor| token_rows(tensor, heads, tokens, dim, token);
                cache.append(&row(&peer.k), &row(&peer.v)).expect("room");
            }
        });
        self.gather(&kept, SLACK);
        time / APPENDED
    }

    fn attend(&mut self, dense: bool) {
        let mut out = std::mem::take(&mut self.out);
        let (heads, window, dim) = (self.q.shape[0], self.window(), self.q.shape[2]);
        let q = Rows::strided(self.q.slice(), heads, 1, dim, (window * dim) as usize, dim as usize)
            .expect("a query of each head");
        let op = Attend { scale: (dim as f32).powf(-0.5) };
        let sequence = match (&self.cache, dense) {
            (Some(cache), false) => cache.attend_view(q).expect("a cache"),
            _ => AttendView { q, k: self.k.rows(), v: self.v.rows() },
        };
        self.cpu.attend(&op, &[sequence], &mut out, None).expect("attention");
        self.out = out;
    }

    fn norms(&mut self, op: ValueNorm) {
        let mut scores = std::mem::take(&mut self.scores);
        self.cpu.value_norm(op, &[self.view()], &mut scores).expect("norms");
        self.scores = scores;
    }

    fn layer(&mut self, new: bool) {
        self.score(false);
        self.select();
        let kept = self.positions();
        if new { self.gather(&kept, SLACK) } else { self.regather(&kept) }
    }

    /// Scores or kept slots, for comparison: f32, or u32 with each row after its length.
    fn write(&self, what: &str, path: &str) {
        let mut file = std::fs::File::create(path).expect(path);
        if what == "write-scores" {
            file.write_all(cast_slice(self.scores.data())).expect(path);
            return;
        }
        for kept in self.kept.iter() {
            file.write_all(&(kept.len() as u32).to_le_bytes()).expect(path);
            file.write_all(cast_slice(kept)).expect(path);
        }
    }

    /// Scores of all layers: f32, rows of T.
    fn read_all_scores(&mut self, path: &str) {
        let bytes = std::fs::read(path).expect(path);
        let rows = bytes.chunks_exact(4 * self.tokens() as usize);
        let float = |x: &[u8]| f32::from_le_bytes(x.try_into().expect("4 bytes"));
        self.all_scores =
            rows.map(|row| row.chunks_exact(4).map(float).collect::<Vec<_>>()).collect();
    }

    fn obey(&mut self, what: &str, argument: &str) -> u128 {
        let mut products = (what == "gemm").then(Products::new);
        let time = match what {
            "score" => self.time(|peer| peer.score(false)),
            "defensive" => self.time(|peer| peer.score(true)),
            "ties" => {
                self.time(|peer| peer.scores.rows_mut().into_iter().for_each(|row| row.fill(0.5)))
            }
            "select" => self.time(Self::select),
            "select-all" => self.time(Self::select_all),
            "gather" => {
                let kept = self.positions();
                self.time(|peer| peer.gather(&kept, SLACK))
            }
            "compact" => self.compact(),
            "append" => self.append(),
            "regather" => {
                let kept = self.positions();
                self.time(|peer| peer.regather(&kept))
            }
            "layer" => self.time(|peer| peer.layer(false)),
            "layer-new" => self.time(|peer| peer.layer(true)),
            "attend" => self.time(|peer| peer.attend(false)),
            "dense" => self.time(|peer| peer.attend(true)),
            "norms" => self.time(|peer| peer.norms(ValueNorm::L1)),
            "grams" => self.time(|peer| peer.norms(ValueNorm::L2)),
            "read" => self.time(|peer| peer.limits.read()),
            "copy" => self.time(|peer| peer.limits.copy()),
            "gemm" => {
                let products = products.as_mut().expect("matrices");
                products.run();
                let time = self.time(|_| products.run());
                // Operations in a second.
                return products.flops() as u128 * 1_000_000_000 / time.as_nanos();
            }
            "write-scores" | "write-kept" => self.time(|peer| peer.write(what, argument)),
            "read-scores" => self.time(|peer| peer.read_all_scores(argument)),
            other => panic!("no operation {other:?}"),
        };
        time.as_nanos()
    }
}

/// One token's row of each head.
fn token_rows(
    tensor: &Tensor,
    heads: u32,
    tokens: u32,
    dim: u32,
    token: u32,
) -> Rows<'_, HostSlice<'_>> {
    let (head, at) = ((tokens * dim) as usize, (token * dim) as usize);
    let elements = match tensor.slice() {
        HostSlice::F32(s) => HostSlice::F32(&s[at..]),
        HostSlice::F16(s) => HostSlice::F16(&s[at..]),
        HostSlice::BF16(s) => HostSlice::BF16(&s[at..]),
    };
    Rows::strided(elements, heads, 1, dim, head, dim as usize).expect("a row of each head")
}

fn main() {
    let Some(path) = std::env::args().nth(1).filter(|arg| !arg.starts_with("--")) else {
        println!("nothing measured: benches/peers/run.py runs this");
        return;
    };
    let mut peer = Peer::new(&path);
    let one: ThreadPool = ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let mut words = line.split(' ').peekable();
        peer.cold = words.next_if_eq(&"cold").is_some();
        let alone = words.next_if_eq(&"one").is_some();
        let (what, argument) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let number = match alone {
            true => one.install(|| peer.obey(what, argument)),
            false => peer.obey(what, argument),
        };
        println!("{number}");
    }
}
