//! Exact selection by integer radix descent: no sort, any number of segments.
//!
//! Scores become 32-bit keys that order as the contract of [`TopK`] does: NaN is 0, -∞ follows, `-0 = +0`,
//! and protected slots get `u32::MAX`, which no float maps to. The cut of a contest is found digit by
//! digit (11, 11 and 10 bits): with `c_s(b)` the keys of segment `s` at or above bin edge `b`,
//! `total(b) = Σ_s max(floor_s, c_s(b))` falls as `b` rises, so the digit of the cut is the highest edge whose
//! total reaches the budget. Keys equal to the cut go to segments in order, within a segment to the first slots.
//! One further pass emits the slots ascending.
//!
//! Integer counts only: the selection is the same for every thread count. Cost: three reads of the scores (first digit, keys
//! that share it, slots) and one write of the slots. No branch depends on a key.

use std::ops::Range;

use rayon::prelude::*;

use super::descent::{BINS, Blocks, DIGITS, Descent, Segment, key, rows_per_task};
use super::intrinsics::{self, BLOCK, Kept};
use super::isa::{Isa, LANES};
use crate::backend::check::{self, Lens};
use crate::backend::ops::{Contest, TopK};
use crate::error::Result;
use crate::ragged::Ragged;

pub(super) fn run(
    isa: Isa,
    op: &TopK<'_>,
    parts: &[(&Ragged<f32>, Range<usize>)],
) -> Result<Ragged<u32>> {
    for (part, rows) in parts {
        check::within("rows of a part", part.rows(), rows.end)?;
    }
    let rows: Vec<&[f32]> =
        parts.iter().flat_map(|(part, rows)| rows.clone().map(|r| part.row(r))).collect();
    check::top_k(op, &Scores(&rows))?;
    let segments: Vec<Segment<'_>> = rows
        .into_iter()
        .zip(op.protected.iter())
        .map(|(scores, protected)| Segment { scores, protected })
        .collect();
    let least = rows_per_task(&segments);
    let select = || {
        // As many contests to a task as rows, since most have one row or all.
        let contests = op.contests.par_iter().with_min_len(least);
        let cuts: Vec<Cut> =
            contests.flat_map_iter(|contest| cuts_of(isa, contest, &segments)).collect();
        let mut selection = Ragged::filled(cuts.iter().map(|c| c.count), 0u32);
        let rows = selection.rows_mut().into_par_iter().zip(&cuts).zip(&segments);
        rows.with_min_len(least).for_each(|((out, cut), segment)| cut.emit(isa, segment, out));
        selection
    };
    // Into the pool once, not with each pass.
    Ok(if least < segments.len() { rayon::scope(|_| select()) } else { select() })
}

/// Rows of scores, to be checked.
struct Scores<'a>(&'a [&'a [f32]]);

impl Lens for Scores<'_> {
    fn rows(&self) -> usize {
        self.0.len()
    }
    fn len(&self, row: usize) -> usize {
        self.0[row].len()
    }
}

/// Where a segment is cut: all keys above `threshold`, and the first `ties` keys equal to it.
struct Cut {
    threshold: u32,
    ties: usize,
    count: usize,
}

impl Cut {
    fn emit(&self, isa: Isa, segment: &Segment<'_>, mut out: &mut [u32]) {
        if out.is_empty() {
            return;
        }
        /// The slots of the first block.
        static SLOTS: [u32; BLOCK] = {
            let mut slots = [0; BLOCK];
            let mut i = 0;
            while i < BLOCK {
                slots[i] = i as u32;
                i += 1;
            }
            slots
        };
        let mut kept: Kept = [0; BLOCK + LANES];
        let mut ties = self.ties;
        isa.run(Blocks(segment, |first, keys: &[u32]| {
            // Ties are taken up to here.
            let middle = if ties == 0 { 0 } else { self.last_tie(keys, &mut ties) };
            let mut take = |range: Range<usize>, least: u32| {
                let (keys, slots) = (&keys[range.clone()], &SLOTS[range]);
                let n =
                    intrinsics::compress(isa, keys, (least, u32::MAX - least), slots, &mut kept);
                let (now, later) = std::mem::take(&mut out).split_at_mut(n);
                now.iter_mut().zip(&kept).for_each(|(slot, &i)| *slot = first as u32 + i);
                out = later;
            };
            take(0..middle, self.threshold);
            if let Some(above) = self.threshold.checked_add(1) {
                take(middle..keys.len(), above);
            }
        }));
    }

