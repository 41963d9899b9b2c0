//! AnDPro: slots whose values, weighed by attention, reach furthest along what the window reads.
//!
//! To evict is to choose the subset that keeps the attention output. Relaxed, that scores a slot with
//! `s[h, t] = Σ_g Σ_w A[hq, w, t] · (v_t · y[hq, w])`, where `y = Σ_t A[hq, w, t] · v_t` anchors the query's output: a slot with much
//! attention whose value points away from the output scores low, even below zero.
//!
//! * Source: AnDPro (NeurIPS 2025, Anchor Direction Projection), code MIRALab-USTC/LLM-AnDPro@dfc2617: W = 32, every row pooled by
//!   maximum over 7, chunks of 4, the first chunk and the window kept, one selection over the heads of a layer.
//! * `anchor=evictable`, as the code has it, sums `y` over what is neither a sink nor in the window; `full`, as the paper writes it,
//!   over everything. Ranges that the caller names are evictable to the anchor, though they stay.
//! * Here the score is per KV head, the sum over its group (the code has one per query head and stores as many caches), and the
//!   budget counts every slot, protected ones included (two versions of the code keep `b - W` or `4·(b - W)` tokens for `b`).
//! * `normalise` divides by `‖y‖`: each query counts by direction alone. An option of this crate.
//! * Chunks are units of [`Align`](crate::select::Align), whose mean orders whole chunks as the code's sum does. A last, shorter chunk
//!   weighs by its mean, where the code's sum has fewer terms; it holds the newest token, so it is protected and never compared. A
//!   chunk with holes, of a cache compressed before, does compete, by the mean of what it still holds.
//! * There is no reference mode: no version of the published code runs as it was published.
//! * Cost: three passes over K, two over V, `10·Hq·W·T·D` flops (window attention alone: `2·Hq·W·T·D` or twice that).

use super::{Needs, Queries, Scored, Scorer, past_lens, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::Projection;
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::{named, parameters};
use crate::view::LayerView;

/// Slots over which a query's output is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Anchor {
    /// Those after the sinks and before the window.
    Evictable,
    /// All.
    Full,
}
named!(Anchor { Evictable => "evictable", Full => "full" });

/// Projection of values on the window's outputs.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct AnDPro {
    /// `W`, the observation window.
    pub window: u32,
    /// Tokens at the start that are not evictable; `sinks` protects them as well.
    pub sinks: u32,
    /// Pooling kernel of each query's weights, odd; 1 leaves them as they are.
    pub kernel: u32,
    /// What the outputs are summed over.
    pub anchor: Anchor,
    /// Divide by the outputs' lengths.
    pub normalise: bool,
}
parameters!(AnDPro {
    window: "a positive integer",
    sinks: "an integer",
    kernel: "an odd integer",
    anchor: "evictable or full",
    normalise: "true or false",
});

impl Default for AnDPro {
    fn default() -> Self {
        Self { window: 32, sinks: 4, kernel: 7, anchor: Anchor::Evictable, normalise: false }
    }
}

impl<B: Backend> Scorer<B> for AnDPro {
    fn needs(&self) -> Needs {
        Needs { queries: Queries::Last(self.window), ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let lens = segment_lens(layers);
        let anchor: Vec<_> = match self.anchor {
            Anchor::Full => lens.iter().map(|&len| 0..len).collect(),
            Anchor::Evictable => {
                let sinks = layers.iter().flat_map(|l| {
                    (0..l.shape().kv_heads()).map(|h| l.slots_before(h, self.sinks) as u32)
                });
                let past = past_lens(layers, self.window);
                sinks.zip(past).map(|(sinks, past)| sinks..past.max(sinks)).collect()
            }
        };
        let projection = Projection {
            window: self.window,
            row_pool: Some(self.kernel),
            normalise: self.normalise,
            anchor: &anchor,
        };
        let mut scores = backend.zeros(&lens)?;
        backend.projection(&projection, layers, &mut scores)?;
        Ok(scores.into())
    }
}
