//! Who gets how much: budgets over layers and over the heads of a layer, in whole slots.
//!
//! An allocation knows no scores and no device. It divides the segments of a sequence into [`Share`]s:
//! what is decided by number alone becomes a share of one segment, what is decided by score becomes a
//! contest with floors that the backend's selection runs. Shares sum to the budget by construction.

pub mod apportion;
mod boundary;
mod preference;
mod sensitivity;

pub use apportion::{Claim, apportion, highest_averages};
pub use boundary::Boundary;
pub use preference::Preference;
pub use sensitivity::Sensitivity;

use crate::backend::ops::Contest;
use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::profile::Profile;
use apportion::{narrow, weights_from};

/// Segments of one sequence that share a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The contest, numbered within the sequence.
    pub contest: Contest,
    /// How the segments divide the budget.
    pub split: Split,
}

/// How segments divide the budget of a contest. Fractions are of what the floors leave, and what each segment gets it then
/// fills with its best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// By winning slots.
    Contest,
    /// `α` equally, the rest in proportion to what each would win beyond its floor (Ada-KV's safeguard).
    Blend(Fraction),
    /// `α` equally, the rest in proportion to the score mass of each segment's unprotected slots (MaskKV's prompt
    /// preference).
    Mass(Fraction),
}

/// What an allocation has to share out, in slots or units.
#[derive(Debug, Clone)]
pub struct Demand<'a> {
    /// Segments of each layer.
    pub heads: &'a [usize],
    /// Held by each segment.
    pub lens: &'a [u64],
    /// Protected in each segment.
    pub protected: &'a [u64],
    /// What the layers seen so far prefer, if that counts: see [`Layers::Preference`]. Others get what is protected.
    pub preferences: &'a [f64],
    /// To be kept in all; at most the sum of `lens`.
    pub budget: u64,
}

/// Over layers.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "lowercase")
)]
pub enum Layers {
    /// In proportion to the heads of each layer.
    #[default]
    Uniform,
    /// Falling linearly with depth (PyramidKV): the last layer's share of evictable slots is `1/β` of the
    /// mean, the first layer's `2 - 1/β`; flatter where the first layer holds fewer.
    Pyramid {
        /// Steepness, at least 1.
        beta: u64,
    },
    /// In proportion to one weight per layer.
    Weights {
        /// The weights.
        layers: Vec<f64>,
    },
    /// The ends against the middle, by importance (MaskKV).
    Boundary(Boundary),
    /// By how little keys change when slots are evicted in blocks (EpiCache).
    Sensitivity(Sensitivity),
    /// By how attention spreads in them, which is known once they are scored (CAKE).
    Preference(Preference),
    /// Over all layers at once: by score (Layer-DefensiveKV), or by the heads' weights.
    Global,
}

/// Over the heads of a layer.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "lowercase")
)]
pub enum Heads {
    /// Equal shares.
    #[default]
    Uniform,
    /// By score (Ada-KV), with a safeguard.
    Ada {
        /// Fraction of the equal share that is safe for each head.
        alpha: Fraction,
        /// How the safeguard works.
        form: AdaForm,
    },
    /// In proportion to the score mass of each head's unprotected slots (MaskKV): attention, summed over what may be
    /// evicted, says how much a head looks at it. Of evictable slots; scores below zero count for nothing.
    Preference {
        /// Fraction that heads share equally.
        alpha: Fraction,
    },
    /// In proportion to one weight per head of each layer.
    Weights {
        /// The weights, `[layer][head]`.
        heads: Vec<Vec<f64>>,
    },
    /// In proportion to what a model's heads were measured to need at this budget, but for slots that come first
    /// whatever their scores (what is protected, a scorer's first set). A contest: the planner puts places in the
    /// stead of scores.
    Profile {
        /// The measurement.
        profile: Profile,
    },
}

