//! Selection: exact, unique, ascending, whatever the scores.

use std::fmt::Debug;
use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Contest, TopK};
use kvbudget::{Ragged, Result};

use super::{fails, pass, read, upload, wide};
use crate::compare;
use crate::data::TestDevice;
use crate::generate::{LENGTHS, Protected, Rng, Scores};
use crate::naive;

/// A selection problem, and how its rows are split into parts.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub scores: Vec<Vec<f32>>,
    pub contests: Vec<Contest>,
    pub protected: Vec<Vec<Range<u32>>>,
}

impl Problem {
    /// All segments in one contest.
    fn one(scores: Vec<Vec<f32>>, budget: u64, floors: Vec<u64>, protected: Protected) -> Self {
        Self {
            protected: scores.iter().map(|row| protected.ranges(row.len() as u32)).collect(),
            contests: vec![Contest { segments: 0..scores.len(), budget, floors }],
            scores,
        }
    }

    /// Solves it with all rows in one part.
    fn solve<D: TestDevice>(&self, device: &D) -> Result<<D::Backend as Backend>::Selection> {
        let rows = upload(device, &self.scores);
        self.solve_parts(device, &[(&rows, 0..self.scores.len())])
    }

    fn solve_parts<D: TestDevice>(
        &self,
        device: &D,
        parts: &[(&<D::Backend as Backend>::Floats, Range<usize>)],
    ) -> Result<<D::Backend as Backend>::Selection> {
        let protected = self.protected.iter().cloned().collect();
        device.backend().top_k(&TopK { contests: &self.contests, protected: &protected }, parts)
    }

    pub(super) fn want(&self) -> Vec<Vec<u32>> {
        naive::top_k(&wide(&self.scores), &self.contests, &self.protected)
    }

    #[track_caller]
    pub(super) fn check<D: TestDevice>(&self, device: &D, case: &dyn Debug) {
        self.check_result(device, case, self.solve(device), &self.want());
    }

    #[track_caller]
    pub(super) fn check_result<D: TestDevice>(
        &self,
        device: &D,
        case: &dyn Debug,
        got: Result<<D::Backend as Backend>::Selection>,
        want: &[Vec<u32>],
    ) {
        let backend = device.backend();
        let got = got.unwrap_or_else(|e| panic!("{case:?}: {e}\n{self:?}"));
        let slots = backend.selection_to_host(&got).expect("a selection can be read");
        pass(&(case, self), compare::selections(&slots, want));
        let counts = backend.selected(&got).expect("a selection can be counted");
        let want: Vec<u32> = want.iter().map(|row| row.len() as u32).collect();
        pass(&(case, self, "counts"), compare::equal(&counts, &want));
    }
}

/// Nothing, one, a third, all but one, all.
fn budgets(len: u64) -> Vec<u64> {
    let mut budgets = vec![0, 1, len / 3, len.saturating_sub(1), len];
    budgets.retain(|&k| k <= len);
    budgets.dedup();
    budgets
}

/// Every length, budget and protection on one segment.
pub fn lengths<D: TestDevice>(device: &D) {
    for len in LENGTHS {
        for kind in [Scores::Random, Scores::Ties] {
            for protected in Protected::ALL {
                for budget in budgets(u64::from(len)) {
                    let scores = vec![kind.row(len, u64::from(len))];
                    let problem = Problem::one(scores, budget, vec![0], protected);
                    problem.check(device, &(len, kind, protected));
                }
            }
        }
    }
}

/// Segments of uneven length, empty ones at the ends and between.
const SEGMENTS: [&[u32]; 7] = [
    &[1],
    &[0],
    &[0, 5, 0],
    &[64, 64, 64, 64],
    &[33, 1, 64, 0, 257, 2],
    &[1, 1, 1, 1, 1, 1, 1, 1, 1],
    &[3, 700, 129],
];

fn rows(lens: &[u32], kind: Scores, seed: u64) -> Vec<Vec<f32>> {
    (0u64..).zip(lens).map(|(s, &len)| kind.row(len, seed + 31 * s)).collect()
}

/// Every kind of score, on segments that compete: ties go to the smaller segment, then to the smaller slot.
pub fn values<D: TestDevice>(device: &D) {
    for lens in SEGMENTS {
        let total: u32 = lens.iter().sum();
        for kind in Scores::ALL {
            for protected in Protected::ALL {
                for budget in budgets(u64::from(total)) {
                    let floors = vec![0; lens.len()];
                    let problem = Problem::one(rows(lens, kind, 4), budget, floors, protected);
                    problem.check(device, &(kind, protected));
                }
            }
        }
    }
}

