//! A profile: which share of a sequence each head of a model should keep, measured once and stored as data.
//!
//! Where a model keeps what it needs is a property of its heads more than of the text: some retrieve, most look at
//! their neighbourhood. A profile is the mean of what plans over calibration texts gave every head, at several
//! budgets; at run time a head gets its share without any contest, and no extra pass is paid.
//!
//! * Source of the shares: plans by context reconstruction (KVzip, arXiv 2505.23416) with budgets contested over all
//!   layers (preset `reconstruct`). Static budgets by head are also what DuoAttention (arXiv 2410.10819) and
//!   HeadKV (arXiv 2410.19258) use, measured in other ways.
//! * Between measured budgets shares are interpolated; below the first they shrink to nothing in proportion, above the
//!   last they grow to everything.

use crate::budget::{Budget, Fraction};
use crate::error::{Error, Result};
use crate::ids::LayerId;
use crate::plan::Plan;

/// Shares of all heads at one budget.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Point {
    /// The budget.
    pub keep: Fraction,
    /// Which part of the tokens a head keeps, `[layer][head]`, in 0 to 1; their mean is about `keep`.
    pub shares: Vec<Vec<f64>>,
}

/// Shares of all heads of one model, by budget.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "wire::Wire", into = "wire::Wire")
)]
pub struct Profile {
    model: String,
    curve: Vec<Point>,
}

impl Profile {
    /// A profile of given points, in ascending order of their budgets.
    ///
    /// Errors: no point, budgets that do not ascend inside (0, 1), points of different shapes, shares outside 0 to 1.
    pub fn new(model: impl Into<String>, curve: Vec<Point>) -> Result<Self> {
        let bad = |expected, got: String| Err(Error::Parameter { name: "profile", expected, got });
        let Some(first) = curve.first() else {
            return bad("at least one measured budget", "none".into());
        };
        let lens = |p: &Point| p.shares.iter().map(Vec::len).collect::<Vec<_>>();
        let mut last = Fraction::ZERO;
        for point in &curve {
            if point.keep.as_f64() <= last.as_f64() || point.keep.as_f64() >= 1.0 {
                return bad("budgets that ascend between 0 and 1", point.keep.to_string());
            }
            last = point.keep;
            if lens(point) != lens(first) || lens(point).contains(&0) || point.shares.is_empty() {
                return bad("the same layers and heads at every budget", point.keep.to_string());
            }
            let mut shares = point.shares.iter().flatten();
            if let Some(share) = shares.find(|s| !(0.0..=1.0).contains(*s)) {
                return bad("shares from 0 to 1", share.to_string());
            }
        }
        Ok(Self { model: model.into(), curve })
    }

    /// The mean of what `plans` gave every head, by budget. Budgets must be fractions of the cache.
    ///
    /// Plans that protect much blur the measurement: sinks and windows are given to all heads anyway.
    pub fn of_plans<'a>(
        model: impl Into<String>,
        plans: impl IntoIterator<Item = &'a Plan>,
    ) -> Result<Self> {
        let mut sums: Vec<(Point, f64)> = Vec::new();
        for plan in plans {
            let Budget::Keep(keep) = plan.budget else {
                return Err(Error::Parameter {
                    name: "profile",
                    expected: "plans with fractions of the cache as budgets",
                    got: plan.budget.to_string(),
                });
            };
            let tokens = f64::from(plan.tokens.max(1));
            let shares: Vec<Vec<f64>> = (0..plan.layers.len() as u32)
                .map(|l| plan.head_budgets(LayerId(l)).map(|n| n as f64 / tokens).collect())
                .collect();
            match sums.iter_mut().find(|(point, _)| point.keep == keep) {
                None => sums.push((Point { keep, shares }, 1.0)),
                Some((point, count)) => {
                    *count += 1.0;
                    expect("layers of a plan", point.shares.len(), shares.len())?;
                    for (sum, shares) in point.shares.iter_mut().zip(&shares) {
                        expect("heads of a plan's layer", sum.len(), shares.len())?;
                        sum.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
                    }
                }
            }
        }
        sums.sort_by(|a, b| a.0.keep.as_f64().total_cmp(&b.0.keep.as_f64()));
        for (point, count) in &mut sums {
            // A ten-thousandth is far below what texts differ by, and keeps files short.
            let mean = |sum: &mut f64| *sum = (*sum / *count * 1e4).round() / 1e4;
            point.shares.iter_mut().flatten().for_each(mean);
        }
        Self::new(model, sums.into_iter().map(|(point, _)| point).collect())
    }

    /// The model that was measured.
    pub fn model(&self) -> &str {
        &self.model
    }
    /// Measured points, by budget.
    pub fn curve(&self) -> &[Point] {
        &self.curve
    }

    /// Shares of all heads, layer after layer, if these are the heads that were measured.
    pub(crate) fn shares_of(&self, heads: &[usize], keep: f64) -> Result<Vec<f32>> {
        let shares = self.shares(keep);
        expect("layers of the profile", heads.len(), shares.len())?;
        for (&heads, shares) in heads.iter().zip(&shares) {
            expect("heads of a layer of the profile", heads, shares.len())?;
        }
        Ok(shares.into_iter().flatten().map(|share| share as f32).collect())
    }

    /// Shares `[layer][head]` at a budget of the fraction `keep`.
    pub fn shares(&self, keep: f64) -> Vec<Vec<f64>> {
        let keep = keep.clamp(0.0, 1.0);
        let after = self.curve.partition_point(|p| p.keep.as_f64() <= keep);
        let end = |at: usize, edge: f64| match self.curve.get(at) {
            Some(point) => (point.keep.as_f64(), Some(&point.shares)),
            None => (edge, None),
        };
        let (low, below) = end(after.wrapping_sub(1), 0.0);
        let (high, above) = end(after, 1.0);
        let t = if high > low { (keep - low) / (high - low) } else { 0.0 };
        let of = |shares: Option<&Vec<Vec<f64>>>, edge: f64, l: usize, h: usize| {
            shares.map_or(edge, |s| s[l][h])
        };
        let heads = self.curve.first().map(|p| p.shares.iter().map(Vec::len)).into_iter().flatten();
        heads
            .enumerate()
            .map(|(l, n)| {
                (0..n)
                    .map(|h| of(below, 0.0, l, h) * (1.0 - t) + of(above, 1.0, l, h) * t)
                    .collect()
            })
            .collect()
    }
}

