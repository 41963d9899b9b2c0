//! Budgets of the layers at both ends against those between (MaskKV, arXiv 2510.09309, §3.3).
//!
//! `β` of the slots is shared equally by all layers, the rest by the two groups in proportion to the sums of their
//! layers' importance, and within a group equally:
//!
//! `k_l = β·k/L + (1 - β)·k·I_g/(I_boundary + I_middle)/L_g` for a layer of group `g`, of `L_g` layers with `I_g` in sum.
//!
//! Importance is measured offline, `imp_l = 1 - mean_i cos(h_in, h_out)` of the hidden rows before and after the attention: with
//! scores alone, all layers would have to be held before the first is cut. Shares are of evictable slots: the paper's budgets
//! count the prompt, and what is still to be decoded stays anyway. How many layers the ends have it does not say beyond "first and last".

use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::parameters::{Parameters, join, numbers};

/// The layers at both ends by their importance, those between by theirs.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Boundary {
    /// Of each layer, at least 0. None: all are equal.
    pub importance: Vec<f64>,
    /// Part of the slots that layers share equally.
    pub beta: Fraction,
    /// Layers at the start that belong to the ends.
    pub first: u32,
    /// Layers at the end that do.
    pub last: u32,
}

impl Default for Boundary {
    fn default() -> Self {
        let beta = Fraction::new(2, 5).unwrap_or_default();
        Self { importance: Vec::new(), beta, first: 1, last: 1 }
    }
}

impl Boundary {
    /// Relative budgets of `layers` layers, per head.
    pub(super) fn weights(&self, layers: usize) -> Result<Vec<f64>> {
        if self.importance.is_empty() {
            return Ok(vec![1.0; layers]);
        }
        super::expect("importance of layers", layers, self.importance.len())?;
        if self.importance.iter().any(|i| !i.is_finite() || *i < 0.0) {
            return Err(Error::Parameter {
                name: "importance",
                expected: "finite numbers >= 0",
                got: join(&self.importance),
            });
        }
        let ends = |l: usize| l < self.first as usize || l + self.last as usize >= layers;
        let group = |l: usize| (0..layers).filter(move |&other| ends(other) == ends(l));
        let total: f64 = self.importance.iter().sum();
        let beta = self.beta.as_f64();
        let weight = |l: usize| {
            let importance: f64 = group(l).map(|other| self.importance[other]).sum();
            let share = match total {
                0.0 => 1.0 / layers as f64,
                _ => importance / total / group(l).count() as f64,
            };
            beta / layers as f64 + (1.0 - beta) * share
        };
        Ok((0..layers).map(weight).collect())
    }
}

impl Parameters for Boundary {
    fn list(&self) -> Vec<(&'static str, String)> {
        vec![
            ("importance", join(&self.importance)),
            ("beta", self.beta.to_string()),
            ("first", self.first.to_string()),
            ("last", self.last.to_string()),
        ]
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        let bad = |name, expected| Error::Parameter { name, expected, got: value.to_owned() };
        match key {
            "importance" => self.importance = numbers("importance", value)?,
            "beta" => {
                self.beta = value.parse().map_err(|_| bad("beta", "a fraction from 0 to 1"))?;
            }
            "first" => self.first = value.parse().map_err(|_| bad("first", "an integer"))?,
            "last" => self.last = value.parse().map_err(|_| bad("last", "an integer"))?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(importance: &[f64], beta: &str) -> Vec<f64> {
        let importance = importance.to_vec();
        let beta = beta.parse().unwrap();
        let boundary = Boundary { importance, beta, ..Boundary::default() };
        boundary.weights(4).unwrap()
    }

    #[test]
    fn ends_and_middle_share_by_their_sums() {
        let near = |got: Vec<f64>, want: [f64; 4]| {
            got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-12, "{got:?}"));
        };
        near(weights(&[0.5, 0.1, 0.1, 0.3], "0.4"), [0.34, 0.16, 0.16, 0.34]);
        near(weights(&[0.5, 0.1, 0.1, 0.3], "1"), [0.25; 4]);
        near(weights(&[0.0; 4], "0"), [0.25; 4]);
        near(weights(&[], "0.4"), [1.0; 4]);
    }

    #[test]
    fn more_ends_than_layers_are_all_of_them() {
        let of = |layers: usize| {
            let importance = (1..=layers).map(|i| i as f64).collect();
            Boundary { importance, first: 2, last: 9, ..Boundary::default() }
                .weights(layers)
                .unwrap()
        };
        assert_eq!(of(1), [1.0]);
        assert!(of(3).iter().all(|&w| (w - 1.0 / 3.0).abs() < 1e-12));
    }

    #[test]
    fn nonsense_is_refused() {
        let of = |importance: &[f64]| {
            Boundary { importance: importance.to_vec(), ..Boundary::default() }.weights(2)
        };
        assert!(of(&[1.0]).is_err());
        assert!(of(&[1.0, -0.1]).is_err());
        assert!(of(&[1.0, f64::NAN]).is_err());
    }
}
