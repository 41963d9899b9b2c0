//! Budgets of layers by how their attention spreads (CAKE, arXiv 2503.12491).
//!
//! A layer prefers `p_l = E_l^(1/τ1) · V_l^(1/τ2)`: `E_l`, the entropy of its window's attention, says over how many slots that
//! spreads, and `V_l`, the variance from query to query, how much it moves on. Both are measured while a layer is scored
//! ([`Scored::spread`](crate::score::Scored::spread)), so that budgets are known when all layers are: evictable slots go to layers in proportion
//! to `p_l` per head.
//!
//! Seen so far, a layer can only lose by those that come: with more claims for them its share of the slots shrinks. That is why shares are
//! rounded by [`highest_averages`](super::apportion::highest_averages), and why a cascade evicts early what the one-shot evicts in the end.

use crate::error::{Error, Result};
use crate::parameters::parameters;

/// In proportion to powers of entropy and variance.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Preference {
    /// `τ1`: the larger, the less entropy matters. Published per model, 0.4 to 2.3.
    pub tau1: f64,
    /// `τ2`: the same of variance.
    pub tau2: f64,
}
parameters!(Preference { tau1: "a positive number", tau2: "a positive number" });

impl Default for Preference {
    fn default() -> Self {
        Self { tau1: 1.6, tau2: 0.6 }
    }
}

impl Preference {
    pub(super) fn validate(&self) -> Result<()> {
        for (name, tau) in [("tau1", self.tau1), ("tau2", self.tau2)] {
            if !(tau.is_finite() && tau > 0.0) {
                let got = tau.to_string();
                return Err(Error::Parameter { name, expected: "a positive number", got });
            }
        }
        Ok(())
    }

    /// What a layer prefers: finite. Sums below zero are rounding's; what is no number wants nothing.
    pub(crate) fn of(&self, entropy: f64, variance: f64) -> f64 {
        let power = |x: f64, tau: f64| x.max(0.0).powf(1.0 / tau);
        match power(entropy, self.tau1) * power(variance, self.tau2) {
            nan if nan.is_nan() => 0.0,
            p => p.min(f64::MAX),
        }
    }
}
