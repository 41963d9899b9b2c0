//! The plan as versioned JSON: `{"format": "kvbudget-plan", "version": 1, …, "layers": [{"heads": [{"kept": […]}]}]}`.
//!
//! Unknown formats, versions and fields are errors. Reading checks only the form; whether a plan keeps its
//! promises is [`Plan::check`]'s to say.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Plan, Report};
use crate::budget::Budget;
use crate::ids::Position;
use crate::ragged::Ragged;

const FORMAT: &str = "kvbudget-plan";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    format: String,
    version: u32,
    policy: String,
    budget: Budget,
    tokens: u32,
    slots: u64,
    bytes: u64,
    #[serde(default)]
    report: Report,
    layers: Vec<Layer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    heads: Vec<Head>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    kept: Vec<Position>,
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let layers = self.layers.iter().map(|heads| Layer {
            heads: heads.iter().map(|kept| Head { kept: kept.to_vec() }).collect(),
        });
        Wire {
            format: FORMAT.into(),
            version: VERSION,
            policy: self.policy.clone(),
            budget: self.budget,
            tokens: self.tokens,
            slots: self.slots,
            bytes: self.bytes,
            report: self.report.clone(),
            layers: layers.collect(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Plan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        crate::wire::expect((FORMAT, VERSION), (&wire.format, wire.version))
            .map_err(serde::de::Error::custom)?;
        let layers = wire
            .layers
            .into_iter()
            .map(|layer| layer.heads.into_iter().map(|h| h.kept).collect::<Ragged<_>>());
        Ok(Self {
            policy: wire.policy,
            budget: wire.budget,
            tokens: wire.tokens,
            slots: wire.slots,
            bytes: wire.bytes,
            report: wire.report,
            layers: layers.collect(),
        })
    }
}
