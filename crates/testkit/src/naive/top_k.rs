//! Selection by sorting everything: protected first, score descending (`-0 = +0`, NaN lowest), segment, slot.

use std::cmp::Ordering;
use std::ops::Range;

use kvbudget::backend::ops::Contest;

struct Slot {
    protected: bool,
    score: f64,
    segment: usize,
    slot: u32,
}

fn order(a: &Slot, b: &Slot) -> Ordering {
    let protection = b.protected.cmp(&a.protected);
    let place = a.segment.cmp(&b.segment).then(a.slot.cmp(&b.slot));
    if a.protected && b.protected {
        return place;
    }
    let score = match (a.score.is_nan(), b.score.is_nan()) {
        (false, false) => b.score.partial_cmp(&a.score).expect("neither is NaN"),
        (a_nan, b_nan) => a_nan.cmp(&b_nan),
    };
    protection.then(score).then(place)
}

/// Slots kept of each segment, ascending: the `floor` best of each, then the best of what is left of all.
pub fn top_k(
    scores: &[Vec<f64>],
    contests: &[Contest],
    protected: &[Vec<Range<u32>>],
) -> Vec<Vec<u32>> {
    let mut kept = vec![Vec::new(); scores.len()];
    for contest in contests {
        let mut slots = Vec::new();
        for segment in contest.segments.clone() {
            for (slot, &score) in (0u32..).zip(&scores[segment]) {
                let protected = protected[segment].iter().any(|range| range.contains(&slot));
                slots.push(Slot { protected, score, segment, slot });
            }
        }
        slots.sort_by(order);

        let mut left = Vec::new();
        for s in slots {
            let floor = contest.floors[s.segment - contest.segments.start];
            if (kept[s.segment].len() as u64) < floor {
                kept[s.segment].push(s.slot);
            } else {
                left.push(s);
            }
        }
        let rest = contest.budget - contest.floors.iter().sum::<u64>();
        for s in &left[..rest as usize] {
            kept[s.segment].push(s.slot);
        }
    }
    kept.iter_mut().for_each(|slots| slots.sort());
    kept
}

/// All slots of one row, best first.
pub fn ranking(row: &[f64]) -> Vec<u32> {
    let slot = |(slot, &score)| Slot { protected: false, score, segment: 0, slot };
    let mut slots: Vec<Slot> = (0u32..).zip(row).map(slot).collect();
    slots.sort_by(order);
    slots.iter().map(|s| s.slot).collect()
}

/// How many of the largest entries reach `threshold - (1 - sum)`, at most `cap`.
pub fn mass_count(threshold: f64, cap: u32, mass: &[f64]) -> u32 {
    let needed = threshold - (1.0 - mass.iter().sum::<f64>());
    let mut reached = 0.0;
    let mut count = 0;
    for slot in ranking(mass) {
        if reached >= needed {
            break;
        }
        reached += mass[slot as usize];
        count += 1;
    }
    count.min(cap)
}

/// What is outside the ranges, in units of `2^-40`, at most the largest integer.
pub fn free_mass(protected: &[Range<u32>], row: &[f64]) -> u64 {
    let free = |t: u32| !protected.iter().any(|r| r.contains(&t));
    // Casts stop at the ends of their range, and make NaN zero.
    let units = |x: f64| (x * (1u64 << 40) as f64).round() as u64;
    let slots = (0..row.len()).filter(|&t| free(t as u32));
    slots.map(|t| u128::from(units(row[t]))).sum::<u128>().min(u64::MAX.into()) as u64
}

/// Lowers `row` to 0 where `by` has its `count` best that are neither `-∞` nor NaN.
pub fn drop_top(count: u32, by: &[f64], row: &mut [f64]) {
    for slot in ranking(by)[..count as usize].iter().map(|&slot| slot as usize) {
        if by[slot] > f64::NEG_INFINITY && row[slot] > 0.0 {
            row[slot] = 0.0;
        }
    }
}

/// Sets `row` to +∞ where `by` has its `count` best.
pub fn pin_top(count: u32, by: &[f64], row: &mut [f64]) {
    for &slot in &ranking(by)[..count as usize] {
        row[slot as usize] = f64::INFINITY;
    }
}
