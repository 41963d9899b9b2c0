//! H2O: heavy hitters by attention accumulated over all queries, with the most recent tokens beside them.
//!
//! `score[h, t] = mean_g Σ_w P[h·G + g, w, t]` over the causal attention of all `T` queries (here divided by `T`,
//! which changes no order). Half of each head's budget goes to recent tokens (preset `h2o`).
//!
//! * Source: H2O (arXiv 2306.14048). Accumulated at the end of prefill, where the paper evicts step by step.
//! * Needs the queries of all tokens: an observation window is not enough, and is refused.
//! * Cost: `4·Hq·T²·D` flops, as much as prefill attention.

use super::{Needs, Queries, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Attention accumulated over all queries.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct H2o {}
parameters!(H2o {});

impl<B: Backend> Scorer<B> for H2o {
    fn needs(&self) -> Needs {
        Needs { queries: Queries::All, ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let attention = WindowAttention {
            score_window: true,
            // All queries, however many tokens a sequence has.
            ..WindowAttention::plain(u32::MAX, Reduce::Mean)
        };
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.window_attention(&attention, layers, &mut scores, None)?;
        Ok(scores.into())
    }
}
