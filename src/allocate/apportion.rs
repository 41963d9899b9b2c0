//! The only rounding in the crate: sharing whole slots by weight.
//!
//! [`apportion`] is by largest remainder, within floors and caps. The real-valued share is `x_i = clamp(λ·w_i, floor_i, cap_i)` with `Σ x_i = total`; integers follow by
//! flooring and giving the missing slots to the largest fractions, the lower index first among equals. All
//! arithmetic is on integers, so the parts sum to the whole by construction.
//!
//! [`highest_averages`] is for claims that come one after the other. By largest remainder another claim can give an old one a slot
//! more; by highest averages slots are won under a total order, and what a claim has not won among some it does not win among more.

use crate::error::{Error, Result};

/// One claimant: its weight and the bounds of its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Relative weight. Where all weights are 0, shares are equal.
    pub weight: u64,
    /// Least share.
    pub floor: u64,
    /// Largest share.
    pub cap: u64,
}

/// Shares `total` among the claims: `Σ = total`, `floor_i <= share_i <= cap_i`.
///
/// Errors if a floor exceeds its cap, if the floors sum to more than `total` or the caps to less.
pub fn apportion(total: u64, claims: &[Claim]) -> Result<Vec<u64>> {
    let floors = claims.iter().fold(0u64, |a, c| a.saturating_add(c.floor));
    let caps = claims.iter().fold(0u64, |a, c| a.saturating_add(c.cap));
    if floors > total || caps < total || claims.iter().any(|c| c.floor > c.cap) {
        return Err(Error::Apportion { total, floors, caps });
    }
    let mut shares = vec![0u64; claims.len()];
    let mut free: Vec<usize> = (0..claims.len()).collect();
    let mut rest = total;
    loop {
        // Claims without weight share what nobody with weight can take.
        let weighted = free.iter().any(|&i| claims[i].weight > 0);
        let weight = |i: usize| if weighted { u128::from(claims[i].weight) } else { 1 };
        let sum: u128 = free.iter().map(|&i| weight(i)).sum();
        if sum == 0 {
            return Ok(shares); // No free claim is left, and nothing to share.
        }
        // Compare λ·w with the bounds, all multiplied by `sum`.
        let ideal = |i: usize| u128::from(rest) * weight(i);
        let below = |i: usize| ideal(i) < u128::from(claims[i].floor) * sum;
        let above = |i: usize| ideal(i) > u128::from(claims[i].cap) * sum;
        let lacking: u128 = free
            .iter()
            .filter(|&&i| below(i))
            .map(|&i| u128::from(claims[i].floor) * sum - ideal(i))
            .sum();
        let spare: u128 = free
            .iter()
            .filter(|&&i| above(i))
            .map(|&i| ideal(i) - u128::from(claims[i].cap) * sum)
            .sum();
        if lacking == 0 && spare == 0 {
            round(&mut shares, &free, rest, sum, weight);
            return Ok(shares);
        }
        // The side with the larger violation is fixed for good: the final λ lies on its other side.
        let (fixed, kept): (Vec<usize>, Vec<usize>) =
            free.iter().partition(|&&i| if lacking >= spare { below(i) } else { above(i) });
        for i in fixed {
            shares[i] = if lacking >= spare { claims[i].floor } else { claims[i].cap };
            rest -= shares[i];
        }
        free = kept;
    }
}

/// Largest remainder over the free claims.
fn round(shares: &mut [u64], free: &[usize], rest: u64, sum: u128, weight: impl Fn(usize) -> u128) {
    let mut left = rest;
    let mut fractions: Vec<(u128, usize)> = Vec::with_capacity(free.len());
    for &i in free {
        let ideal = u128::from(rest) * weight(i);
        shares[i] = (ideal / sum) as u64;
        left -= shares[i];
        fractions.push((ideal % sum, i));
    }
    fractions.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    // Fewer slots are left than there are non-zero fractions, so no cap is passed.
    for &(_, i) in fractions.iter().take(left as usize) {
        shares[i] += 1;
    }
}

/// Shares `total` among claims of a weight and a cap by highest averages: of all `weight / n`, `n = 1..=cap`, the largest win, and each is
/// a slot of its claim. Among equal ones those that are first of their claim come first, then those of lower index. So what
/// nobody with weight can take is shared equally. Weights are finite and at least 0.
///
/// Errors if the caps sum to less than `total`.
pub fn highest_averages(total: u64, claims: &[(f64, u64)]) -> Result<Vec<u64>> {
    let caps = claims.iter().fold(0u64, |sum, (_, cap)| sum.saturating_add(*cap));
    if caps < total {
        return Err(Error::Apportion { total, floors: 0, caps });
    }
    // How many of each claim's averages are at least `least`: the first ones.
    let reach = |least: f64| -> Vec<u64> {
        let of = |&(weight, cap): &(f64, u64)| {
            if least == 0.0 {
                return cap;
            }
            let reaches = |n: u64| weight / n as f64 >= least;
            let mut n = ((weight / least) as u64).min(cap);
            while n < cap && reaches(n + 1) {
                n += 1;
            }
            while n > 0 && !reaches(n) {
                n -= 1;
            }
            n
        };
        claims.iter().map(of).collect()
    };
    // The least average that wins, if not all of its equals: by bisection, since floats from zero up order as their bits do.
    let (mut least, mut above) = (0, f64::INFINITY.to_bits());
    while above - least > 1 {
        let middle = least + (above - least) / 2;
        match reach(f64::from_bits(middle)).iter().sum::<u64>() >= total {
            true => least = middle,
            false => above = middle,
        }
    }
    let sure = reach(f64::from_bits(above));
    let equal = reach(f64::from_bits(least));
    let claim = |(all, sure): (&u64, &u64)| Claim { weight: 1, floor: 0, cap: all - sure };
    let claims: Vec<Claim> = equal.iter().zip(&sure).map(claim).collect();
    let more = apportion(total - sure.iter().sum::<u64>(), &claims)?;
    Ok(sure.iter().zip(more).map(|(sure, more)| sure + more).collect())
}

/// Integer weights from the caller's floats: scaled so that the largest is `2^52`, then rounded.
pub fn weights_from(name: &'static str, weights: &[f64]) -> Result<Vec<u64>> {
    let max = weights.iter().copied().fold(0.0, f64::max);
    if weights.iter().any(|w| !w.is_finite() || *w < 0.0) || max == 0.0 {
        return Err(Error::Parameter {
            name,
            expected: "finite weights >= 0, at least one of them positive",
            got: format!("{weights:?}"),
        });
    }
    let scale = (1u64 << 52) as f64;
    Ok(weights.iter().map(|w| (w / max * scale).round() as u64).collect())
}

/// Weights of at most 52 bits, so that no later product overflows; exact for all but absurd sizes.
pub(crate) fn narrow(weights: &[u128]) -> Vec<u64> {
    let largest = weights.iter().copied().max().unwrap_or(0);
    let shift = (128 - largest.leading_zeros()).saturating_sub(52);
    weights.iter().map(|w| (w >> shift) as u64).collect()
}