/// Floors that are nothing, one slot, everything, and anything; budgets from the floors' sum (nothing left to
/// contest) to everything.
pub fn floors<D: TestDevice>(device: &D) {
    let rng = &mut Rng::new(11);
    for lens in SEGMENTS {
        let mut any = |&len: &u32| rng.below(u64::from(len) + 1);
        let all_floors: [Vec<u64>; 5] = [
            lens.iter().map(|&n| u64::from(n.min(1))).collect(),
            lens.iter().map(|&n| u64::from(n)).collect(),
            lens.iter().map(|&n| u64::from(n / 5)).collect(),
            lens.iter().map(&mut any).collect(),
            lens.iter().map(&mut any).collect(),
        ];
        let total = lens.iter().map(|&n| u64::from(n)).sum::<u64>();
        for floors in all_floors {
            let least = floors.iter().sum::<u64>();
            for spare in budgets(total - least) {
                for (kind, protected) in [
                    (Scores::Random, Protected::Nothing),
                    (Scores::Ties, Protected::SinksAndRecent),
                    (Scores::Extremes, Protected::Middle),
                    (Scores::Equal, Protected::Everything),
                ] {
                    let scores = rows(lens, kind, 21);
                    let problem = Problem::one(scores, least + spare, floors.clone(), protected);
                    problem.check(device, &(kind, protected));
                }
            }
        }
    }
}

/// Several contests at once: a segment each, pairs, contests of nothing. One's budget is no other's.
pub fn contests<D: TestDevice>(device: &D) {
    let lens = [40, 0, 33, 64, 7, 129];
    let rng = &mut Rng::new(12);
    for cuts in [vec![0, 1, 2, 3, 4, 5, 6], vec![0, 2, 4, 6], vec![0, 1, 6], vec![0, 6]] {
        for kind in Scores::ALL {
            let mut contests = Vec::new();
            for w in cuts.windows(2) {
                let lens = &lens[w[0]..w[1]];
                let floors: Vec<u64> =
                    lens.iter().map(|&n| rng.below(u64::from(n) / 4 + 1)).collect();
                let (least, most) = (floors.iter().sum::<u64>(), lens.iter().sum::<u32>());
                let budget = least + rng.below(u64::from(most) - least + 1);
                contests.push(Contest { segments: w[0]..w[1], budget, floors });
            }
            let protected = lens.map(|n| Protected::SinksAndRecent.ranges(n)).to_vec();
            let problem = Problem { scores: rows(&lens, kind, 2), contests, protected };
            problem.check(device, &(kind, &cuts));
        }
    }
    Problem { scores: vec![], contests: vec![], protected: vec![] }.check(device, &"nothing");
}

/// Around and over several tiles, in one contest and in many; the cut in a crowd of ties, or among few.
pub fn tiles<D: TestDevice>(device: &D) {
    let lens = [4095, 4097, 0, 8193, 1, 12_288, 4096];
    let total: u64 = lens.iter().map(|&n| u64::from(n)).sum();
    for (kind, protected) in [
        (Scores::Random, Protected::SinksAndRecent),
        (Scores::Ties, Protected::Nothing),
        (Scores::Equal, Protected::Middle),
    ] {
        let floors = lens.iter().map(|&n| u64::from(n) / 9).collect();
        let problem = Problem::one(rows(&lens, kind, 9), total / 3, floors, protected);
        problem.check(device, &(kind, protected));
        let contest = |(s, &n): (usize, &u32)| Contest {
            segments: s..s + 1,
            budget: u64::from(n) * 2 / 3,
            floors: vec![u64::from(n > 1)],
        };
        let contests = lens.iter().enumerate().map(contest).collect();
        Problem { contests, ..problem }.check(device, &(kind, protected, "each its own"));
    }
}

/// Rows that come from several containers, and from parts of them, are numbered part after part.
pub fn parts<D: TestDevice>(device: &D) {
    let scores = rows(&[20, 33, 0, 64, 5], Scores::Ties, 8);
    let problem = Problem::one(scores.clone(), 40, vec![3, 0, 0, 1, 1], Protected::SinksAndRecent);
    let noise = || vec![f32::INFINITY; 9];
    for cut in 0..=scores.len() {
        let first = upload(device, &[&[noise()], &scores[..cut]].concat());
        let last = upload(device, &[&scores[cut..], &[noise(), noise()]].concat());
        let given = [(&first, 1..cut + 1), (&last, 0..scores.len() - cut)];
        let got = problem.solve_parts(device, &given);
        problem.check_result(device, &("cut", cut), got, &problem.want());
    }
}

