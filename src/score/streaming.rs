//! Baselines that look at no tensor: StreamingLLM (sinks and the most recent tokens) and seeded noise.
//!
//! * StreamingLLM (arXiv 2309.17453): sinks are protected (preset `streaming`), the rest goes by recency.
//!   Keys are not rotated anew: positions stay logical.
//! * Random: what a method must beat. The noise depends on seed, layer, head and position alone.

use super::{Needs, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::Positional;
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Later is better.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Streaming {}
parameters!(Streaming {});

impl<B: Backend> Scorer<B> for Streaming {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.positional(Positional::Recency, layers, &mut scores)?;
        Ok(scores.into())
    }
}

/// Uniform noise.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Random {
    /// The seed.
    pub seed: u64,
}
parameters!(Random { seed: "an integer" });

impl<B: Backend> Scorer<B> for Random {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn score(
        &self,
        backend: &B,
        layer: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let mut scores = backend.zeros(&segment_lens(layers))?;
        let op = Positional::Random { seed: self.seed, layer: layer.0 };
        backend.positional(op, layers, &mut scores)?;
        Ok(scores.into())
    }
}
