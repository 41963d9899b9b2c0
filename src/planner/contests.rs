//! Contests as they stand at a push: the part that has been seen, and Ada-KV's blend of what was won.

use std::ops::Range;

use crate::allocate::{Claim, apportion};
use crate::backend::ops::Contest;
use crate::budget::Fraction;
use crate::error::Result;
use crate::ragged::Ragged;
use crate::select::protect::count;

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

/// Ada-KV's safeguard in the paper's form, exact: above what is protected, segment `h` gets
/// `(1 - α)·f_h + α·R/H` of the contest's `R` slots, rounded by largest remainder.
pub(super) fn blended(
    contest: &Contest,
    blend: Option<Fraction>,
    won: &[u32],
    lens: &[usize],
    protected: &Ragged<Range<u32>>,
) -> Result<Vec<Contest>> {
    let Some(alpha) = blend else { return Ok(vec![contest.clone()]) };
    let n = contest.segments.len() as u64;
    let floors = &contest.floors;
    let spare = contest.budget - floors.iter().sum::<u64>();
    let claims: Vec<Claim> = contest
        .segments
        .clone()
        .zip(floors)
        .map(|(s, &floor)| {
            let extra = u64::from(won[s]) - floor;
            let weight = (alpha.den() - alpha.num()) * extra * n + alpha.num() * spare;
            debug_assert!(count(protected.row(s)) <= floor);
            Claim { weight, floor: 0, cap: lens[s] as u64 - floor }
        })
        .collect();
    let extra = apportion(spare, &claims)?;
    Ok(contest
        .segments
        .clone()
        .zip(floors.iter().zip(extra))
        .map(|(s, (floor, extra))| Contest {
            segments: s..s + 1,
            budget: floor + extra,
            floors: vec![0],
        })
        .collect())
}
