//! Means with bootstrap confidence intervals.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::Serialize;

const RESAMPLES: usize = 2000;
/// What lies outside the interval on each side.
const TAIL: f64 = 0.025;

/// A mean and its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// Samples it was made of.
    pub samples: usize,
}

/// The mean of the strata's means, with a percentile interval: samples are drawn anew within their strata (the
/// tasks), since these were not drawn. None without strata, or with an empty one.
pub fn estimate(strata: &[Vec<f64>]) -> Option<Estimate> {
    if strata.is_empty() || strata.iter().any(Vec::is_empty) {
        return None;
    }
    // The same draws in each call: a report that is written again is the same report.
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            mean(strata.iter().map(|s| mean(s.iter().map(|_| s[rng.random_range(0..s.len())]))))
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let tail = (RESAMPLES as f64 * TAIL) as usize;
    Some(Estimate {
        mean: mean(strata.iter().map(|s| mean(s.iter().copied()))),
        low: means[tail],
        high: means[RESAMPLES - 1 - tail],
        samples: strata.iter().map(Vec::len).sum(),
    })
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fair coin thrown `n` times, with exactly half heads.
    fn coin(n: usize) -> Vec<f64> {
        (0..n).map(|i| (i % 2) as f64).collect()
    }

    #[test]
    fn a_coin_has_the_interval_that_theory_gives() {
        let e = estimate(&[coin(400)]).unwrap();
        let half = 1.96 * (0.25f64 / 400.0).sqrt();
        assert_eq!((e.mean, e.samples), (0.5, 400));
        assert!((e.high - 0.5 - half).abs() < 0.006, "{e:?}, {half}");
        assert!((0.5 - e.low - half).abs() < 0.006, "{e:?}, {half}");
    }

    #[test]
    fn strata_count_alike_whatever_their_size() {
        let e = estimate(&[vec![1.0; 10], vec![0.0; 90]]).unwrap();
        assert_eq!((e.mean, e.low, e.high), (0.5, 0.5, 0.5));
        // Two strata of 200: the variance of the mean of means is that of 400 throws.
        let (one, two) =
            (estimate(&[coin(400)]).unwrap(), estimate(&[coin(200), coin(200)]).unwrap());
        assert!(((one.high - one.low) - (two.high - two.low)).abs() < 0.01);
    }

    #[test]
    fn intervals_cover_as_often_as_they_say() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let covered = (0..200).filter(|_| {
            let throws: Vec<f64> = (0..100).map(|_| f64::from(rng.random_bool(0.3))).collect();
            let e = estimate(&[throws]).unwrap();
            (e.low..=e.high).contains(&0.3)
        });
        // 95 % of 200, and three standard deviations below.
        assert!(covered.count() >= 180);
    }

    #[test]
    fn nothing_has_no_mean() {
        assert_eq!(estimate(&[]), None);
        assert_eq!(estimate(&[vec![1.0], vec![]]), None);
    }
}
