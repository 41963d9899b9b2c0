//! KNorm and KeyDiff: scores from keys alone, no queries needed.
//!
//! * KNorm: `-‖k‖₂` (arXiv 2406.11430). RoPE preserves norms, so rotated keys serve.
//! * KeyDiff: `-cos(k_t, mean_t k/‖k‖)` (arXiv 2504.15364), at the end of prefill; the paper's block-wise form is this
//!   one applied to blocks.
//! * Cost: one pass over K (KeyDiff two).

use super::{Needs, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Keys of small norm draw attention.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct KNorm {}
parameters!(KNorm {});

impl<B: Backend> Scorer<B> for KNorm {
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
        backend.key_norm(layers, &mut scores)?;
        Ok(scores.into())
    }
}

/// Keys unlike the others are worth keeping.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct KeyDiff {}
parameters!(KeyDiff {});

impl<B: Backend> Scorer<B> for KeyDiff {
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
        backend.key_diff(layers, &mut scores)?;
        Ok(scores.into())
    }
}
