//! Exact selection by integer radix descent: no sort, no candidate list, any number of segments.
//!
//! Scores become 32-bit keys that order as the contract of [`TopK`] does: NaN is 0, -∞ follows, `-0 = +0`,
//! and protected slots get `u32::MAX`, which no float maps to. The cut of a contest is found digit by
//! digit (11, 11 and 10 bits): with `c_s(b)` the keys of segment `s` at or above bin edge `b`,
//! `total(b) = Σ_s max(floor_s, c_s(b))` falls as `b` rises, so the digit of the cut is the highest edge whose
//! total reaches the budget. Keys equal to the cut go to segments in order, within a segment to the first slots.
//! One further pass emits the slots ascending.
//!
//! Integer counts only: the selection is the same for every thread count. Cost: two reads of the keys, one of those that
//! share the first digit of the cut for each later digit, and one to emit. No branch depends on a key.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::backend::check;
use crate::backend::ops::{Contest, TopK};
use crate::error::Result;
use crate::ragged::Ragged;

/// Bits of the digits, most significant first: `(shift, bits)`.
const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
const BINS: usize = 1 << 11;
const PROTECTED: u32 = u32::MAX;

/// Order-preserving key of a score.
#[inline]
fn key(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    // Adding zero turns -0 into +0.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

pub(super) fn run(op: &TopK<'_>, parts: &[(&Ragged<f32>, Range<usize>)]) -> Result<Ragged<u32>> {
    for (part, rows) in parts {
        check::within("rows of a part", part.rows(), rows.end)?;
    }
    let scores: Vec<&[f32]> =
        parts.iter().flat_map(|(part, rows)| rows.clone().map(|r| part.row(r))).collect();
    let lens = scores.iter().map(|s| s.len());
    let mut keys = Ragged::filled(lens, 0u32);
    check::top_k(op, &keys)?;
    keys.rows_mut().into_par_iter().zip(&scores).enumerate().for_each(|(s, (keys, scores))| {
        keys.iter_mut().zip(*scores).for_each(|(k, &x)| *k = key(x));
        for range in op.protected.row(s) {
            keys[range.start as usize..range.end as usize].fill(PROTECTED);
        }
    });
    let cuts: Vec<Cut> =
        op.contests.par_iter().flat_map_iter(|contest| cuts_of(contest, &keys)).collect();
    let mut selection = Ragged::filled(cuts.iter().map(|c| c.count), 0u32);
    selection
        .rows_mut()
        .into_par_iter()
        .zip(&cuts)
        .enumerate()
        .for_each(|(s, (out, cut))| cut.emit(keys.row(s), out));
    Ok(selection)
}

/// Where a segment is cut: all keys above `threshold`, and the first `ties` keys equal to it.
struct Cut {
    threshold: u32,
    ties: usize,
    count: usize,
}

impl Cut {
    fn emit(&self, keys: &[u32], out: &mut [u32]) {
        let Some(last) = out.len().checked_sub(1) else { return };
        let (mut ties, mut next) = (self.ties, 0);
        for (slot, &k) in keys.iter().enumerate() {
            // Where nothing is kept, the next slot overwrites this one; past the end, the last one stays.
            if next > last {
                break;
            }
            out[next] = slot as u32;
            let tie = usize::from(k == self.threshold) & usize::from(ties > 0);
            ties -= tie;
            next += usize::from(k > self.threshold) | tie;
        }
    }

    /// The `count` best of one segment.
    fn of_segment(keys: &[u32], count: usize) -> Self {
        if count == 0 {
            return Self { threshold: u32::MAX, ties: 0, count };
        }
        let mut descent = Descent::new(&[keys]);
        descent.run(|counts| counts[0] >= count as u64);
        Self { threshold: descent.prefix, ties: count - descent.above[0] as usize, count }
    }
}

/// Cuts of all segments of a contest.
fn cuts_of(contest: &Contest, keys: &Ragged<u32>) -> Vec<Cut> {
    let rows: Vec<&[u32]> = contest.segments.clone().map(|s| keys.row(s)).collect();
    if rows.len() == 1 {
        return vec![Cut::of_segment(rows[0], contest.budget as usize)];
    }
    if contest.budget == 0 {
        return rows.iter().map(|keys| Cut::of_segment(keys, 0)).collect();
    }
    let floors = &contest.floors;
    let mut descent = Descent::new(&rows);
    descent.run(|counts| {
        counts.iter().zip(floors).map(|(&c, &f)| c.max(f)).sum::<u64>() >= contest.budget
    });
    let Descent { above, equal, prefix, .. } = descent;
    let taken: u64 = above.iter().zip(floors).map(|(&a, &f)| a.max(f)).sum();
    let mut rest = contest.budget - taken;
    let mut cuts = Vec::with_capacity(rows.len());
    for (s, keys) in rows.into_iter().enumerate() {
        let mut count = above[s].max(floors[s]);
        let more = rest.min((above[s] + equal[s]).saturating_sub(count));
        rest -= more;
        count += more;
        cuts.push(if count <= above[s] + equal[s] {
            let ties = (count - above[s]) as usize;
            Cut { threshold: prefix, ties, count: count as usize }
        } else {
            // The floor reaches below the contest's cut: this segment has a cut of its own.
            Cut::of_segment(keys, count as usize)
        });
    }
    cuts
}

/// Finds the largest key `x` such that the counts of keys `>= x`, by segment, still satisfy a monotone test.
struct Descent<'a> {
    /// Keys that share the prefix, by segment.
    rows: Vec<Cow<'a, [u32]>>,
    /// Keys above the prefix's range, by segment.
    above: Vec<u64>,
    /// Keys equal to the final prefix, by segment.
    equal: Vec<u64>,
    prefix: u32,
}

