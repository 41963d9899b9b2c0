//! Compaction of one layer: what share of the machine's copy bandwidth it reaches.
//!
//! Each case is verified once against a loop over rows, then timed, flat and paged: `gather` (out of place),
//! `regather` (the same into memory that is there) and `compact` (in place). Beside them `memcpy` copies as many bytes, by all threads, between warm
//! buffers, which bounds all, and to new memory, which bounds `gather flat`: its pages fault, those of a
//! pool do not. Bytes count once read, once written. Kept positions are scattered at random, so that most
//! moves are of single rows: the worst case. Around one base case, one axis varies at a time.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use kvbudget::backend::cpu::{HostLayer, HostSlice};
use kvbudget::cache::{FlatCache, PagePool, PagedCache};
use kvbudget::{LayerShape, LayerView, Position, Ragged, Rows};
use rayon::prelude::*;

const DIM: u32 = 128;
const PAGE: u32 = 16;

#[derive(Debug, Clone, Copy)]
struct Case {
    tokens: u32,
    percent: u64,
    heads: u32,
    half: bool,
    tokens_first: bool,
}

const BASE: Case =
    Case { tokens: 16 << 10, percent: 20, heads: 8, half: true, tokens_first: false };

const CASES: [Case; 9] = [
    BASE,
    Case { tokens: 2 << 10, ..BASE },
    Case { tokens: 64 << 10, ..BASE },
    Case { percent: 50, ..BASE },
    Case { percent: 80, ..BASE },
    Case { heads: 1, ..BASE },
    Case { heads: 32, ..BASE },
    Case { half: false, ..BASE },
    Case { tokens_first: true, ..BASE },
];

impl Case {
    fn name(self) -> String {
        let dtype = if self.half { "f16" } else { "f32" };
        let layout = if self.tokens_first { "[T,H,D]" } else { "[H,T,D]" };
        format!("T={} kept={}% H={} {dtype} {layout}", self.tokens, self.percent, self.heads)
    }

    fn kept(self) -> Ragged<Position> {
        let mut state = 1u64;
        let mut keep = || {
            // xorshift64; the high bits.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) % 100 < self.percent
        };
        let mut head = || (0..self.tokens).map(Position).filter(|_| keep()).collect::<Vec<_>>();
        (0..self.heads).map(|_| head()).collect()
    }
}

/// Bits of element `at`.
fn bits(slice: HostSlice<'_>, at: usize) -> u32 {
    match slice {
        HostSlice::F32(s) => s[at].to_bits(),
        HostSlice::F16(s) => u32::from(s[at].to_bits()),
        HostSlice::BF16(s) => u32::from(s[at].to_bits()),
    }
}

/// Every kept row of `view` is where `got` says it is, bit for bit.
fn verify(view: &HostLayer<'_>, kept: &Ragged<Position>, got: &HostLayer<'_>) {
    for (h, row) in kept.iter().enumerate() {
        assert_eq!(got.positions().expect("a compacted layer")[h], row);
        for (s, p) in row.iter().enumerate() {
            for (from, to) in [(view.k(), got.k()), (view.v(), got.v())] {
                let (a, b) = (from.start(h, p.index()), to.start(h, s));
                let same = |j| bits(from.storage(), a + j) == bits(to.storage(), b + j);
                assert!((0..DIM as usize).all(same), "head {h}, position {p}");
            }
        }
    }
}

