//! What was measured of a model's layers, once, offline: how like their keys stay under eviction in blocks (EpiCache), how much
//! their attention changes the hidden rows (MaskKV).
//!
//! Two numbers per layer at most, for budgets over layers that ask for them; the head's counterpart is [`profile`](crate::profile).

use crate::allocate::Layers;
use crate::error::{Error, Result};
use crate::policy::PolicyConfig;

/// Measurements of a model's layers. `{"format": "kvbudget-layers", "version": 1, "model": …, "similarity": […], "importance": […]}`;
/// what was not measured is left out.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "wire::Wire", into = "wire::Wire")
)]
pub struct LayerProfile {
    /// The model that was measured.
    pub model: String,
    /// See [`Sensitivity`](crate::allocate::Sensitivity).
    pub similarity: Option<Vec<f64>>,
    /// See [`Boundary`](crate::allocate::Boundary).
    pub importance: Option<Vec<f64>>,
}

impl LayerProfile {
    /// Gives the policy's budgets over layers what was measured for them.
    ///
    /// Errors: budgets that ask for no measurement, or for one that the profile lacks.
    pub fn apply(&self, config: &mut PolicyConfig) -> Result<()> {
        let (wanted, measured, what) = match &mut config.layers {
            Layers::Sensitivity(layers) => (
                &mut layers.similarity,
                &self.similarity,
                "similarity of layers in the layer profile",
            ),
            Layers::Boundary(layers) => (
                &mut layers.importance,
                &self.importance,
                "importance of layers in the layer profile",
            ),
            _ => {
                return Err(Error::Unsupported {
                    what: "a layer profile for this policy",
                    why: "its budgets over layers ask for no measurement",
                });
            }
        };
        let missing = Error::Missing { method: "budgets over layers", what };
        *wanted = measured.clone().filter(|layers| !layers.is_empty()).ok_or(missing)?;
        Ok(())
    }
}

#[cfg(feature = "serde")]
mod wire {
    use super::LayerProfile;

    const FORMAT: &str = "kvbudget-layers";
    const VERSION: u32 = 1;

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Wire {
        format: String,
        version: u32,
        model: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        similarity: Option<Vec<f64>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        importance: Option<Vec<f64>>,
    }

    impl From<LayerProfile> for Wire {
        fn from(profile: LayerProfile) -> Self {
            let LayerProfile { model, similarity, importance } = profile;
            Self { format: FORMAT.into(), version: VERSION, model, similarity, importance }
        }
    }

    impl TryFrom<Wire> for LayerProfile {
        type Error = String;
        fn try_from(wire: Wire) -> Result<Self, String> {
            crate::wire::expect((FORMAT, VERSION), (&wire.format, wire.version))?;
            let Wire { model, similarity, importance, .. } = wire;
            Ok(Self { model, similarity, importance })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::{Boundary, Sensitivity};
    use crate::preset::preset;

    fn profile() -> LayerProfile {
        LayerProfile { model: "m".into(), similarity: Some(vec![0.5, 0.9]), importance: None }
    }

    #[test]
    fn budgets_get_what_they_ask_for() {
        let mut config = preset("epicache").unwrap();
        profile().apply(&mut config).unwrap();
        let similarity = vec![0.5, 0.9];
        let expected = Layers::Sensitivity(Sensitivity { similarity, ..Default::default() });
        assert_eq!(config.layers, expected);
        let mut config = preset("maskkv").unwrap();
        let error = profile().apply(&mut config).unwrap_err();
        assert!(error.to_string().contains("importance"), "{error}");
        assert_eq!(config.layers, Layers::Boundary(Boundary::default()), "unchanged");
        assert!(profile().apply(&mut preset("snapkv").unwrap()).is_err());
    }

    #[cfg(feature = "serde")]
    #[test]
    fn files_round_trip_and_other_formats_are_refused() {
        let text = serde_json::to_string(&profile()).unwrap();
        assert_eq!(serde_json::from_str::<LayerProfile>(&text).unwrap(), profile());
        assert!(!text.contains("importance"), "{text}");
        for (from, to) in
            [("\"version\":1", "\"version\":2"), ("kvbudget-layers", "kvbudget-profile")]
        {
            let error = serde_json::from_str::<LayerProfile>(&text.replace(from, to));
            assert!(error.unwrap_err().to_string().contains("expected format"));
        }
    }
}
