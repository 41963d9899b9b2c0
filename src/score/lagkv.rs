//! LagKV: tokens whose keys and values vary more than the next partition's range lets one expect.
//!
//! Slots after the sinks are cut into partitions of `lag`; each is scaled by the per-channel minimum and
//! maximum of the following one, and a slot's score is the softmax (over the partition) of its standard
//! deviation over channels, averaged over K and V. By default the rank within the partition counts, so that
//! all partitions keep alike. Sinks, the last partition and the remainder score 1, above all ranks.
//!
//! * Source: LagKV (arXiv 2504.04704); kvpress `lagkv_press.py`. A channel constant in the reference partition
//!   gives 0 here, where the published code divides by zero.
//! * Cost: one pass over K and V, no queries.

use super::{Needs, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::Lag;
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Variation against the following partition.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct LagKv {
    /// Slots at the start that are not partitioned.
    pub lag_sinks: u32,
    /// Slots per partition.
    pub lag: u32,
    /// Compare raw scores across partitions instead of ranks.
    pub cross_scoring: bool,
}
parameters!(LagKv {
    lag_sinks: "an integer",
    lag: "a positive integer",
    cross_scoring: "true or false",
});

impl Default for LagKv {
    fn default() -> Self {
        Self { lag_sinks: 4, lag: 128, cross_scoring: false }
    }
}

impl<B: Backend> Scorer<B> for LagKv {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let op = Lag { sinks: self.lag_sinks, lag: self.lag, cross_scoring: self.cross_scoring };
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.lag(&op, layers, &mut scores)?;
        Ok(scores.into())
    }
}
