//! Pooling and selection as one operation: bit for bit the two, whatever the rows; and the NaN that it counts.

use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Contest, Pool, Pooling, TopK};
use kvbudget::{Error, Ragged};
use kvbudget_testkit::generate::Scores;

use crate::device::Gpu;

/// Rows and what of them is pooled, protected and contested.
struct Case {
    rows: Ragged<f32>,
    pooled: Vec<u32>,
    contests: Vec<Contest>,
    protected: Ragged<Range<u32>>,
}

impl Case {
    /// Contests of as many segments as `sizes` says; of each row all but the last `window` slots are pooled.
    fn new(lens: &[u32], sizes: &[usize], kind: Scores, window: u32, share: u64) -> Self {
        let rows: Ragged<f32> = (3..).zip(lens).map(|(seed, &n)| kind.row(n, seed)).collect();
        let mut next = 0;
        let mut contest = |&size: &usize| {
            let segments = next..next + size;
            next = segments.end;
            let of = &lens[segments.clone()];
            let floors: Vec<u64> = of.iter().map(|&n| u64::from(n / 9)).collect();
            let slots: u64 = of.iter().map(|&n| u64::from(n)).sum();
            let budget = (slots * share / 4).max(if share > 0 { floors.iter().sum() } else { 0 });
            let floors = if share > 0 { floors } else { vec![0; size] };
            Contest { segments, budget, floors }
        };
        let contests = sizes.iter().map(&mut contest).collect();
        let spans = |&n: &u32| match n {
            0..8 => vec![],
            n => vec![0..4, n / 2..n / 2 + 3, n - window.min(n / 3)..n],
        };
        let pooled = lens.iter().map(|n| n.saturating_sub(window)).collect();
        Self { rows, pooled, contests, protected: lens.iter().map(spans).collect() }
    }

    fn check(&self, gpu: &Gpu, kind: Pooling, kernel: u32) {
        let what = format!("{kind:?} {kernel}, {:?}", self.pooled);
        let (cuda, segments) = (&gpu.cuda, 0..self.rows.rows());
        let pool = Pool { kind, kernel, lens: &self.pooled };
        let op = TopK { contests: &self.contests, protected: &self.protected };
        let raw = cuda.upload(self.rows.clone()).unwrap();
        let mut apart = cuda.upload(self.rows.clone()).unwrap();
        cuda.pool(&pool, &mut apart).unwrap();
        let want = cuda.top_k(&op, &[(&apart, segments)]).unwrap();
        let (rows, got) = cuda.pool_top_k(&pool, &op, &raw).unwrap();

        let bits = |rows| -> Vec<Vec<u32>> {
            let rows = cuda.to_host(rows).unwrap();
            rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
        };
        assert!(bits(&rows) == bits(&apart), "{what}: other rows");
        assert!(bits(&raw) == bits(&cuda.upload(self.rows.clone()).unwrap()), "{what}: raw rows");
        let slots = |selection| cuda.selection_to_host(selection).unwrap();
        assert!(slots(&got) == slots(&want), "{what}: another selection");

        let rows = cuda.to_host(&rows).unwrap();
        let nan = |(row, spans): (&[f32], &[Range<u32>])| {
            let free = |t: &u32| !spans.iter().any(|span| span.contains(t));
            (0..).zip(row).filter(|(t, x)| x.is_nan() && free(t)).count() as u32
        };
        let nan: Vec<u32> = rows.iter().zip(self.protected.iter()).map(nan).collect();
        assert_eq!(got.nan_scores().unwrap(), nan, "{what}: NaN");
        assert_eq!(want.nan_scores().unwrap(), nan, "{what}: NaN of the selection alone");
    }
}

/// Around tiles and warps, empty rows, all slots and none: every kind of score.
pub fn values(gpu: &Gpu) {
    let lens = [1, 0, 4095, 513, 4097, 0];
    for (i, scores) in Scores::ALL.into_iter().enumerate() {
        let kind = [Pooling::Avg, Pooling::Max][i % 2];
        let sizes: &[usize] = [&[6][..], &[1, 1, 1, 1, 1, 1], &[2, 4]][i % 3];
        Case::new(&lens, sizes, scores, 32, 1).check(gpu, kind, 5);
        Case::new(&lens[..4], &[1, 3], scores, 32, 1).check(gpu, [kind, Pooling::Max][i % 2], 7);
    }
}

/// From no neighbours to a halo's full width, everything pooled and little, budgets of nothing and of everything.
pub fn windows(gpu: &Gpu) {
    let lens = [4200, 8193, 0, 129, 4096];
    for (i, kernel) in [1, 3, 63, 129].into_iter().enumerate() {
        let case = |kind, window, share| Case::new(&lens, &[1, 4], kind, window, share);
        case(Scores::Random, 0, i as u64 % 5).check(gpu, Pooling::Avg, kernel);
        case(Scores::Ties, 33, 2).check(gpu, Pooling::Max, kernel);
        case(Scores::Random, 4100, 4 - i as u64).check(gpu, Pooling::Avg, kernel);
    }
}

/// What seeded bugs are tried on.
pub fn averages(gpu: &Gpu) {
    Case::new(&[4300, 70, 4096], &[2, 1], Scores::Random, 32, 1).check(gpu, Pooling::Avg, 5);
}
pub fn maxima(gpu: &Gpu) {
    Case::new(&[4300, 70, 4096], &[2, 1], Scores::Extremes, 32, 1).check(gpu, Pooling::Max, 7);
}

/// So many segments that a block takes two tiles of a row.
pub fn crowd(gpu: &Gpu) {
    let mut lens = vec![1; 600];
    lens[300] = 8200;
    Case::new(&lens, &[600], Scores::Random, 3, 1).check(gpu, Pooling::Avg, 5);
}

#[test]
fn blocks_of_two_tiles_pool_both() {
    crowd(&Gpu::new());
}

#[test]
fn pooled_selections_are_those_of_pooled_rows() {
    values(&Gpu::new());
}

#[test]
fn every_window_is_pooled_on_the_way() {
    windows(&Gpu::new());
}

#[test]
fn pooled_selections_under_every_policy() {
    for policy in crate::device::policies() {
        let gpu = Gpu::under(policy);
        averages(&gpu);
        maxima(&gpu);
    }
}

#[test]
fn what_either_refuses_is_refused() {
    let gpu = Gpu::new();
    let rows = gpu.cuda.upload([vec![1.0; 9], vec![2.0; 5]].into_iter().collect()).unwrap();
    let protected = Ragged::filled([0, 0], 0..0);
    let refused = |kernel, lens: &[u32], budget| {
        let contests = [Contest { segments: 0..2, budget, floors: vec![0; 2] }];
        let pool = Pool { kind: Pooling::Avg, kernel, lens };
        let op = TopK { contests: &contests, protected: &protected };
        gpu.cuda.pool_top_k(&pool, &op, &rows).map(drop).unwrap_err()
    };
    assert!(matches!(refused(4, &[9, 5], 3), Error::Parameter { .. }));
    assert!(matches!(refused(131, &[9, 5], 3), Error::TooLarge { limit: 129, .. }));
    assert!(matches!(refused(3, &[9, 6], 3), Error::Shape { .. }));
    assert!(matches!(refused(3, &[9], 3), Error::Shape { .. }));
    assert!(matches!(refused(3, &[9, 5], 15), Error::Apportion { .. }));
}