/// How Ada-KV's safeguard enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum AdaForm {
    /// The best `α·b` slots of each head are safe, the rest is contested: the most score that the floors allow.
    #[default]
    Floor,
    /// Budgets are interpolated between the contest's outcome and equal shares (the paper's form).
    Blend,
}
crate::parameters::named!(AdaForm { Floor => "floor", Blend => "blend" });

impl Heads {
    /// Whether of two budgets of a layer the smaller one keeps fewer of the same slots, whatever their scores.
    pub(crate) fn nest(&self) -> bool {
        match self {
            Heads::Uniform | Heads::Profile { .. } => true,
            Heads::Ada { alpha, form } => alpha.num() == 0 && *form == AdaForm::Floor,
            Heads::Preference { .. } | Heads::Weights { .. } => false,
        }
    }
}

impl Demand<'_> {
    /// Least that a segment should get: what is protected, and never nothing.
    fn least(&self, s: usize) -> u64 {
        self.protected[s].max(1).min(self.lens[s])
    }

    /// Whether there is less than what each segment should get at least: then that decides alone.
    pub(crate) fn is_scarce(&self) -> bool {
        self.budget < (0..self.lens.len()).map(|s| self.least(s)).sum()
    }
}

/// Divides the demand among layers and heads.
pub fn allocate(layers: &Layers, heads: &Heads, demand: &Demand<'_>) -> Result<Vec<Share>> {
    if demand.is_scarce() {
        return scarce(demand);
    }
    let all: Vec<usize> = (0..demand.lens.len()).collect();
    let weights = head_weights(heads, demand)?;
    if let Layers::Global = layers {
        return match (heads, weights) {
            (Heads::Ada { alpha, form: AdaForm::Floor }, _) => {
                Ok(vec![contested(demand, &all, demand.budget, *alpha, Split::Contest)?])
            }
            (Heads::Profile { .. }, _) => {
                Ok(vec![contested(demand, &all, demand.budget, Fraction::ZERO, Split::Contest)?])
            }
            (_, Some(weights)) => {
                let weights = weights_from("heads", &weights.concat())?;
                fixed(demand, &all, demand.budget, |i| weights[i])
            }
            _ => Err(Error::Unsupported {
                what: "global budgets over layers",
                why: "heads must be contested with floors (heads = ada, form = floor), or weighted",
            }),
        };
    }
    if let (Layers::Preference(_), Heads::Preference { .. }) = (layers, heads) {
        return Err(Error::Unsupported {
            what: "layers and heads by preference",
            why: "score mass is summed layer by layer, and budgets of layers are known after the last",
        });
    }
    let budgets = layer_budgets(layers, demand)?;
    let mut shares = Vec::new();
    let mut first = 0;
    for (l, (&count, &budget)) in demand.heads.iter().zip(&budgets).enumerate() {
        let segments = &all[first..first + count];
        first += count;
        match heads {
            Heads::Ada { alpha, form: AdaForm::Floor } => {
                shares.push(contested(demand, segments, budget, *alpha, Split::Contest)?);
            }
            Heads::Ada { alpha, form: AdaForm::Blend } => {
                let split = Split::Blend(*alpha);
                shares.push(contested(demand, segments, budget, Fraction::ZERO, split)?);
            }
            Heads::Preference { alpha } => {
                let split = Split::Mass(*alpha);
                shares.push(contested(demand, segments, budget, Fraction::ZERO, split)?);
            }
            Heads::Uniform => shares.extend(fixed(demand, segments, budget, |_| 1)?),
            Heads::Profile { .. } => {
                let split = Split::Contest;
                shares.push(contested(demand, segments, budget, Fraction::ZERO, split)?);
            }
            Heads::Weights { .. } => {
                let weights = weights.as_ref().map_or(&[][..], |w| w[l].as_slice());
                let weights = weights_from("heads", weights)?;
                shares.extend(fixed(demand, segments, budget, |i| weights[i])?);
            }
        }
    }
    Ok(shares)
}