/// Everything at random, small enough to read when it fails.
pub fn random_problems<D: TestDevice>(device: &D) {
    for seed in 0..400 {
        let rng = &mut Rng::new(seed);
        let kind = Scores::ALL[rng.below(10) as usize];
        let protected = Protected::ALL[rng.below(5) as usize];
        let lens: Vec<u32> = (0..1 + rng.below(5)).map(|_| rng.below(12) as u32).collect();
        let floors: Vec<u64> = lens.iter().map(|&n| rng.below(u64::from(n) / 2 + 1)).collect();
        let least = floors.iter().sum::<u64>();
        let budget = least + rng.below(u64::from(lens.iter().sum::<u32>()) - least + 1);
        let problem = Problem::one(rows(&lens, kind, seed), budget, floors, protected);
        problem.check(device, &(seed, kind, protected));
    }
}

/// Pinning takes the best of one list and marks them in another.
pub fn pins<D: TestDevice>(device: &D) {
    for kind in Scores::ALL {
        let by = rows(&LENGTHS, kind, 3);
        let scores = rows(&LENGTHS, Scores::Random, 99);
        for third in 0..4 {
            let counts: Vec<u32> = LENGTHS.iter().map(|n| n * third / 3).collect();
            let mut on_device = upload(device, &scores);
            let pinned = device.backend().pin_top(&counts, &upload(device, &by), &mut on_device);
            pinned.unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            let (mut want, by) = (wide(&scores), wide(&by));
            for (s, row) in want.iter_mut().enumerate() {
                naive::pin_top(counts[s], &by[s], row);
            }
            pass(&(kind, third), compare::exact(&read(device, &on_device), &want));
        }
    }
}

/// Dropping takes the best of one list, but for what is out of the question there, and lowers what is positive in another.
pub fn drops<D: TestDevice>(device: &D) {
    for kind in Scores::ALL {
        let by = rows(&LENGTHS, kind, 3);
        for (third, of) in
            [(0, Scores::Random), (1, Scores::Extremes), (2, Scores::Ties), (3, Scores::Random)]
        {
            let scores = rows(&LENGTHS, of, 99);
            let counts: Vec<u32> = LENGTHS.iter().map(|n| n * third / 3).collect();
            let mut on_device = upload(device, &scores);
            let dropped = device.backend().drop_top(&counts, &upload(device, &by), &mut on_device);
            dropped.unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            let (mut want, by) = (wide(&scores), wide(&by));
            for (s, row) in want.iter_mut().enumerate() {
                naive::drop_top(counts[s], &by[s], row);
            }
            pass(&(kind, third), compare::exact(&read(device, &on_device), &want));
        }
    }
}

/// Masses are multiples of 1/1024, so that sums are exact and the crossing is where it is.
pub fn masses<D: TestDevice>(device: &D) {
    let mut rows: Vec<Vec<f32>> = vec![
        vec![],
        vec![1.0],
        vec![0.0; 9],
        vec![0.0, 0.5, 0.0, 0.25, 0.25],
        vec![0.125; 8],
        vec![0.0625; 8],
    ];
    let rng = &mut Rng::new(6);
    for len in LENGTHS {
        let mut row = vec![0u32; len as usize];
        let spent = if len == 0 { 0 } else { rng.below(1025) };
        (0..spent).for_each(|_| {
            row[rng.below(u64::from(len)).min(rng.below(u64::from(len))) as usize] += 1
        });
        rows.push(row.iter().map(|&n| n as f32 / 1024.0).collect());
    }
    // Long, of many small masses, and with one that has all but nothing.
    rows.push((0..5000).map(|t| if t % 5 == 0 { 1.0 / 1024.0 } else { 0.0 }).collect());
    rows.push((0..3000).map(|t| if t == 2999 { 1.0 - 1.0 / 1024.0 } else { 0.0 }).collect());
    let on_device = upload(device, &rows);
    let every = [0.0, 0.25, 0.5, 0.875, 0.9375, 1.0];
    for first in 0..every.len() {
        // Neighbours have different thresholds, and each row meets all of them.
        let thresholds: Vec<f32> = every.into_iter().cycle().skip(first).take(rows.len()).collect();
        for cap in [0, 1, 3, u32::MAX] {
            let caps: Vec<u32> = rows.iter().map(|row| cap.min(row.len() as u32)).collect();
            let got = device.backend().mass_count(&thresholds, &caps, &on_device);
            let got = got.unwrap_or_else(|e| panic!("{first}: {e}"));
            let limits = thresholds.iter().zip(&caps);
            let want: Vec<u32> = wide(&rows)
                .iter()
                .zip(limits)
                .map(|(row, (&t, &cap))| naive::mass_count(f64::from(t), cap, row))
                .collect();
            pass(&(first, cap), compare::equal(&got, &want));
        }
    }
}

