//! Exact selection: three levels and the emission, against a sort.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

use crate::gpu::{CANARY, Failure, Gpu, Outcome, expect_equal, launch};
use crate::reference::{self, Random, Segment};

const TILE: usize = 4096;

#[repr(C)]
#[derive(Clone, Default)]
struct SegmentArgument {
    scores: i64,
    length: u32,
    floor: u32,
    contest: u32,
    protected_first: u32,
    protected_end: u32,
    unused: u32,
}
#[repr(C)]
#[derive(Clone, Default)]
struct ContestArgument {
    positions: i64,
    budget: u32,
    first: u32,
    end: u32,
    unused: u32,
}
#[repr(C)]
#[derive(Clone, Debug)]
struct Cut {
    positions: i64,
    threshold: u32,
    ties: u32,
    count: u32,
    nans: u32,
}
#[repr(C)]
struct Tally {
    counts: [u32; 3 * 2 * 2048],
    above: u32,
    floor_prefix: u32,
    floor_above: u32,
    arrivals: u32,
    ticket: u32,
    nans: u32,
    unused: [u32; 2],
}
#[repr(C)]
struct ContestTally {
    steps: [u32; 3 * 2048],
    least: [u32; 3],
    prefix: u32,
    arrivals: u32,
    unused: [u32; 3],
}
// SAFETY: plain old data, laid out as kernels/top_k.cu has it.
unsafe impl DeviceRepr for SegmentArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for ContestArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for Cut {}
// SAFETY: as above.
unsafe impl DeviceRepr for Tally {}
// SAFETY: as above.
unsafe impl DeviceRepr for ContestTally {}
// SAFETY: integers.
unsafe impl ValidAsZeroBits for Tally {}
// SAFETY: integers.
unsafe impl ValidAsZeroBits for ContestTally {}

/// Segments that compete, and for how many slots.
struct Contest {
    budget: usize,
    segments: Vec<Segment>,
}

struct Case {
    name: &'static str,
    blocks: usize,
    contests: Vec<Contest>,
}

/// Scores with many ties, both zeros, NaN and infinities.
fn awkward(random: &mut Random, n: usize) -> Vec<f32> {
    const VALUES: [f32; 9] =
        [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, 0.99999994];
    (0..n).map(|_| VALUES[random.below(VALUES.len())]).collect()
}

fn cases() -> Vec<Case> {
    let mut random = Random(2);
    let plain = |scores| Segment { scores, ..Segment::default() };
    let alone = |scores: Vec<f32>, budget| Contest { budget, segments: vec![plain(scores)] };
    let of = |name, blocks, contests| Case { name, blocks, contests };

    let mut lengths = Vec::new();
    for n in [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 1025] {
        lengths.push(alone(random.units(n), n.div_ceil(3)));
    }
    for k in [0, 1, 63, 64, 65] {
        lengths.push(alone(random.units(64), k));
    }
    let ties = [0, 17, 4096, 4097, 4500].map(|k| alone(vec![0.25; 4500], k));
    let zeros =
        [1, 3, 6].map(|k| alone(vec![-0.0, 0.0, f32::NAN, -1e-45, 0.0, -0.0, -f32::NAN, 1e-45], k));
    let nans = [0, 1, 40, 70].map(|k| alone(vec![f32::NAN; 70], k));
    let tiles = [TILE - 1, TILE, TILE + 1, 2 * TILE + 5]
        .map(|n| alone((0..n).map(|_| (random.unit() * 50.0).round()).collect(), n / 5));
    // More tiles than a warp looks back over at once.
    let long = alone((0..34 * TILE + 77).map(|_| (random.unit() * 3.0).round()).collect(), 30_000);

    let layer =
        heads(&mut random, &[300, 0, 511, 77, 1, 600, 33, 32], &[10, 0, 60, 5, 1, 0, 33, 8], 420);
    let floors_only = heads(&mut random, &[100, 200, 50], &[7, 20, 50], 77);
    let everything = heads(&mut random, &[64, 65, 0, 3], &[1, 2, 0, 3], 132);
    let more_than_all = heads(&mut random, &[20, 7], &[1, 2], 40);
    let mut guarded = heads(&mut random, &[500, 260, 40, 100], &[4, 20, 0, 100], 300);
    guarded.segments[0].protected = vec![0..4, 468..500];
    guarded.segments[1].protected = vec![0..4, 100..120, 228..260];
    guarded.segments[3].protected = vec![0..60, 60..100];
    let awkward = Contest {
        budget: 900,
        segments: [700, 1300, 0, 5]
            .map(|n| Segment {
                scores: awkward(&mut random, n),
                floor: n / 10,
                protected: vec![n / 2..n / 2 + 1; n.min(1)],
            })
            .into(),
    };
    vec![
        of("lengths", 1, lengths),
        of("ties", 2, ties.into()),
        of("zeros", 1, zeros.into()),
        of("nans", 2, nans.into()),
        of("tiles", 3, tiles.into()),
        of("contests", 2, vec![layer, floors_only, everything, more_than_all, guarded, awkward]),
        of("long", 9, vec![long]),
    ]
}

