//! Our side of `benches/peers/run.py`, which starts it with a file of tensors, says on standard input what to run, and reads
//! nanoseconds: both sides work on the same tensors in turn.
//!
//! The file (safetensors): `q [Hq, W, D]`, `k`, `v` `[H, T, D]`, `o_proj [hidden, Hq·D]`.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::time::Instant;

use bytemuck::cast_slice;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::backend::ops::{
    Attend, Contest, Pool, Pooling, Reduce, TopK, ValueNorm, WindowAttention,
};
use kvbudget::backend::{AttendView, Backend};
use kvbudget::cache::FlatCache;
use kvbudget::{LayerShape, LayerView, Position, Ragged, Rows};
use rayon::prelude::*;
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

struct Peer {
    cpu: Cpu,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o_proj: Tensor,
    scores: Ragged<f32>,
    kept: Ragged<u32>,
    cache: Option<FlatCache>,
    out: Ragged<f32>,
}

impl Peer {
    fn new(path: &str) -> Self {
        let bytes = std::fs::read(path).expect(path);
        let file = SafeTensors::deserialize(&bytes).expect(path);
        let [q, k, v, o_proj] = ["q", "k", "v", "o_proj"].map(|name| Tensor::read(&file, name));
        let rows = |n: u32, len: u32| Ragged::filled(vec![len as usize; n as usize], 0f32);
        let scores = rows(k.shape[0], k.shape[1]);
        let out = rows(q.shape[0], q.shape[2]);
        let kept = Ragged::default();
        Self { cpu: Cpu::new(), q, k, v, o_proj, scores, kept, cache: None, out }
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

    /// SnapKV's scores; `defensive`: DefensiveKV's.
    fn score(&mut self, defensive: bool) {
        let mut scores = std::mem::take(&mut self.scores);
        let reduce = if defensive { Reduce::Max } else { Reduce::Mean };
        let op = WindowAttention {
            window: self.window(),
            over_window: reduce,
            over_group: reduce,
            row_pool: defensive.then_some(5),
            score_window: false,
            gap: 0,
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

    fn gather(&mut self) {
        let kept: Ragged<Position> =
            self.kept.iter().map(|row| row.iter().map(|&slot| Position(slot)).collect()).collect();
        self.cache = None;
        self.cache = Some(FlatCache::gather(&self.view(), &kept, 16).expect("a cache"));
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

    /// Scores and kept slots, for comparison: f32 and u32, each row after its length.
    fn write(&self, path: &str) {
        let mut file = std::fs::File::create(path).expect(path);
        for (scores, kept) in self.scores.iter().zip(self.kept.iter()) {
            file.write_all(cast_slice(scores)).expect(path);
            file.write_all(&(kept.len() as u32).to_le_bytes()).expect(path);
            file.write_all(cast_slice(kept)).expect(path);
        }
    }
}

fn main() {
    let Some(path) = std::env::args().nth(1).filter(|arg| !arg.starts_with("--")) else {
        println!("nothing measured: benches/peers/run.py runs this");
        return;
    };
    let mut peer = Peer::new(&path);
    // Larger than what caches keep.
    let mut copy = (vec![1u64; 32 << 20], vec![0u64; 32 << 20]);
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let (what, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let start = Instant::now();
        match what {
            "score" => peer.score(false),
            "defensive" => peer.score(true),
            "ties" => peer.scores.rows_mut().into_iter().for_each(|row| row.fill(0.5)),
            "select" => peer.select(),
            "gather" => peer.gather(),
            "layer" => {
                peer.score(false);
                peer.select();
                peer.gather();
            }
            "attend" => peer.attend(false),
            "dense" => peer.attend(true),
            "norms" => peer.norms(ValueNorm::L1),
            "grams" => peer.norms(ValueNorm::L2),
            "copy" => {
                let (from, to) = (&copy.0, &mut copy.1);
                let parts = to.par_chunks_mut(1 << 20).zip(from.par_chunks(1 << 20));
                parts.for_each(|(to, from)| to.copy_from_slice(black_box(from)));
            }
            "write" => peer.write(argument),
            other => panic!("no operation {other:?}"),
        }
        println!("{}", start.elapsed().as_nanos());
    }
}