/// Sums of what is not protected: to the last unit, over every kind of number and range.
pub fn free_masses<D: TestDevice>(device: &D) {
    let attention = |len: u32| {
        let rng = &mut Rng::new(7);
        (0..len).map(|_| (rng.unit() / f64::from(len)) as f32).collect::<Vec<_>>()
    };
    for kind in Protected::ALL {
        let mut rows: Vec<Vec<f32>> = LENGTHS.into_iter().chain([5000]).map(attention).collect();
        rows.extend(Scores::ALL.map(|scores| scores.row(1025, 3)));
        // Half a unit, a little less; a sum that is too large.
        rows.push(vec![2f32.powi(-41), 2f32.powi(-41), 1.4 * 2f32.powi(-42)]);
        rows.push(vec![8e6; 40]);
        let protected: Ragged<_> = rows.iter().map(|row| kind.ranges(row.len() as u32)).collect();
        let got = device.backend().free_mass(&protected, &upload(device, &rows));
        let got = got.unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        let wide = wide(&rows);
        let want: Vec<u64> = protected
            .iter()
            .zip(&wide)
            .map(|(ranges, row)| naive::free_mass(ranges, row))
            .collect();
        pass(&kind, compare::equal(&got, &want));
    }
    let outside = Ragged::filled([1], 0..9);
    fails(&"outside", device.backend().free_mass(&outside, &upload(device, &[vec![0.0; 8]])));
}

/// Problems without a solution, and problems that are none.
pub fn errors<D: TestDevice>(device: &D) {
    let contest =
        |segments, budget, floors: &[u64]| Contest { segments, budget, floors: floors.to_vec() };
    for (case, contests) in [
        ("budget above the slots", vec![contest(0..2, 18, &[0, 0])]),
        ("floors above the budget", vec![contest(0..2, 3, &[2, 2])]),
        ("floor above its segment", vec![contest(0..2, 17, &[9, 0])]),
        ("a floor short", vec![contest(0..2, 3, &[1])]),
        ("a segment outside", vec![contest(0..1, 3, &[0])]),
        ("a segment too many", vec![contest(0..3, 3, &[0, 0, 0])]),
        ("a segment twice", vec![contest(0..2, 3, &[0, 0]), contest(1..2, 1, &[0])]),
        ("descending", vec![contest(1..2, 1, &[0]), contest(0..1, 3, &[0])]),
        ("sums that overflow", vec![contest(0..2, 3, &[u64::MAX, 4])]),
    ] {
        let scores = rows(&[8, 9], Scores::Random, 1);
        let problem = Problem { scores, contests, protected: vec![vec![], vec![]] };
        fails(&case, problem.solve(device));
    }
    for (case, protected) in [
        ("protected past the end", vec![vec![0..9], vec![]]),
        ("protection of a segment missing", vec![vec![]]),
    ] {
        let scores = rows(&[8, 9], Scores::Random, 1);
        let problem = Problem { scores, contests: vec![contest(0..2, 5, &[0, 0])], protected };
        fails(&case, problem.solve(device));
    }
    let few = upload(device, &[vec![0.5; 4]]);
    let mut rows = upload(device, &[vec![0.5; 4]]);
    let backend = device.backend();
    fails(&"too many pins", backend.pin_top(&[5], &few, &mut rows));
    fails(&"too many drops", backend.drop_top(&[5], &few, &mut rows));
    fails(&"caps", backend.mass_count(&[0.9], &[1, 1], &few));
    fails(&"thresholds", backend.mass_count(&[0.9, 0.9], &[1], &few));
}
