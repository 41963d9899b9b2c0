//! Contests as they stand at a push: the part that has been seen, and budgets of segments that scores decide by number.

use std::ops::Range;

use crate::allocate::apportion::narrow;
use crate::allocate::{Claim, Split, apportion};
use crate::backend::ops::Contest;
use crate::error::Result;

/// The part of a contest within the segments seen, which hold `held`, renumbered to start at `next`.
/// Unseen segments keep their floors in reserve.
pub(super) fn visible(
    contest: &Contest,
    seen: &Range<usize>,
    held: &[u64],
    next: usize,
) -> Option<Contest> {
    let start = contest.segments.start.max(seen.start);
    let end = contest.segments.end.min(seen.end);
    if start >= end {
        return None;
    }
    let first = contest.segments.start;
    let floors = contest.floors[start - first..end - first].to_vec();
    let reserve = contest.floors.iter().sum::<u64>() - floors.iter().sum::<u64>();
    let held: u64 = held[start - seen.start..end - seen.start].iter().sum();
    let segments = start - seen.start + next..end - seen.start + next;
    Some(Contest { segments, budget: (contest.budget - reserve).min(held), floors })
}

/// A contest divided by number, exactly: above its floor, segment `h` gets `(1 - α)·m_h/Σm + α/H` of what the floors leave,
/// rounded by largest remainder. Its merit `m_h` is what it won beyond the floor (Ada-KV's paper), or its mass (MaskKV).
pub(super) fn divided(
    contest: &Contest,
    split: Split,
    merits: &[u64],
    lens: &[usize],
) -> Result<Vec<Contest>> {
    let Contest { segments, budget, floors } = contest;
    let (merits, lens) = (&merits[segments.clone()], &lens[segments.clone()]);
    let (alpha, merits): (_, Vec<u64>) = match split {
        Split::Contest => return Ok(vec![contest.clone()]),
        Split::Blend(alpha) => (alpha, merits.iter().zip(floors).map(|(m, f)| m - f).collect()),
        Split::Mass(alpha) => (alpha, merits.to_vec()),
    };
    // Of 52 bits in sum, which leaves room for what comes.
    let merits =
        narrow(&merits.iter().map(|&m| u128::from(m) * merits.len() as u128).collect::<Vec<_>>());
    let (n, sum) = (merits.len() as u128, merits.iter().map(|&m| u128::from(m)).sum::<u128>());
    let weight = |&m: &u64| {
        let (equal, den) = (u128::from(alpha.num()), u128::from(alpha.den()));
        (den - equal) * u128::from(m) * n + equal * sum
    };
    let weights = narrow(&merits.iter().map(weight).collect::<Vec<_>>());
    let claims: Vec<Claim> = weights
        .into_iter()
        .zip(lens.iter().zip(floors))
        .map(|(weight, (&len, &floor))| Claim { weight, floor: 0, cap: len as u64 - floor })
        .collect();
    let extra = apportion(budget - floors.iter().sum::<u64>(), &claims)?;
    let single = |(s, (floor, extra))| Contest {
        segments: s..s + 1,
        budget: floor + extra,
        floors: vec![0],
    };
    Ok(segments.clone().zip(floors.iter().zip(extra)).map(single).collect())
}
