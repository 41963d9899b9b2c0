//! Budgets of layers by how much eviction in blocks changes their keys (EpiCache, arXiv 2509.17396).
//!
//! `M_l ∝ (1 - σ_l)^α` with `σ_l` the mean cosine between a layer's keys of a causal pass and of one that attends in blocks, measured
//! offline. Every layer keeps at least a part of the mean, no layer gets more than it holds, and the sum is exact.
//!
//! The published code has another form, which misses the sum: [`Sensitivity::published`].

use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::parameters::{Parameters, join, numbers};

/// In proportion to a power of each layer's dissimilarity.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Sensitivity {
    /// `σ` of each layer, from -1 to 1. None: all are equal.
    pub similarity: Vec<f64>,
    /// `α`: 0 for equal shares; the paper finds 2 to 4 best.
    pub sharpness: f64,
    /// Part of the mean budget that each layer keeps at least.
    pub floor: Fraction,
}

impl Default for Sensitivity {
    fn default() -> Self {
        let floor = Fraction::new(1, 4).unwrap_or_default();
        Self { similarity: Vec::new(), sharpness: 2.0, floor }
    }
}

impl Sensitivity {
    /// Relative budgets of `layers` layers, per head.
    pub(super) fn weights(&self, layers: usize) -> Result<Vec<f64>> {
        if !(self.sharpness.is_finite() && self.sharpness >= 0.0) {
            return Err(Error::Parameter {
                name: "sharpness",
                expected: "a finite number >= 0",
                got: self.sharpness.to_string(),
            });
        }
        if self.similarity.is_empty() {
            return Ok(vec![1.0; layers]);
        }
        super::expect("similarities of layers", layers, self.similarity.len())?;
        if !self.similarity.iter().all(|s| (-1.0..=1.0).contains(s)) {
            return Err(Error::Parameter {
                name: "similarity",
                expected: "cosines, from -1 to 1",
                got: join(&self.similarity),
            });
        }
        let weights: Vec<f64> =
            self.similarity.iter().map(|s| (1.0 - s).powf(self.sharpness)).collect();
        // No layer is sensitive, or none enough to be told from nothing.
        let nothing = weights.iter().all(|&w| w == 0.0);
        Ok(if nothing { vec![1.0; layers] } else { weights })
    }

    /// Slots per head of each layer as apple/ml-epicache (commit b742661) computes them for `mean` slots per head, in its f32:
    /// similarities are stretched to 0..1 first, and a quarter of the mean is the least, without making up for it elsewhere. So
    /// the most similar layer always has the least, and the sum may exceed `L·mean`. As `layer_weights` they give the exact
    /// sum with these proportions.
    pub fn published(similarity: &[f32], mean: u64, power: f32) -> Vec<u64> {
        let least = similarity.iter().copied().fold(f32::INFINITY, f32::min);
        let most = similarity.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if power == 0.0 || most <= least {
            return vec![mean; similarity.len()];
        }
        let weight = |s: &f32| (1.0 - (s - least) / (most - least)).powf(power);
        let weights: Vec<f32> = similarity.iter().map(weight).collect();
        let sum: f32 = weights.iter().sum();
        let total = (similarity.len() as u64 * mean) as f32;
        let slots = |w: &f32| (total * w / sum).floor() as u64;
        weights.iter().map(|w| slots(w).max((mean / 4).max(1))).collect()
    }
}

impl Parameters for Sensitivity {
    fn list(&self) -> Vec<(&'static str, String)> {
        vec![
            ("similarity", join(&self.similarity)),
            ("sharpness", self.sharpness.to_string()),
            ("floor", self.floor.to_string()),
        ]
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        let bad = |name, expected| Error::Parameter { name, expected, got: value.to_owned() };
        match key {
            "similarity" => self.similarity = numbers("similarity", value)?,
            "sharpness" => {
                self.sharpness = value.parse().map_err(|_| bad("sharpness", "a number"))?;
            }
            "floor" => {
                self.floor = value.parse().map_err(|_| bad("floor", "a fraction from 0 to 1"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIMILARITY: [f64; 4] = [0.95, 0.9, 0.8, 0.99];

    /// A power of one minus the similarity; golden shares of 32768 slots.
    #[test]
    fn shares_are_powers_of_dissimilarity() {
        for (sharpness, want) in [
            (1.1, [4143.333, 8881.429, 19037.760, 705.477]),
            (2.0, [1557.414, 6229.658, 24918.631, 62.297]),
            (0.0, [8192.0; 4]),
        ] {
            let all =
                Sensitivity { similarity: SIMILARITY.to_vec(), sharpness, ..Default::default() };
            let weights = all.weights(4).unwrap();
            let sum: f64 = weights.iter().sum();
            let shares: Vec<f64> = weights.iter().map(|w| 32768.0 * w / sum).collect();
            shares.iter().zip(want).for_each(|(s, w)| assert!((s - w).abs() < 1e-3, "{shares:?}"));
        }
    }

    /// The published arithmetic, and that it keeps more than was asked for.
    #[test]
    fn the_published_form_misses_its_sum() {
        let of = |power| Sensitivity::published(&SIMILARITY.map(|s| s as f32), 8192, power);
        assert_eq!(of(1.1), [3644, 8892, 20230, 2048]);
        assert_eq!(of(2.0), [2048, 5795, 25828, 2048]);
        assert_eq!(of(0.0), [8192; 4]);
        assert_eq!(Sensitivity::published(&[0.5; 3], 8, 2.0), [8; 3]);
    }

    #[test]
    fn nonsense_is_refused() {
        let of = |similarity: &[f64], sharpness| {
            let similarity = similarity.to_vec();
            Sensitivity { similarity, sharpness, ..Default::default() }.weights(2)
        };
        assert!(of(&[0.5], 2.0).is_err());
        assert!(of(&[0.5, 1.5], 2.0).is_err());
        assert!(of(&[0.5, 0.5], -1.0).is_err());
        assert_eq!(of(&[1.0, 1.0], 2.0).unwrap(), [1.0, 1.0], "nothing to tell layers apart");
    }
}
