//! SnapKV and TOVA: what the last queries attend to.
//!
//! SnapKV: `score[h, t] = pool(reduce_g(mean_w P[h·G + g, w, t]))` for slots before the window, with
//! `P = softmax(q · kᵀ / √D)` over all visible slots; window slots score 0 and are protected instead.
//!
//! * Source: SnapKV (arXiv 2404.14469, §4; its LongBench settings are W = 32, kernel 7, max pooling). The group
//!   reduction before pooling is Ada-KV's (FFY0/AdaKV, `snapkv_utils.py`); kvpress averages, and pools
//!   before the group mean, which is the same for average pooling.
//! * TOVA (arXiv 2401.06104): the last query alone, averaged over all query heads of the layer, the
//!   same scores for each KV head. Published as per-step eviction; here as often as the planner runs.
//! * Cost: two passes over K (one with the prefill's log-sum-exp), `2·Hq·W·T·D` flops each.

use super::{Needs, Queries, Scored, Scorer, past_lens, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{Pool, Pooling, Reduce, WindowAttention};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Window attention, pooled over neighbours.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct SnapKv {
    /// `W`, the observation window.
    pub window: u32,
    /// Pooling kernel, odd.
    pub kernel: u32,
    /// What the kernel computes.
    pub pooling: Pooling,
    /// Reduction over the query heads of a group.
    pub group: Reduce,
}
parameters!(SnapKv {
    window: "a positive integer",
    kernel: "an odd integer",
    pooling: "avg or max",
    group: "mean or max",
});

impl Default for SnapKv {
    fn default() -> Self {
        Self { window: 32, kernel: 7, pooling: Pooling::Max, group: Reduce::Mean }
    }
}

impl<B: Backend> Scorer<B> for SnapKv {
    fn needs(&self) -> Needs {
        Needs { queries: Queries::Last(self.window), ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let attention = WindowAttention {
            over_group: self.group,
            ..WindowAttention::plain(self.window, Reduce::Mean)
        };
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.window_attention(&attention, layers, &mut scores, None)?;
        let lens = past_lens(layers, self.window);
        let pool = Pool { kind: self.pooling, kernel: self.kernel, lens: &lens };
        backend.pool(&pool, &mut scores)?;
        Ok(scores.into())
    }
}

/// Attention of the last token, over all query heads.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Tova {}
parameters!(Tova {});

impl<B: Backend> Scorer<B> for Tova {
    fn needs(&self) -> Needs {
        Needs { queries: Queries::Last(1), ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let attention = WindowAttention::plain(1, Reduce::Mean);
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.window_attention(&attention, layers, &mut scores, None)?;
        // Heads have equal groups, so the sum of their means orders as the mean over all query heads does.
        let heads: Vec<usize> = layers.iter().map(|l| l.shape().kv_heads()).collect();
        backend.share_heads(&heads, &mut scores)?;
        Ok(scores.into())
    }
}
