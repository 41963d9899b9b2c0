//! ExpectedAttention: what the queries to come are expected to attend to, from the mean and covariance of those so far.
//!
//! Queries before RoPE are taken for normally distributed, so that the exponential of a logit has a mean in closed form. With
//! `μ` and `Σ` of a query head, averaged over the rotations of the next positions ([`QueryMoments`](crate::QueryMoments)):
//!
//! `a[hq, t] = softmax_t(μ·k_t/√D + k_tᵀΣk_t/(2D))`, `s[h, t] = (mean_g a[h·G + g, t] + epsilon) · ‖v_t‖₂`.
//!
//! * Source: ExpectedAttention (arXiv 2510.00636), code NVIDIA/kvpress, `ExpectedAttentionPress`: 512 positions, 4 sinks that
//!   take no part and stay, `epsilon` 0. Scores agree with that code's to rounding (`tests/golden`); its softmax is in the model's
//!   dtype, here in f32.
//! * `epsilon=0.01` or `0.02` leave a slot that nobody is expected to look at the size of its value: variants that keep
//!   needles.
//! * `value_norm=l1` or `l2` weigh with what the value writes instead; they need the output projection.
//! * Cost: a pass over K and one over V, `2·Hq·D²·T` flops, and as many while the queries are gathered.

use super::{Needs, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{ExpectedAttention, ValueNorm};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Attention of the queries to come.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Expected {
    /// Tokens at the start that take no part; `sinks` protects them as well.
    pub sinks: u32,
    /// Added to attention before it is multiplied with the norm.
    pub epsilon: f32,
    /// Norm of a value.
    pub value_norm: ValueNorm,
}
parameters!(Expected { sinks: "an integer", epsilon: "a number", value_norm: "l1, l2 or plain" });

impl Default for Expected {
    fn default() -> Self {
        Self { sinks: 4, epsilon: 0.0, value_norm: ValueNorm::Plain }
    }
}

impl<B: Backend> Scorer<B> for Expected {
    fn needs(&self) -> Needs {
        let o_proj = self.value_norm.projects();
        Needs { expected_queries: true, o_proj, ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let lens = segment_lens(layers);
        let mut attention = backend.zeros(&lens)?;
        let op = ExpectedAttention { sinks: self.sinks };
        backend.expected_attention(op, layers, &mut attention)?;
        let mut scores = backend.zeros(&lens)?;
        backend.value_norm(self.value_norm, layers, &mut scores)?;
        backend.weigh(self.epsilon, &attention, &mut scores)?;
        Ok(scores.into())
    }
}