/// Weights of all heads, `[layer][head]`, where there are such.
fn head_weights(heads: &Heads, demand: &Demand<'_>) -> Result<Option<Vec<Vec<f64>>>> {
    let weights = match heads {
        Heads::Weights { heads } => heads,
        _ => return Ok(None),
    };
    expect("layers with head weights", demand.heads.len(), weights.len())?;
    for (&count, weights) in demand.heads.iter().zip(weights) {
        expect("head weights of a layer", count, weights.len())?;
    }
    Ok(Some(weights.clone()))
}

/// Less than what is protected: shares in proportion to it, one slot each first where there are enough.
fn scarce(demand: &Demand<'_>) -> Result<Vec<Share>> {
    let holding = demand.lens.iter().filter(|&&n| n > 0).count() as u64;
    let claims: Vec<Claim> = (0..demand.lens.len())
        .map(|s| {
            let least = demand.least(s);
            let floor = u64::from(demand.budget >= holding).min(least);
            Claim { weight: least, floor, cap: least }
        })
        .collect();
    let budgets = apportion(demand.budget, &claims)?;
    Ok(budgets.into_iter().enumerate().map(|(s, budget)| single(s, budget)).collect())
}

fn single(segment: usize, budget: u64) -> Share {
    let contest = Contest { segments: segment..segment + 1, budget, floors: vec![0] };
    Share { contest, split: Split::Contest }
}

/// Shares by weight: every segment on its own.
fn fixed(
    demand: &Demand<'_>,
    segments: &[usize],
    budget: u64,
    weight: impl Fn(usize) -> u64,
) -> Result<Vec<Share>> {
    let claims: Vec<Claim> = segments
        .iter()
        .enumerate()
        .map(|(i, &s)| Claim { weight: weight(i), floor: demand.least(s), cap: demand.lens[s] })
        .collect();
    let budgets = apportion(budget, &claims)?;
    Ok(segments.iter().zip(budgets).map(|(&s, budget)| single(s, budget)).collect())
}

/// One contest over the segments, with `α` of the equal share safe for each.
fn contested(
    demand: &Demand<'_>,
    segments: &[usize],
    budget: u64,
    alpha: Fraction,
    split: Split,
) -> Result<Share> {
    let safe = alpha.of(budget) / segments.len().max(1) as u64;
    let wanted = |&s: &usize| (demand.least(s), safe.min(demand.lens[s]));
    let floors = floors(budget, segments.iter().map(wanted))?;
    let first = segments.first().copied().unwrap_or(0);
    let contest = Contest { segments: first..first + segments.len(), budget, floors };
    Ok(Share { contest, split })
}

/// What is safe for each: the least it must get and what it should get, of which protection may leave less.
fn floors(budget: u64, wanted: impl Iterator<Item = (u64, u64)>) -> Result<Vec<u64>> {
    let claim = |(least, safe): (u64, u64)| {
        let wanted = least.max(safe);
        Claim { weight: wanted, floor: least, cap: wanted }
    };
    let claims: Vec<Claim> = wanted.map(claim).collect();
    let total: u64 = claims.iter().map(|claim| claim.cap).sum();
    apportion(total.min(budget), &claims)
}

