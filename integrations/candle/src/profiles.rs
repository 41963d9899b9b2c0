//! Profiles that ship with the crate, and the policy they make the default for their models.
//!
//! How they were measured, and how well they hold: `fidelity/README.md`. Others are measured by
//! [`calibrate`](crate::reconstruct::calibrate).

use anyhow::{Context, Result};
use kvbudget::{PolicyConfig, Profile, profiled};

const PROFILES: &[&str] = &[include_str!("../profiles/SmolLM2-135M-Instruct.json")];

/// The profile of a model, by its name in GGUF metadata (`general.name`), if one ships.
pub fn profile(model: &str) -> Result<Option<Profile>> {
    for text in PROFILES {
        let profile: Profile = serde_json::from_str(text).context("a profile of this crate")?;
        if profile.model() == model {
            return Ok(Some(profile));
        }
    }
    Ok(None)
}

/// What serves a model best: budgets by its profile, and the best policy without one for models that have none.
pub fn default_policy(model: &str) -> Result<PolicyConfig> {
    Ok(profile(model)?.map_or_else(PolicyConfig::default, profiled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_by_name_and_others_are_not() {
        let found = profile("another").unwrap();
        assert!(found.is_none());
        assert_eq!(default_policy("Smollm2 135M 8k Lc100K Mix1 Ep2").unwrap().name, "profiled");
        assert_eq!(default_policy("another").unwrap().name, "reach");
    }
}
