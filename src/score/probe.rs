//! Attention of a probe: what tokens look at that ask in the stead of those to come.
//!
//! `score[h, t] = reduce_g reduce_m softmax_t(q_probe[h·G + g, m] · k_h / √D)` over all cached slots, without a mask. The probe is
//! the engine's: a prompt that is run over the cache and rolled back, or the masks of a diffusion model
//! ([`LayerView::with_probe`]).
//!
//! * Sources: EpiCache (arXiv 2509.17396, block prefill with a patched prompt; maxima over rows and group, as KVzip, arXiv
//!   2505.23416) and MaskKV (arXiv 2510.09309, §3.2, the mask rows' votes: their sum orders as the mean does; the group's
//!   mean is a choice of this crate, the paper has no groups). EpiCache's code takes the softmax in the model's dtype; here it
//!   is f32.
//! * Cost: two passes over K, `2·Hq·M·T·D` flops each.

use super::{Needs, Scored, Scorer, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// What the probe's queries look at.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Probe {
    /// Reduction over the probe's rows.
    pub rows: Reduce,
    /// Reduction over the query heads of a group.
    pub group: Reduce,
}
parameters!(Probe { rows: "mean or max", group: "mean or max" });

impl Default for Probe {
    /// The most attention that anyone pays.
    fn default() -> Self {
        Self { rows: Reduce::Max, group: Reduce::Max }
    }
}

impl<B: Backend> Scorer<B> for Probe {
    fn needs(&self) -> Needs {
        Needs { probe: true, ..Needs::default() }
    }

    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        let attention = WindowAttention {
            over_group: self.group,
            score_window: true,
            probe: true,
            ..WindowAttention::plain(u32::MAX, self.rows)
        };
        let mut scores = backend.zeros(&segment_lens(layers))?;
        backend.window_attention(&attention, layers, &mut scores, None)?;
        Ok(scores.into())
    }
}