fn expect(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected as u64, got: got as u64 })
}

/// `{"format": "kvbudget-profile", "version": 1, "model": …, "curve": [{"keep": "20%", "shares": [[…]]}]}`.
#[cfg(feature = "serde")]
mod wire {
    use super::{Point, Profile};

    const FORMAT: &str = "kvbudget-profile";
    const VERSION: u32 = 1;

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Wire {
        format: String,
        version: u32,
        model: String,
        curve: Vec<Point>,
    }

    impl From<Profile> for Wire {
        fn from(profile: Profile) -> Self {
            let Profile { model, curve } = profile;
            Self { format: FORMAT.into(), version: VERSION, model, curve }
        }
    }

    impl TryFrom<Wire> for Profile {
        type Error = String;
        fn try_from(wire: Wire) -> Result<Self, String> {
            crate::wire::expect((FORMAT, VERSION), (&wire.format, wire.version))?;
            Profile::new(wire.model, wire.curve).map_err(|e| e.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        let point = |num, den, shares: [f64; 2]| Point {
            keep: Fraction::new(num, den).unwrap(),
            shares: vec![vec![shares[0]], vec![shares[1]]],
        };
        Profile::new("m", vec![point(1, 10, [0.2, 0.0]), point(1, 2, [0.6, 0.4])]).unwrap()
    }

    #[test]
    fn shares_are_interpolated_between_nothing_and_everything() {
        let at = |keep| profile().shares(keep).concat();
        let near = |got: Vec<f64>, want: [f64; 2]| {
            got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-12, "{got:?}"));
        };
        near(at(0.0), [0.0, 0.0]);
        near(at(0.05), [0.1, 0.0]);
        near(at(0.1), [0.2, 0.0]);
        near(at(0.3), [0.4, 0.2]);
        near(at(0.5), [0.6, 0.4]);
        near(at(0.75), [0.8, 0.7]);
        near(at(1.0), [1.0, 1.0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = profile().curve()[0].clone();
        assert!(Profile::new("m", vec![]).is_err());
        assert!(Profile::new("m", vec![good.clone(), good.clone()]).is_err());
        let too_much = Point { shares: vec![vec![1.5], vec![0.0]], ..good.clone() };
        assert!(Profile::new("m", vec![too_much]).is_err());
        let full = Point { keep: Fraction::new(1, 1).unwrap(), ..good };
        assert!(Profile::new("m", vec![full]).is_err());
    }

    #[cfg(feature = "serde")]
    #[test]
    fn files_round_trip_and_other_versions_are_refused() {
        let text = serde_json::to_string(&profile()).unwrap();
        assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), profile());
        let other = text.replace("\"version\":1", "\"version\":2");
        let error = serde_json::from_str::<Profile>(&other).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }
}