fn heads(random: &mut Random, lengths: &[usize], floors: &[usize], budget: usize) -> Contest {
    // Some heads score so low that their floors decide.
    let shifts = [0.0, -3.0, 2.0, 0.0].into_iter().cycle();
    let segments = lengths.iter().zip(floors).zip(shifts).map(|((&n, &floor), shift)| {
        let scores = random.units(n).iter().map(|x| (x * 64.0).round() / 64.0 + shift).collect();
        Segment { scores, floor, protected: Vec::new() }
    });
    Contest { budget, segments: segments.collect() }
}

pub fn top_k(gpu: &Gpu) -> Outcome {
    cases().iter().try_for_each(|case| run(gpu, case))
}

/// Of a contest with more segments than a block has threads.
pub fn top_k_of_many(gpu: &Gpu) -> Outcome {
    let many = heads(&mut Random(7), &[9; 260], &[1; 260], 800);
    run(gpu, &Case { name: "many", blocks: 1, contests: vec![many] })
}

fn run(gpu: &Gpu, case: &Case) -> Outcome {
    let (mut scores, mut ranges) = (Vec::new(), Vec::<u32>::new());
    let (mut segments, mut contests) = (Vec::new(), Vec::new());
    let (mut positions, mut longest) = (0, 1);
    for (c, contest) in case.contests.iter().enumerate() {
        let first = segments.len();
        for segment in &contest.segments {
            let protected_first = ranges.len() / 2;
            ranges.extend(segment.protected.iter().flat_map(|r| [r.start as u32, r.end as u32]));
            segments.push(SegmentArgument {
                scores: scores.len() as i64,
                length: segment.scores.len() as u32,
                floor: segment.floor as u32,
                contest: c as u32,
                protected_first: protected_first as u32,
                protected_end: (ranges.len() / 2) as u32,
                unused: 0,
            });
            longest = longest.max(segment.scores.len());
            scores.extend_from_slice(&segment.scores);
            // What is between the segments must not be looked at: it would win.
            scores.resize(scores.len().next_multiple_of(4) + 4, f32::INFINITY);
        }
        let (first, end) = (first as u32, segments.len() as u32);
        contests.push(ContestArgument {
            positions,
            budget: contest.budget as u32,
            first,
            end,
            unused: 0,
        });
        positions += contest.budget as i64;
    }

    let n = segments.len();
    let (d_scores, d_segments, d_ranges) =
        (gpu.upload(&scores)?, gpu.upload(&segments)?, gpu.upload(&ranges)?);
    let d_contests = gpu.upload(&contests)?;
    let mut tallies = gpu.zeros::<Tally>(n)?;
    let mut contest_tallies = gpu.zeros::<ContestTally>(contests.len())?;
    let mut cuts = gpu.scratch::<Cut>(n)?;
    for level in 0..3i32 {
        launch!(gpu, "top_k_level", (case.blocks, n), 256, 0; &d_scores, &d_segments, &d_ranges, &d_contests,
            &mut tallies, &mut contest_tallies, &mut cuts, &level);
    }
    let tiles = longest.div_ceil(TILE);
    let mut status = gpu.zeros::<u64>(n * tiles)?;
    let mut kept = gpu.upload(&vec![CANARY; positions as usize])?;
    launch!(gpu, "top_k_emit", (tiles, n), 256, 0; &d_scores, &d_segments, &d_ranges, &cuts, &mut tallies,
        &mut status, &mut kept);

    let (cuts, kept) = (gpu.download(&cuts)?, gpu.download(&kept)?);
    for (contest, argument) in case.contests.iter().zip(&contests) {
        let mut at = argument.positions as usize;
        let want = reference::top_k(&contest.segments, contest.budget);
        for (i, (want, s)) in want.iter().zip(argument.first as usize..).enumerate() {
            let what = format!(
                "{}, {} of {} slots in segment {i}",
                case.name,
                contest.budget,
                contest.segments[i].scores.len()
            );
            let cut = &cuts[s];
            if (cut.positions, cut.count) != (at as i64, want.len() as u32) {
                return Err(Failure::Wrong(format!(
                    "{what}: {} at {at} expected, {cut:?} came",
                    want.len()
                )));
            }
            expect_equal(&what, &kept[at..at + want.len()], want)?;
            at += want.len();

            let Segment { scores, protected, .. } = &contest.segments[i];
            let unprotected = |t: &usize| !protected.iter().any(|range| range.contains(t));
            let nans =
                (0..scores.len()).filter(unprotected).filter(|&t| scores[t].is_nan()).count();
            expect_equal(&format!("{what}, NaN"), &[cut.nans], &[nans as u32])?;
        }
    }
    Ok(())
}
