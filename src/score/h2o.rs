//! H2O: heavy hitters by attention accumulated over all queries, with the most recent tokens beside them.
//!
//! `score[h, t] = mean_g Σ_w P[h·G + g, w, t]` over the causal attention of all `T` queries (here divided by `T`,
//! which changes no order). Half of each head's budget goes to recent tokens (preset `h2o`).
//!
//! * Source: H2O (arXiv 2306.14048). Accumulated at the end of prefill, where the paper evicts step by step.
//! * Needs the queries of all tokens: an observation window is not enough, and is refused.
//! * Cost: `4·Hq·T²·D` flops, as much as prefill attention.

use super::{ScoreContext, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::{Error, Result};
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
    fn score(
        &self,
        backend: &B,
        _: &ScoreContext<'_>,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<B::Floats> {
        let mut scores = Vec::with_capacity(layers.len());
        // Sequences of different lengths have windows of different lengths.
        for layer in layers {
            let rows = layer.q("h2o")?.len(0) as u64;
            if rows < u64::from(layer.tokens()) {
                let needed = u64::from(layer.tokens());
                return Err(Error::TooFewQueries { method: "h2o", needed, got: rows });
            }
            let attention = WindowAttention {
                window: layer.tokens(),
                over_window: Reduce::Mean,
                over_group: Reduce::Mean,
                row_pool: None,
                score_window: true,
            };
            let one = std::slice::from_ref(layer);
            let mut out = backend.zeros(&segment_lens(one))?;
            backend.window_attention(&attention, one, &mut out, None)?;
            scores.push(out);
        }
        backend.concat(scores)
    }
}