fn bench(c: &mut Criterion, case: Case) {
    let shape = LayerShape::new(case.heads, case.heads, DIM).expect("valid");
    let elements = (case.tokens * case.heads * DIM) as usize;
    let data: [Vec<f32>; 2] = [0, 1].map(|t| (0..elements).map(|i| (2 * i + t) as f32).collect());
    let halves = data.each_ref().map(|d| -> Vec<f16> {
        d.iter().map(|x| f16::from_bits((x.to_bits() >> 8) as u16)).collect()
    });
    let rows = |t: usize| {
        let storage = if case.half { HostSlice::F16(&halves[t]) } else { HostSlice::F32(&data[t]) };
        let rows = if case.tokens_first { Rows::tokens_first } else { Rows::heads_first };
        rows(storage, case.heads, case.tokens, DIM).expect("fits")
    };
    let view = LayerView::new(shape, case.tokens, rows(0), rows(1)).expect("fits");
    let (all, kept) = (Case { percent: 100, ..case }.kept(), case.kept());
    let pages = 2 * case.heads * case.tokens.div_ceil(PAGE);
    let mut pool = PagePool::new(view.k().dtype(), DIM, PAGE, pages).expect("memory");

    let mut flat = FlatCache::gather(&view, &kept, 0).expect("valid");
    verify(&view, &kept, &flat.view(shape).expect("same shape"));
    flat = FlatCache::gather(&view, &all, 0).expect("valid");
    flat.compact(&kept).expect("valid");
    verify(&view, &kept, &flat.view(shape).expect("same shape"));
    let mut paged = PagedCache::gather(&mut pool, &view, &all, 0).expect("pages");
    paged.compact(&mut pool, &kept).expect("valid");
    verify(&view, &kept, &paged.view(&pool, shape).expect("same shape"));
    paged.release(&mut pool).expect("its pool");

    let bytes = flat.bytes_used();
    drop(flat);
    let mut group = c.benchmark_group(case.name());
    group.throughput(Throughput::Bytes(2 * bytes));
    group.sample_size(20);
    group.warm_up_time(std::time::Duration::from_millis(300));
    group.measurement_time(std::time::Duration::from_millis(1000));
    let from = vec![1u8; bytes as usize];
    let copy = |to: &mut [u8]| {
        let pieces = to.par_chunks_mut(256 << 10).zip(from.par_chunks(256 << 10));
        pieces.for_each(|(to, from)| to.copy_from_slice(black_box(from)));
    };
    group.bench_function("memcpy", |b| {
        let mut to = vec![2u8; bytes as usize];
        b.iter(|| copy(&mut to));
    });
    group.bench_function("memcpy to new memory", |b| {
        b.iter_with_large_drop(|| {
            let mut to = vec![0u8; bytes as usize];
            copy(&mut to);
            to
        });
    });
    group.bench_function("gather flat", |b| {
        b.iter_with_large_drop(|| FlatCache::gather(&view, black_box(&kept), 0));
    });
    group.bench_function("regather flat", |b| {
        let mut cache = FlatCache::gather(&view, &kept, 0).expect("valid");
        b.iter(|| cache.regather(&view, black_box(&kept), 0));
    });
    group.bench_function("gather paged", |b| {
        // Giving the pages back is timed too: a bit each.
        b.iter(|| {
            let mut cache = PagedCache::gather(&mut pool, &view, &kept, 0).expect("pages");
            cache.release(&mut pool).expect("its pool");
        });
    });
    group.bench_function("compact flat", |b| {
        b.iter_batched_ref(
            || FlatCache::gather(&view, &all, 0).expect("valid"),
            |cache| cache.compact(black_box(&kept)),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("compact paged", |b| {
        b.iter_custom(|rounds| {
            let mut time = std::time::Duration::ZERO;
            for _ in 0..rounds {
                let mut cache = PagedCache::gather(&mut pool, &view, &all, 0).expect("pages");
                let start = std::time::Instant::now();
                cache.compact(&mut pool, black_box(&kept)).expect("valid");
                time += start.elapsed();
                cache.release(&mut pool).expect("its pool");
            }
            time
        });
    });
    group.finish();
}

/// One token to each of 8 heads, in caches of different lengths: the time is the same.
fn append(c: &mut Criterion) {
    const HEADS: u32 = 8;
    const ROOM: u32 = 4096;
    let mut group = c.benchmark_group("append one token");
    for tokens in [1 << 10, 8 << 10, 64 << 10] {
        let shape = LayerShape::new(HEADS, HEADS, DIM).expect("valid");
        let data = vec![f16::ONE; (tokens * HEADS * DIM) as usize];
        let rows = |n| Rows::heads_first(HostSlice::F16(&data), HEADS, n, DIM).expect("fits");
        let (old, new) = (rows(tokens), rows(1));
        let view = LayerView::new(shape, tokens, old, old).expect("fits");
        let kept: Ragged<Position> =
            (0..HEADS).map(|_| (0..tokens).map(Position).collect::<Vec<_>>()).collect();
        let pages = HEADS * (tokens + ROOM).div_ceil(PAGE);
        let mut pool = PagePool::new(view.k().dtype(), DIM, PAGE, pages).expect("memory");
        let mut flat = FlatCache::gather(&view, &kept, ROOM).expect("valid");
        let mut paged = PagedCache::gather(&mut pool, &view, &kept, ROOM).expect("pages");
        // Full caches are thinned to what they began with, which is not timed.
        group.bench_function(format!("flat T={tokens}"), |b| {
            b.iter_custom(|rounds| {
                let mut time = std::time::Duration::ZERO;
                for first in (0..rounds).step_by(ROOM as usize) {
                    let start = std::time::Instant::now();
                    for _ in first..rounds.min(first + u64::from(ROOM)) {
                        flat.append(black_box(&new), &new).expect("room");
                    }
                    time += start.elapsed();
                    flat.compact(&kept).expect("held");
                }
                time
            });
        });
        group.bench_function(format!("paged T={tokens}"), |b| {
            b.iter_custom(|rounds| {
                let mut time = std::time::Duration::ZERO;
                for first in (0..rounds).step_by(ROOM as usize) {
                    let start = std::time::Instant::now();
                    for _ in first..rounds.min(first + u64::from(ROOM)) {
                        paged.append(&mut pool, black_box(&new), &new).expect("room");
                    }
                    time += start.elapsed();
                    paged.compact(&mut pool, &kept).expect("held");
                }
                time
            });
        });
        paged.release(&mut pool).expect("its pool");
    }
    group.finish();
}

fn compaction(c: &mut Criterion) {
    append(c);
    for case in CASES {
        bench(c, case);
    }
}

criterion_group!(benches, compaction);
criterion_main!(benches);
