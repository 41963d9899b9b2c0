//! Reach: what any query of the context looked back at.
//!
//! `R[h, t] = max over queries m at least `gap` tokens after t, and over the group, of P[m, t]`; averaged over
//! neighbours, raised to its mean over the head (DefensiveKV's adaptive prior) and weighed with the value norm.

use super::{Needs, Queries, ScoreContext, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{NormScale, Pool, Pooling, Reduce, WindowAttention};
use crate::error::Result;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Long-range attention of all queries.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Reach {
    /// Queries looked at: those of so many last tokens.
    pub queries: u32,
    /// Least distance between a query and a slot.
    pub gap: u32,
    /// Average-pooling kernel, odd.
    pub kernel: u32,
    /// What value norms are divided by.
    pub norm_scale: NormScale,
    /// Reduction over queries.
    pub over: Reduce,
    /// Raise to the mean.
    pub floor: bool,
}
parameters!(Reach {
    queries: "a positive integer",
    gap: "an integer",
    kernel: "an odd integer",
    norm_scale: "none, layer or heads",
    over: "mean or max",
    floor: "true or false",
});

impl Default for Reach {
    fn default() -> Self {
        Self {
            queries: u32::MAX,
            gap: 64,
            kernel: 5,
            norm_scale: NormScale::Heads,
            over: Reduce::Max,
            floor: true,
        }
    }
}

impl<B: Backend> Scorer<B> for Reach {
    fn needs(&self) -> Needs {
        let queries =
            if self.queries == u32::MAX { Queries::All } else { Queries::Last(self.queries) };
        Needs { queries, o_proj: true, ..Needs::default() }
    }

    fn score(
        &self,
        backend: &B,
        _: &ScoreContext<'_>,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let attention = WindowAttention {
            window: self.queries,
            over_window: self.over,
            over_group: self.over,
            row_pool: None,
            score_window: true,
            gap: self.gap,
        };
        let lens = segment_lens(layers);
        let mut scores = backend.zeros(&lens)?;
        backend.window_attention(&attention, layers, &mut scores, None)?;
        backend
            .pool(&Pool { kind: Pooling::Avg, kernel: self.kernel, lens: &lens }, &mut scores)?;
        if self.floor {
            backend.floor_at_mean(&lens, &mut scores)?;
        }
        let mut norms = backend.zeros(&lens)?;
        backend.value_norm(layers, &mut norms)?;
        backend.scale_norms(self.norm_scale, layers, &mut norms)?;
        backend.weigh(0.0, &scores, &mut norms)?;
        Ok(norms.into())
    }
}
