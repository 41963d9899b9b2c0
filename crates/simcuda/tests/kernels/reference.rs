//! What the kernels must compute, in f64 and by the plainest way there is: sorts, loops, no blocks, no tiles. Shares
//! nothing with the interpreter or with the kernels.

use std::cmp::Ordering;
use std::ops::Range;

/// Reproducible inputs.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In -1 .. 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

pub fn sum(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x)).sum()
}

/// Ignores NaN.
pub fn max(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x)).filter(|x| !x.is_nan()).fold(f64::NEG_INFINITY, f64::max)
}

/// ln Σ exp.
pub fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

pub fn softmax(row: &[f64]) -> Vec<f64> {
    let lse = log_sum_exp(row);
    row.iter().map(|x| if lse.is_finite() { (x - lse).exp() } else { 0.0 }).collect()
}

/// Slots of `row` within `radius` of `t`.
pub fn window(row: &[f32], t: usize, radius: usize) -> &[f32] {
    &row[t.saturating_sub(radius)..row.len().min(t + radius + 1)]
}

/// A NaN anywhere makes the maximum NaN.
pub fn max_or_nan(row: &[f32]) -> f64 {
    if row.iter().any(|x| x.is_nan()) { f64::NAN } else { max(row) }
}

/// A segment that competes in a contest.
#[derive(Debug, Clone, Default)]
pub struct Segment {
    pub scores: Vec<f32>,
    pub floor: usize,
    pub protected: Vec<Range<usize>>,
}

/// Kept slots of each segment of a contest: sort, take the floors, then the best of the rest.
pub fn top_k(segments: &[Segment], budget: usize) -> Vec<Vec<u32>> {
    let protected =
        |s: usize, t: usize| segments[s].protected.iter().any(|range| range.contains(&t));
    let better = |&(s, t): &(usize, usize), &(r, u): &(usize, usize)| {
        let (a, b) = (segments[s].scores[t], segments[r].scores[u]);
        let by_score = match (a.is_nan(), b.is_nan()) {
            (false, false) => b.partial_cmp(&a).unwrap_or(Ordering::Equal),
            (a, b) => a.cmp(&b),
        };
        match (protected(s, t), protected(r, u)) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => by_score,
        }
        .then((s, t).cmp(&(r, u)))
    };
    let (mut kept, mut rest) = (vec![Vec::new(); segments.len()], Vec::new());
    for (s, segment) in segments.iter().enumerate() {
        let mut slots: Vec<(usize, usize)> = (0..segment.scores.len()).map(|t| (s, t)).collect();
        slots.sort_by(better);
        let floor = segment.floor.min(slots.len());
        kept[s].extend(slots[..floor].iter().map(|&(_, t)| t as u32));
        rest.extend_from_slice(&slots[floor..]);
    }
    rest.sort_by(better);
    let granted: usize = kept.iter().map(Vec::len).sum();
    for &(s, t) in rest.iter().take(budget.saturating_sub(granted)) {
        kept[s].push(t as u32);
    }
    kept.iter_mut().for_each(|slots| slots.sort_unstable());
    kept
}

/// `scale * q · k`, and the sum of the absolute products that bounds its rounding.
pub fn score(q: &[f32], k: &[f32], scale: f32) -> (f64, f64) {
    let products =
        || q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b) * f64::from(scale));
    (products().sum(), products().map(f64::abs).sum())
}

/// Keys that row `r` of a window of `window` queries sees, of `length`: the last query sees all.
pub fn visible(length: usize, window: usize, r: usize) -> usize {
    length - (window - 1 - r % window)
}

/// Softmax-weighted sum of values, and of their absolute values.
pub fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<(f64, f64)> {
    let scores: Vec<f64> = keys.iter().map(|k| score(q, k, scale).0).collect();
    let weights = softmax(&scores);
    (0..q.len())
        .map(|d| {
            let terms = || weights.iter().zip(values).map(|(p, v)| p * f64::from(v[d]));
            (terms().sum(), terms().map(f64::abs).sum())
        })
        .collect()
}
