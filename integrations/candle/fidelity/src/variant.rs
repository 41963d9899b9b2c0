//! Variants: what is compared, a policy at a budget, by name.

use std::fs::File;

use anyhow::{Context, Result, bail};
use kvbudget::backend::cpu::Cpu;
use kvbudget::{Budget, Policy, PolicyConfig, preset, profiled};
use kvbudget_candle::profiles::profile;
use serde::{Deserialize, Serialize};

/// A policy and a budget as they were named. Names are what results are kept by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Variant {
    pub policy: String,
    pub budget: String,
}

/// The model whose template the harness has.
const MODEL: &str = "Smollm2 135M 8k Lc100K Mix1 Ep2";
/// The name of no compression.
pub const FULL: &str = "full";

impl Variant {
    pub fn full() -> Self {
        Self { policy: FULL.to_owned(), budget: "100%".to_owned() }
    }

    pub fn is_full(&self) -> bool {
        self.policy == FULL
    }

    /// The full cache, then every policy at every budget.
    pub fn all(policies: &[String], budgets: &[String]) -> Result<Vec<Self>> {
        let mut all = vec![Self::full()];
        for policy in policies.iter().filter(|name| *name != FULL) {
            for budget in budgets {
                let variant = Self { policy: policy.clone(), budget: budget.clone() };
                variant.build()?;
                all.push(variant);
            }
        }
        Ok(all)
    }

    /// What the names stand for. The full cache is a budget of everything, by whatever policy.
    pub fn build(&self) -> Result<(Policy<Cpu>, Budget)> {
        let name = if self.is_full() { "streaming" } else { &self.policy };
        let config = config(name).with_context(|| format!("policy {:?}", self.policy))?;
        Ok((config.build()?, self.budget.parse()?))
    }
}

/// A preset and its parameters: `snapkv`, `snapkv:window=16:kernel=5`. Beside the presets there are `profiled`, by the
/// profile that ships, and `profiled@FILE`.
pub fn config(spec: &str) -> Result<PolicyConfig> {
    let mut parts = spec.split(':');
    let name = parts.next().unwrap_or_default();
    let mut config = match name.split_once('@') {
        Some(("profiled", path)) => {
            let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
            profiled(serde_json::from_reader(file).with_context(|| path.to_owned())?)
        }
        _ if name == "profiled" => {
            profiled(profile(MODEL)?.context("no profile ships for this model")?)
        }
        _ => preset(name)?,
    };
    for setting in parts {
        let Some((key, value)) = setting.split_once('=') else {
            bail!("expected key=value, got {setting:?}");
        };
        config.set(key, value)?;
    }
    config.name = spec.to_owned();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_and_mistakes_named() {
        let config = config("snapkv:window=16").unwrap();
        assert_eq!((config.name.as_str(), config.protect.recent), ("snapkv:window=16", 16));
        assert!(format!("{:#}", super::config("snapkv:wind=16").unwrap_err()).contains("window"));
        assert!(super::config("snapkv:16").is_err());
        assert!(super::config("snaps").is_err());
    }

    #[test]
    fn the_full_cache_comes_once() {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let all =
            Variant::all(&names(&["full", "snapkv", "tova"]), &names(&["5%", "10%"])).unwrap();
        assert_eq!(all.len(), 5);
        assert_eq!(all.iter().filter(|v| v.is_full()).count(), 1);
        assert!(Variant::all(&names(&["snapkv"]), &names(&["lots"])).is_err());
    }
}