    /// Takes ties of a block; where those left are beyond.
    #[inline(always)]
    fn last_tie(&self, keys: &[u32], ties: &mut usize) -> usize {
        let equal = keys.iter().map(|&k| u32::from(k == self.threshold)).sum::<u32>() as usize;
        if equal <= *ties {
            *ties -= equal;
            return keys.len();
        }
        let mut equal = keys.iter().enumerate().filter(|&(_, &k)| k == self.threshold);
        let beyond = equal.nth(*ties).map_or(keys.len(), |(i, _)| i);
        *ties = 0;
        beyond
    }

    /// The `count` best of one segment.
    fn of_segment(isa: Isa, segment: &Segment<'_>, count: usize) -> Self {
        if count == 0 {
            return Self { threshold: u32::MAX, ties: 0, count };
        }
        let mut descent = Descent::new(isa, std::slice::from_ref(segment));
        descent.run(|counts| counts[0] >= count as u64);
        Self { threshold: descent.cut, ties: count - descent.above[0] as usize, count }
    }
}

/// Cuts of all segments of a contest.
fn cuts_of(isa: Isa, contest: &Contest, segments: &[Segment<'_>]) -> Vec<Cut> {
    let segments = &segments[contest.segments.clone()];
    if let [segment] = segments {
        return vec![Cut::of_segment(isa, segment, contest.budget as usize)];
    }
    if contest.budget == 0 {
        return segments.iter().map(|segment| Cut::of_segment(isa, segment, 0)).collect();
    }
    let floors = &contest.floors;
    let mut descent = Descent::new(isa, segments);
    descent.run(|counts| {
        counts.iter().zip(floors).map(|(&c, &f)| c.max(f)).sum::<u64>() >= contest.budget
    });
    let Descent { above, equal, cut: threshold, .. } = descent;
    let taken: u64 = above.iter().zip(floors).map(|(&a, &f)| a.max(f)).sum();
    let mut rest = contest.budget - taken;
    let mut counts = Vec::with_capacity(segments.len());
    for s in 0..segments.len() {
        let count = above[s].max(floors[s]);
        let more = rest.min((above[s] + equal[s]).saturating_sub(count));
        rest -= more;
        counts.push(count + more);
    }
    let cuts = segments.par_iter().zip(&counts).zip(above.par_iter().zip(&equal));
    cuts.with_min_len(rows_per_task(segments))
        .map(|((segment, &count), (&above, &equal))| {
            let count_here = count as usize;
            if count <= above + equal {
                Cut { threshold, ties: (count - above) as usize, count: count_here }
            } else {
                // The floor reaches below the contest's cut: this segment has a cut of its own.
                Cut::of_segment(isa, segment, count_here)
            }
        })
        .collect()
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

pub(super) fn free_mass(protected: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Vec<u64>> {
    check::free_mass(protected, rows)?;
    let rows: Vec<_> = rows.iter().zip(protected.iter()).collect();
    let free = |(row, protected): (&[f32], &[Range<u32>])| {
        let starts = protected.iter().map(|r| r.start as usize).chain([row.len()]);
        let ends = [0].into_iter().chain(protected.iter().map(|r| r.end as usize));
        let slots = ends.zip(starts).flat_map(|(from, to)| &row[from..to]);
        slots.fold(0u64, |sum, &p| sum.saturating_add(fixed(p)))
    };
    Ok(rows.into_par_iter().map(free).collect())
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

pub(super) fn pin_top(
    isa: Isa,
    counts: &[u32],
    by: &Ragged<f32>,
    rows: &mut Ragged<f32>,
) -> Result<()> {
    let pinned = marked(isa, counts, by, rows)?;
    for (s, slots) in pinned.iter().enumerate() {
        let row = rows.row_mut(s);
        slots.iter().for_each(|&slot| row[slot as usize] = f32::INFINITY);
    }
    Ok(())
}

pub(super) fn drop_top(
    isa: Isa,
    counts: &[u32],
    by: &Ragged<f32>,
    rows: &mut Ragged<f32>,
) -> Result<()> {
    let dropped = marked(isa, counts, by, rows)?;
    for (s, slots) in dropped.iter().enumerate() {
        let (by, row) = (by.row(s), rows.row_mut(s));
        for slot in slots.iter().map(|&slot| slot as usize) {
            // Written so that NaN stays NaN.
            if by[slot] > f32::NEG_INFINITY && row[slot] > 0.0 {
                row[slot] = 0.0;
            }
        }
    }
    Ok(())
}

/// The `counts[s]` best slots of each row of `by`.
fn marked(isa: Isa, counts: &[u32], by: &Ragged<f32>, rows: &Ragged<f32>) -> Result<Ragged<u32>> {
    check::marked_top(counts, by, rows)?;
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
    let op = TopK { contests: &contests, protected: &protected };
    run(isa, &op, &[(by, 0..by.rows())])
}
