//! Who gets how much: budgets over layers and over the heads of a layer, in whole slots.
//!
//! An allocation knows no scores and no device. It divides the segments of a sequence into [`Share`]s:
//! what is decided by number alone becomes a share of one segment, what is decided by score becomes a
//! contest with floors that the backend's selection runs. Shares sum to the budget by construction.

pub mod apportion;

pub use apportion::{Claim, apportion};

use crate::backend::ops::Contest;
use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::profile::Profile;
use apportion::weights_from;

/// Segments of one sequence that share a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The contest, numbered within the sequence.
    pub contest: Contest,
    /// Instead of selecting by the contest, give each segment `(1 - α)` of what it would win plus `α` of
    /// an equal share (Ada-KV's safeguard), then let it keep its best.
    pub blend: Option<Fraction>,
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

impl Demand<'_> {
    /// Least that a segment should get: what is protected, and never nothing.
    fn least(&self, s: usize) -> u64 {
        self.protected[s].max(1).min(self.lens[s])
    }
}

/// Divides the demand among layers and heads.
pub fn allocate(layers: &Layers, heads: &Heads, demand: &Demand<'_>) -> Result<Vec<Share>> {
    let all: Vec<usize> = (0..demand.lens.len()).collect();
    let least: u64 = all.iter().map(|&s| demand.least(s)).sum();
    if demand.budget < least {
        return scarce(demand);
    }
    let weights = head_weights(heads, demand)?;
    if let Layers::Global = layers {
        return match (heads, weights) {
            (Heads::Ada { alpha, form: AdaForm::Floor }, _) => {
                Ok(vec![contested(demand, &all, demand.budget, *alpha, None)?])
            }
            (Heads::Profile { .. }, _) => {
                Ok(vec![contested(demand, &all, demand.budget, Fraction::ZERO, None)?])
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
    let budgets = layer_budgets(layers, demand)?;
    let mut shares = Vec::new();
    let mut first = 0;
    for (l, (&count, &budget)) in demand.heads.iter().zip(&budgets).enumerate() {
        let segments = &all[first..first + count];
        first += count;
        match heads {
            Heads::Ada { alpha, form: AdaForm::Floor } => {
                shares.push(contested(demand, segments, budget, *alpha, None)?);
            }
            Heads::Ada { alpha, form: AdaForm::Blend } => {
                shares.push(contested(demand, segments, budget, Fraction::ZERO, Some(*alpha))?);
            }
            Heads::Uniform => shares.extend(fixed(demand, segments, budget, |_| 1)?),
            Heads::Profile { .. } => {
                shares.push(contested(demand, segments, budget, Fraction::ZERO, None)?);
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
        Heads::Uniform | Heads::Ada { .. } | Heads::Profile { .. } => return Ok(None),
        Heads::Weights { heads } => heads,
    };
    let expect = |what, expected: usize, got: usize| match expected == got {
        true => Ok(()),
        false => Err(Error::Shape { what, expected: expected as u64, got: got as u64 }),
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
    Share { contest, blend: None }
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
    blend: Option<Fraction>,
) -> Result<Share> {
    let safe = alpha.of(budget) / segments.len().max(1) as u64;
    let wanted = |s: usize| demand.least(s).max(safe).min(demand.lens[s]);
    // Protection may leave less than the safeguard asks for.
    let claims: Vec<Claim> = segments
        .iter()
        .map(|&s| Claim { weight: wanted(s), floor: demand.least(s), cap: wanted(s) })
        .collect();
    let total: u64 = segments.iter().map(|&s| wanted(s)).sum();
    let floors = apportion(total.min(budget), &claims)?;
    let first = segments.first().copied().unwrap_or(0);
    let contest = Contest { segments: first..first + segments.len(), budget, floors };
    Ok(Share { contest, blend })
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
    let weights: Vec<u64> = match layers {
        Layers::Uniform | Layers::Global => demand.heads.iter().map(|&n| n as u64).collect(),
        Layers::Weights { layers } => {
            if layers.len() != count {
                return Err(Error::Shape {
                    what: "layer weights",
                    expected: count as u64,
                    got: layers.len() as u64,
                });
            }
            weights_from("layers", layers)?
        }
        Layers::Pyramid { beta } => {
            // Above what is protected: the published schedule counts evictable slots only.
            let spare = demand.budget - (0..count).map(least).sum::<u64>();
            let room = (0..count).map(|l| held(l) - least(l)).min().unwrap_or(0);
            let weights = pyramid(*beta, count, spare, room)?;
            let claims: Vec<Claim> = (0..count)
                .map(|l| Claim {
                    weight: weights[l] * demand.heads[l] as u64,
                    floor: 0,
                    cap: held(l) - least(l),
                })
                .collect();
            let budgets = apportion(spare, &claims)?;
            return Ok(budgets.into_iter().enumerate().map(|(l, b)| b + least(l)).collect());
        }
    };
    let claims: Vec<Claim> =
        (0..count).map(|l| Claim { weight: weights[l], floor: least(l), cap: held(l) }).collect();
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
    // At most 52 bits, so that no later product overflows; exact for all but absurd sizes.
    let largest = weights.iter().copied().max().unwrap_or(0);
    let shift = (128 - largest.leading_zeros()).saturating_sub(52);
    Ok(weights.into_iter().map(|w| (w >> shift) as u64).collect())
}
