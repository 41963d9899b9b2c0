//! What only callers of [`launch`] see: lengths below what the host assumed, spans from the end, a workspace used again,
//! blocks of several tiles; and how often a key is read.

use std::ops::Range;

use super::*;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Floats;
use crate::backend::cuda::driver::Memory;
use crate::backend::ops::{Pool, TopK};

/// The last `n` slots.
fn last(n: i64) -> Span {
    Span { start: -1 - n, end: -1 }
}

/// Scores without ties, but for a few.
fn scores(len: u32, seed: u32) -> Vec<f32> {
    (0..len).map(|t| (t ^ seed).wrapping_mul(2_654_435_761) as i32 as f32 / 1e6).collect()
}

/// The CPU's answer for rows of these lengths.
fn want(
    rows: &Ragged<f32>,
    lens: &[u32],
    contests: &[Contest],
    protected: &Ragged<Span>,
) -> Ragged<u32> {
    let held = |s: usize| u64::from(lens[s]);
    let clamped = |contest: &Contest| {
        let segments = contest.segments.clone();
        let floors = segments.clone().zip(&contest.floors).map(|(s, &f)| f.min(held(s))).collect();
        let budget = contest.budget.min(segments.clone().map(held).sum());
        Contest { segments, budget, floors }
    };
    let contests: Vec<Contest> = contests.iter().map(clamped).collect();
    let spans = |s: usize| {
        let len = i64::from(lens[s]);
        let resolve = |x: i64| (if x < 0 { len + 1 + x } else { x }).clamp(0, len) as u32;
        let ranges = protected.row(s).iter().map(|p| resolve(p.start)..resolve(p.end));
        ranges.collect::<Vec<Range<u32>>>()
    };
    let protected: Ragged<Range<u32>> = (0..lens.len()).map(spans).collect();
    let rows: Ragged<f32> =
        (0..lens.len()).map(|s| rows.row(s)[..lens[s] as usize].to_vec()).collect();
    let op = TopK { contests: &contests, protected: &protected };
    Cpu::new().top_k(&op, &[(&rows, 0..lens.len())]).expect("a selection")
}

#[test]
fn lengths_are_the_devices() {
    simcuda::install();
    let ordinal = simcuda::device();
    let cuda = Cuda::new(ordinal).expect("a device");
    let longest = [9000, 5000, 70, 12_289];
    let rows: Ragged<f32> = (0..).zip(longest).map(|(s, n)| scores(n, s)).collect();
    let on_device = Floats::upload(&cuda, &rows).expect("rows");
    let contests = [
        Contest { segments: 0..3, budget: 6000, floors: vec![0, 1500, 70] },
        Contest { segments: 3..4, budget: 4097, floors: vec![9] },
    ];
    let sinks = Span::from(0..4);
    let protected: Ragged<Span> =
        [vec![sinks, last(32)], vec![last(2000)], vec![], vec![sinks, Span::from(50..60), last(1)]]
            .into_iter()
            .collect();
    let (avg, max) = (|radius| Some((Pooling::Avg, radius)), Some((Pooling::Max, 64)));
    let smoothed = Floats::new(&cuda, &longest).expect("rows");
    for (per_block, smooth) in
        [(1, None), (2, None), (5, None), (1, avg(2)), (2, avg(31)), (2, max), (5, avg(0))]
    {
        let mut problem = Problem::new(&cuda, &contests, &protected, &longest).expect("a problem");
        problem.shape.per_block = per_block;
        let shape = problem.shape;
        let workspace = Memory::new(&cuda.driver, "workspace", workspace_bytes(&shape));
        let workspace = workspace.expect("a workspace");
        let mut table = Table::default();
        let lengths = table.push(&longest);
        let slots = problem.into_table(&mut table);
        let sent = table.send(&cuda).expect("tables");
        let inputs = slots.inputs(&sent, on_device.rows(), sent.at(lengths));
        for lens in [longest, [8999, 4096, 0, 12_288], [36, 2000, 1, 61], [0; 4], longest] {
            let now = Memory::new(&cuda.driver, "lengths", size_of_val(&lens)).expect("lengths");
            now.write(0, &lens).expect("lengths");
            let mut inputs = Inputs { lengths: now.at(0), ..inputs };
            let mut scores = rows.clone();
            if let Some((kind, radius)) = smooth {
                let lengths = now.at(0);
                let smoothing = Smoothing { kind, radius, from: on_device.rows(), lengths };
                (inputs.rows, inputs.smoothing) = (smoothed.rows(), Some(smoothing));
                let pool = Pool { kind, kernel: 2 * radius + 1, lens: &lens };
                Cpu::new().pool(&pool, &mut scores).expect("pooled rows");
            }
            let out = |bytes| {
                let memory = Memory::new(&cuda.driver, "a selection", bytes).expect("memory");
                memory.clear(0, bytes).expect("memory");
                memory
            };
            let cuts = out(size_of::<Cut>() * shape.segments);
            let positions = out(size_of::<u32>() * shape.positions);
            launch(&cuda, &shape, inputs, cuts.at(0), positions.at(0), workspace.at(0))
                .expect("a launch");
            let cuts = cuts.read::<Cut>(0, shape.segments);
            let positions = positions.read::<u32>(0, shape.positions);
            simcuda::assert_clean(ordinal);
            let (cuts, positions) = (cuts.expect("cuts"), positions.expect("positions"));
            let of = |cut: &Cut| positions[cut.start as usize..][..cut.count as usize].to_vec();
            let got: Ragged<u32> = cuts.iter().map(of).collect();
            let want = want(&scores, &lens, &contests, &protected);
            assert_eq!(got, want, "{lens:?}, {per_block} tiles a block, {smooth:?}");
        }
    }
}

#[test]
fn keys_are_read_twice() {
    if simcuda::install() == simcuda::Installed::RealDriver {
        return;
    }
    let ordinal = simcuda::device();
    let cuda = Cuda::new(ordinal).expect("a device");
    let len = 1 << 17;
    // Uniform from -1147 to 3147: the cut is in a bin of the first digit, a quarter of an octave, with an eighth of all.
    let row: Vec<f32> = scores(len, 3).into_iter().map(|x| x + 1000.0).collect();
    let rows = Floats::upload(&cuda, &[row].into_iter().collect()).expect("rows");
    let contest = Contest { segments: 0..1, budget: u64::from(len) / 4, floors: vec![0] };
    let op = TopK { contests: &[contest], protected: &[vec![]].into_iter().collect() };
    simcuda::clear_counters(ordinal);
    cuda.top_k(&op, &[(&rows, 0..1)]).expect("a selection");
    let read = |kernel| simcuda::counters(ordinal, kernel).1.global_load.bytes;
    let kernels = ["top_k_level_0", "top_k_level_1", "top_k_level_2", "top_k_emit"];
    let reads = kernels.map(|kernel| read(kernel) as f64 / f64::from(4 * len));
    println!("of N keys read: {reads:.3?}");
    simcuda::assert_clean(ordinal);
    assert!(reads.iter().sum::<f64>() < 2.5, "{reads:?} of N keys read");
}
