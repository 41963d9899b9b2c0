//! Times of the operations that read tensors: `cargo bench --bench attention`.
//!
//! Shapes are one layer of Llama-3.1-8B (32 query heads, 8 KV heads, `D = 128`), f16 and f32. Throughput is flops
//! for products and bytes of K and V for what streams; `copy` is the machine's bandwidth, measured beside it.
//! Each operation is compared with a plain loop on a few slots before it is timed.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::{Attend, Lag, Reduce, ValueNorm, WindowAttention};
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{LayerShape, LayerView, Ragged, Rows};

const QUERY_HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const DIM: u32 = 128;
const HIDDEN: u32 = 4096;
const WINDOW: u32 = 32;

/// Uniform in [-1, 1), from SplitMix64.
fn values(seed: u64, n: usize) -> Vec<f16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        f16::from_f32((x >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// K, V, queries of a window and the output projection of one layer.
struct Data {
    len: u32,
    k: Vec<f16>,
    v: Vec<f16>,
    q: Vec<f16>,
    o: Vec<f16>,
}

impl Data {
    fn new(len: u32) -> Self {
        let kv = (KV_HEADS * len * DIM) as usize;
        let columns = QUERY_HEADS * DIM;
        Self {
            len,
            k: values(1, kv),
            v: values(2, kv),
            q: values(3, (QUERY_HEADS * WINDOW * DIM) as usize),
            o: values(4, (HIDDEN * columns) as usize),
        }
    }
    fn rows<'a>(&self, data: &'a [f16]) -> Rows<'a, HostSlice<'a>> {
        Rows::heads_first(HostSlice::F16(data), KV_HEADS, self.len, DIM).unwrap()
    }
    fn view(&self) -> LayerView<'_, HostSlice<'_>> {
        let shape = LayerShape::new(QUERY_HEADS, KV_HEADS, DIM).unwrap();
        let q = Rows::heads_first(HostSlice::F16(&self.q), QUERY_HEADS, WINDOW, DIM).unwrap();
        let o = Rows::heads_first(HostSlice::F16(&self.o), 1, HIDDEN, QUERY_HEADS * DIM).unwrap();
        LayerView::new(shape, self.len, self.rows(&self.k), self.rows(&self.v))
            .and_then(|view| view.with_queries(q))
            .and_then(|view| view.with_output_projection(o))
            .unwrap()
    }
    /// Bytes of K and V.
    fn bytes(&self) -> u64 {
        4 * self.k.len() as u64
    }
    fn zeros(&self) -> Ragged<f32> {
        Ragged::filled(vec![self.len as usize; KV_HEADS as usize], 0.0)
    }
}

fn dot(a: &[f16], b: &[f16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

/// Softmax weights of query `q` over the first `seen` slots of head 0.
fn weights(data: &Data, q: &[f16], seen: usize) -> Vec<f64> {
    let key = |t: usize| &data.k[t * DIM as usize..][..DIM as usize];
    let e: Vec<f64> = (0..seen).map(|t| (dot(q, key(t)) / f64::from(DIM).sqrt()).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|x| x / sum).collect()
}

fn expect_close(what: &str, got: f32, want: f64) {
    assert!((f64::from(got) - want).abs() <= 1e-4 * want.abs() + 1e-6, "{what}: {got} not {want}");
}

fn copy(c: &mut Criterion) {
    // Larger than caches that one core can keep.
    let src = vec![1u64; 32 << 20];
    let mut dst = vec![0u64; src.len()];
    let mut group = c.benchmark_group("copy");
    group.throughput(Throughput::Bytes(2 * 8 * src.len() as u64));
    group.bench_function("256MiB", |b| {
        b.iter(|| black_box(&mut dst).copy_from_slice(black_box(&src)))
    });
    group.finish();
}

fn window_attention(c: &mut Criterion) {
    let data = Data::new(8192);
    let view = data.view();
    let (mut out, mut mean) = (data.zeros(), data.zeros());
    let snap = WindowAttention::plain(WINDOW, Reduce::Mean);
    let defensive = WindowAttention {
        over_window: Reduce::Max,
        over_group: Reduce::Max,
        row_pool: Some(5),
        ..snap
    };
    Cpu::new().window_attention(&snap, &[view], &mut out, None).unwrap();
    let rows = (QUERY_HEADS / KV_HEADS * WINDOW) as usize;
    let mut want = 0.0;
    for (r, q) in data.q.chunks(DIM as usize).take(rows).enumerate() {
        let seen = data.len as usize - WINDOW as usize + r % WINDOW as usize + 1;
        want += weights(&data, q, seen)[100] / rows as f64;
    }
    expect_close("window attention", out.row(0)[100], want);

    let logits = u64::from(QUERY_HEADS * WINDOW) * u64::from(data.len);
    let lse = vec![9f32; (QUERY_HEADS * WINDOW) as usize];
    let lse = Rows::heads_first(HostSlice::F32(&lse), QUERY_HEADS, WINDOW, 1).unwrap();
    let with_lse = view.with_lse(lse).unwrap();
    let mut group = c.benchmark_group("window_attention-8k");
    // Two passes of 2·D flops per logit; with the log-sum-exp, one.
    group.throughput(Throughput::Elements(4 * u64::from(DIM) * logits));
    group.bench_function("snapkv", |b| {
        b.iter(|| Cpu::new().window_attention(&snap, &[view], &mut out, None).unwrap());
    });
    group.bench_function("defensivekv", |b| {
        b.iter(|| {
            let cpu = Cpu::new();
            cpu.window_attention(&defensive, &[view], &mut out, Some(&mut mean)).unwrap();
        });
    });
    group.throughput(Throughput::Elements(2 * u64::from(DIM) * logits));
    group.bench_function("snapkv-lse", |b| {
        b.iter(|| Cpu::new().window_attention(&snap, &[with_lse], &mut out, None).unwrap());
    });
    group.finish();
}

fn value_norm(c: &mut Criterion) {
    let data = Data::new(512);
    let view = data.view();
    let mut out = data.zeros();
    Cpu::new().value_norm(ValueNorm::L1, &[view], &mut out).unwrap();
    let (dim, columns) = (DIM as usize, (QUERY_HEADS * DIM) as usize);
    let value = &data.v[7 * dim..8 * dim];
    let group = (QUERY_HEADS / KV_HEADS) as usize;
    let heads = (0..group)
        .flat_map(|g| data.o.chunks(columns).map(move |row| &row[g * dim..(g + 1) * dim]));
    let want = heads.map(|w| dot(value, w).abs()).sum::<f64>() / group as f64;
    expect_close("value norm", out.row(0)[7], want);

    let mut bench = c.benchmark_group("value_norm-512");
    let flops = 2 * u64::from(QUERY_HEADS * DIM) * u64::from(HIDDEN) * u64::from(data.len);
    bench.throughput(Throughput::Elements(flops));
    bench.sample_size(10);
    for op in [ValueNorm::L1, ValueNorm::L2] {
        bench.bench_function(format!("f16-{op}"), |b| {
            b.iter(|| Cpu::new().value_norm(op, &[view], &mut out).unwrap());
        });
    }
    bench.finish();
}

fn key_scores(c: &mut Criterion) {
    let data = Data::new(8192);
    let view = data.view();
    let mut out = data.zeros();
    Cpu::new().key_norm(&[view], &mut out).unwrap();
    let key = &data.k[..DIM as usize];
    expect_close("key norm", out.row(0)[0], -dot(key, key).sqrt());
    let mut group = c.benchmark_group("key_scores-8k");
    group.throughput(Throughput::Bytes(data.bytes() / 2));
    group.bench_function("key_norm", |b| {
        b.iter(|| Cpu::new().key_norm(&[view], &mut out).unwrap());
    });
    group.throughput(Throughput::Bytes(data.bytes()));
    group.bench_function("key_diff", |b| {
        b.iter(|| Cpu::new().key_diff(&[view], &mut out).unwrap());
    });
    group.throughput(Throughput::Bytes(2 * data.bytes()));
    let op = Lag { sinks: 4, lag: 128, cross_scoring: false };
    group.bench_function("lag", |b| b.iter(|| Cpu::new().lag(&op, &[view], &mut out).unwrap()));
    group.finish();
}

fn attend(c: &mut Criterion) {
    let op = Attend { scale: 1.0 / (DIM as f32).sqrt() };
    let mut group = c.benchmark_group("attend");
    for len in [512, 4096, 32768] {
        let data = Data::new(len);
        let q = &data.q[..(QUERY_HEADS * DIM) as usize];
        let (k, v) = (data.rows(&data.k), data.rows(&data.v));
        group.throughput(Throughput::Bytes(data.bytes()));
        for (name, heads) in [("gqa4", QUERY_HEADS), ("mha", KV_HEADS)] {
            let q = Rows::heads_first(HostSlice::F16(q), heads, 1, DIM).unwrap();
            let view = AttendView { q, k, v };
            let mut out = Ragged::filled(vec![DIM as usize; heads as usize], 0.0);
            Cpu::new().attend(&op, &[view], &mut out, None).unwrap();
            let p = weights(&data, &data.q[..DIM as usize], len as usize);
            let column = |t: usize| f64::from(data.v[t * DIM as usize].to_f32());
            let want: f64 = p.iter().enumerate().map(|(t, p)| p * column(t)).sum();
            expect_close("attend", out.row(0)[0], want);
            group.bench_function(format!("{name}-{len}"), |b| {
                b.iter(|| Cpu::new().attend(&op, &[view], &mut out, None).unwrap());
            });
        }
        let (k32, v32): (Vec<f32>, Vec<f32>) = (
            data.k.iter().map(|x| x.to_f32()).collect(),
            data.v.iter().map(|x| x.to_f32()).collect(),
        );
        let rows = |x| Rows::heads_first(HostSlice::F32(x), KV_HEADS, len, DIM).unwrap();
        let q = Rows::heads_first(HostSlice::F16(q), QUERY_HEADS, 1, DIM).unwrap();
        let view = AttendView { q, k: rows(&k32), v: rows(&v32) };
        let mut out = Ragged::filled(vec![DIM as usize; QUERY_HEADS as usize], 0.0);
        group.throughput(Throughput::Bytes(2 * data.bytes()));
        group.bench_function(format!("gqa4-f32-{len}"), |b| {
            b.iter(|| Cpu::new().attend(&op, &[view], &mut out, None).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, copy, window_attention, value_norm, key_scores, attend);
criterion_main!(benches);