/// Slots of each layer.
fn layer_budgets(layers: &Layers, demand: &Demand<'_>) -> Result<Vec<u64>> {
    let count = demand.heads.len();
    let mut first = 0;
    let ranges: Vec<_> = demand
        .heads
        .iter()
        .map(|&n| {
            first += n;
            first - n..first
        })
        .collect();
    let sum = |f: &dyn Fn(usize) -> u64, l: usize| ranges[l].clone().map(f).sum::<u64>();
    let held = |l: usize| sum(&|s| demand.lens[s], l);
    let least = |l: usize| sum(&|s| demand.least(s), l);
    // Of what: published schedules that count evictable slots only share what is left above protected ones.
    let spare = demand.budget - (0..count).map(least).sum::<u64>();
    let above = |weights: Vec<u64>| -> Result<Vec<u64>> {
        let claim = |(l, w): (usize, u64)| Claim {
            weight: w * demand.heads[l] as u64,
            floor: 0,
            cap: held(l) - least(l),
        };
        let claims: Vec<Claim> = weights.into_iter().enumerate().map(claim).collect();
        let budgets = apportion(spare, &claims)?;
        Ok(budgets.into_iter().enumerate().map(|(l, b)| b + least(l)).collect())
    };
    let floors = |part: Fraction| {
        let heads: usize = demand.heads.iter().sum();
        let mean = |l: usize| {
            let share = u128::from(demand.budget) * demand.heads[l] as u128 / heads.max(1) as u128;
            share as u64
        };
        floors(demand.budget, (0..count).map(|l| (least(l), part.of(mean(l)).min(held(l)))))
    };
    let by_heads = |(w, &n): (u64, &usize)| w * n as u64;
    let (weights, floors): (Vec<u64>, _) = match layers {
        Layers::Uniform | Layers::Global => {
            (demand.heads.iter().map(|&n| n as u64).collect(), floors(Fraction::ZERO)?)
        }
        Layers::Weights { layers } => {
            expect("layer weights", count, layers.len())?;
            (weights_from("layers", layers)?, floors(Fraction::ZERO)?)
        }
        Layers::Sensitivity(sensitivity) => {
            let weights = weights_from("similarity", &sensitivity.weights(count)?)?;
            let weights = weights.into_iter().zip(demand.heads).map(by_heads).collect();
            (weights, floors(sensitivity.floor)?)
        }
        Layers::Pyramid { beta } => {
            let room = (0..count).map(|l| held(l) - least(l)).min().unwrap_or(0);
            return above(pyramid(*beta, count, spare, room)?);
        }
        Layers::Preference(preference) => {
            preference.validate()?;
            let weight = |p: f64, l: usize| (p * demand.heads[l] as f64).min(f64::MAX);
            let claim = |l| match demand.preferences.get(l) {
                Some(&p) => (weight(p, l), held(l) - least(l)),
                None => (0.0, 0),
            };
            let claims: Vec<(f64, u64)> = (0..count).map(claim).collect();
            let room = claims.iter().map(|(_, cap)| cap).sum();
            let won = highest_averages(spare.min(room), &claims)?;
            return Ok((0..count).map(|l| won[l] + least(l)).collect());
        }
        Layers::Boundary(boundary) => {
            return above(weights_from("importance", &boundary.weights(count)?)?);
        }
    };
    let claims: Vec<Claim> =
        (0..count).map(|l| Claim { weight: weights[l], floor: floors[l], cap: held(l) }).collect();
    apportion(demand.budget, &claims)
}

/// Weights falling linearly from `max` to `min` with `min = mean/β`, `max = 2·mean - min`, and
/// `max = room`, `min = 2·mean - room` where the first layer has no more room.
fn pyramid(beta: u64, layers: usize, spare: u64, room: u64) -> Result<Vec<u64>> {
    if beta == 0 || beta > 1 << 20 {
        return Err(Error::Parameter {
            name: "beta",
            expected: "an integer from 1 to 2^20",
            got: beta.to_string(),
        });
    }
    let layers = layers as u128;
    // In units of 1 / (layers · β).
    let mean = u128::from(spare) * u128::from(beta);
    let room = u128::from(room) * layers * u128::from(beta);
    let (mut max, mut min) = (2 * mean - u128::from(spare), u128::from(spare));
    if max > room {
        (max, min) = (room, (2 * mean).saturating_sub(room));
    }
    let steps = layers.saturating_sub(1).max(1);
    let weights: Vec<u128> =
        (0..layers).map(|l| (max * steps + l * min).saturating_sub(l * max)).collect();
    Ok(narrow(&weights))
}

fn expect(what: &'static str, expected: usize, got: usize) -> Result<()> {
    match expected == got {
        true => Ok(()),
        false => Err(Error::Shape { what, expected: expected as u64, got: got as u64 }),
    }
}
