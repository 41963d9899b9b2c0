//! Exact selection: what a contest over a layer, or over all layers, costs.
//!
//! Three reads of the scores at most (keys are not stored), and one write per kept slot: memory binds where they exceed
//! the caches, counting digits where not. Axes: length, heads, kept, ties. The result is checked once against a sort, then timed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvbudget::Ragged;
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::Cpu;
use kvbudget::backend::ops::{Contest, TopK};

/// Scores with `distinct` values (0: all different, as random floats are).
fn scores(heads: usize, len: usize, distinct: u32) -> Ragged<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let random = (state >> 40) as u32;
        match distinct {
            0 => (random as f32 / (1 << 24) as f32).powi(8),
            n => (random % n) as f32,
        }
    };
    (0..heads).map(|_| (0..len).map(|_| next()).collect()).collect()
}

fn contest(heads: usize, len: usize, kept_percent: u64) -> Contest {
    let budget = (heads * len) as u64 * kept_percent / 100;
    let floor = budget / heads as u64 / 5;
    Contest { segments: 0..heads, budget, floors: vec![floor; heads] }
}

/// The same selection by sorting everything.
fn by_sort(scores: &Ragged<f32>, contest: &Contest) -> Vec<Vec<u32>> {
    let mut order: Vec<(usize, u32)> =
        (0..scores.rows()).flat_map(|h| (0..scores.len(h) as u32).map(move |t| (h, t))).collect();
    order.sort_by(|a, b| {
        let score = |&(h, t): &(usize, u32)| scores.row(h)[t as usize];
        score(b).total_cmp(&score(a))
    });
    let mut kept = vec![Vec::new(); scores.rows()];
    let mut rest = Vec::new();
    for (h, t) in order {
        if (kept[h].len() as u64) < contest.floors[h] {
            kept[h].push(t);
        } else {
            rest.push((h, t));
        }
    }
    let missing = contest.budget - contest.floors.iter().sum::<u64>();
    rest.into_iter().take(missing as usize).for_each(|(h, t)| kept[h].push(t));
    kept.iter_mut().for_each(|row| row.sort_unstable());
    kept
}

fn selection(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut group = c.benchmark_group("selection");
    // heads · layers, length, kept %, distinct scores
    let points = [
        (8, 4096, 20, 0),
        (8, 32768, 20, 0),
        (8, 32768, 5, 0),
        (8, 32768, 20, 229),
        (8, 32768, 20, 1),
        (256, 4096, 20, 0),
    ];
    for (heads, len, kept, distinct) in points {
        let scores = scores(heads, len, distinct);
        let contests = [contest(heads, len, kept)];
        let protected = Ragged::filled(vec![0; heads], 0..0);
        let op = TopK { contests: &contests, protected: &protected };
        let run = || cpu.top_k(&op, &[(&scores, 0..heads)]).expect("a valid selection");
        let expected = by_sort(&scores, &contests[0]);
        assert!(run().iter().eq(expected.iter().map(Vec::as_slice)), "the selection is wrong");
        let name = format!("{heads}x{len}/keep{kept}%/distinct{distinct}");
        group.throughput(Throughput::Elements((heads * len) as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(run));
    }
    group.finish();
}

criterion_group!(benches, selection);
criterion_main!(benches);