impl<'a> Descent<'a> {
    fn new(rows: &[&'a [u32]]) -> Self {
        let n = rows.len();
        let rows = rows.iter().map(|row| Cow::Borrowed(*row)).collect();
        Self { rows, above: vec![0; n], equal: vec![0; n], prefix: 0 }
    }

    /// `reached` must hold for the counts of all keys, and keep holding as counts grow.
    fn run(&mut self, reached: impl Fn(&[u64]) -> bool) {
        for (shift, bits) in DIGITS {
            let histograms: Vec<Vec<u32>> =
                self.rows.par_iter().map(|keys| histogram(keys, shift, bits)).collect();
            let mut counts = self.above.clone();
            for bin in (0..1 << bits).rev() {
                self.above.copy_from_slice(&counts);
                counts.iter_mut().zip(&histograms).for_each(|(c, h)| *c += u64::from(h[bin]));
                if reached(&counts) {
                    self.prefix |= (bin as u32) << shift;
                    self.equal = histograms.iter().map(|h| u64::from(h[bin])).collect();
                    break;
                }
            }
            if shift > 0 {
                let digit = self.prefix >> shift;
                let (rows, equal) = (&mut self.rows, &self.equal);
                rows.par_iter_mut().zip(equal).for_each(|(keys, &count)| {
                    // Nothing to do where all keys are alike.
                    if count < keys.len() as u64 {
                        *keys = Cow::Owned(sharing(keys, digit, shift, count as usize));
                    }
                });
            }
        }
    }
}

/// How many keys have each digit.
fn histogram(keys: &[u32], shift: u32, bits: u32) -> Vec<u32> {
    /// Equal keys would wait for each other's counter.
    const COPIES: usize = 4;
    let mut copies = vec![[0u32; BINS]; COPIES];
    let digit = |k: u32| (k >> shift) as usize & ((1 << bits) - 1) & (BINS - 1);
    let (chunks, rest) = keys.as_chunks::<COPIES>();
    if let [a, b, c, d] = copies.as_mut_slice() {
        for &[k, l, m, n] in chunks {
            a[digit(k)] += 1;
            b[digit(l)] += 1;
            c[digit(m)] += 1;
            d[digit(n)] += 1;
        }
        rest.iter().for_each(|&k| a[digit(k)] += 1);
    }
    let mut sum = vec![0; BINS];
    for copy in &copies {
        sum.iter_mut().zip(copy).for_each(|(sum, &n)| *sum += n);
    }
    sum
}

/// The `count` keys whose leading digits are the given ones.
fn sharing(keys: &[u32], digits: u32, shift: u32, count: usize) -> Vec<u32> {
    // One more, which the keys after the last one overwrite.
    let mut found = vec![0; count + 1];
    let mut next = 0;
    for &k in keys {
        found[next] = k;
        next += usize::from(k >> shift == digits);
    }
    found.truncate(count);
    found
}

/// Fixed-point unit of attention mass: sums of integers have no order.
const MASS_ONE: f64 = (1u64 << 40) as f64;

pub(super) fn mass_count(thresholds: &[f32], caps: &[u32], mass: &Ragged<f32>) -> Result<Vec<u32>> {
    check::mass_count(thresholds, caps, mass)?;
    let rows: Vec<(&[f32], (f32, u32))> =
        mass.iter().zip(thresholds.iter().copied().zip(caps.iter().copied())).collect();
    Ok(rows
        .into_par_iter()
        .map(|(row, (threshold, cap))| {
            let sum: i64 = row.iter().map(|&p| fixed(p) as i64).sum();
            let outside = (MASS_ONE as i64 - sum).max(0);
            let needed = (f64::from(threshold) * MASS_ONE).round() as i64 - outside;
            smallest_count(row, needed).min(cap as usize) as u32
        })
        .collect())
}

fn fixed(mass: f32) -> u64 {
    // Saturating: NaN and negatives become 0.
    (f64::from(mass) * MASS_ONE).round() as u64
}

/// Smallest number of largest entries that sums to `needed`; all of them if even that falls short.
fn smallest_count(row: &[f32], needed: i64) -> usize {
    if needed <= 0 {
        return 0;
    }
    let needed = needed as u64;
    let (mut prefix, mut mass, mut count) = (0u32, 0u64, 0u64);
    for (shift, bits) in DIGITS {
        let high = shift + bits;
        let mut histogram = vec![(0u64, 0u64); BINS];
        for &p in row {
            let k = key(p);
            if high == 32 || k >> high == prefix >> high {
                let bin = &mut histogram[(k >> shift) as usize & ((1 << bits) - 1)];
                *bin = (bin.0 + fixed(p), bin.1 + 1);
            }
        }
        let mut found = false;
        for bin in (0..1usize << bits).rev() {
            let (bin_mass, bin_count) = histogram[bin];
            if mass + bin_mass >= needed {
                prefix |= (bin as u32) << shift;
                found = true;
                break;
            }
            mass += bin_mass;
            count += bin_count;
        }
        if !found {
            return row.len();
        }
    }
    // All entries at the cut are equal, so their masses are.
    let each = row.iter().find(|&&p| key(p) == prefix).map_or(1, |&p| fixed(p).max(1));
    (count + (needed - mass).div_ceil(each)) as usize
}

pub(super) fn pin_top(counts: &[u32], by: &Ragged<f32>, rows: &mut Ragged<f32>) -> Result<()> {
    check::pin_top(counts, by, rows)?;
    let contests: Vec<Contest> = counts
        .iter()
        .enumerate()
        .map(|(s, &count)| Contest {
            segments: s..s + 1,
            budget: u64::from(count),
            floors: vec![0],
        })
        .collect();
    let protected = Ragged::filled(counts.iter().map(|_| 0), 0..0);
    let pinned = run(&TopK { contests: &contests, protected: &protected }, &[(by, 0..by.rows())])?;
    for s in 0..rows.rows() {
        for &slot in pinned.row(s) {
            rows.row_mut(s)[slot as usize] = f32::INFINITY;
        }
    }
    Ok(())
}
