//! DefensiveKV: rank slots by the worst case of what they may be needed for, not by the mean.
//!
//! Per query row, attention over the past is average-pooled and scaled back to the row's mass; then
//! `R̃[t] = max over window and group`, `R = max(R̃, mean_t R̃)` (the adaptive prior), and `R · ν` with the value
//! norm `ν[t] = mean_g ‖v_t · W_o‖₁`. Slots that carry the bulk of the mean attention come first of all: the
//! smallest set whose mass, with the window's own, reaches `threshold`.
//!
//! * Source: DefensiveKV (Alg. 1 and 2), code FFY0/DefensiveKV@9251b95 `efficient_defensivekv_press.py`.
//! * Corrected here (reference mode `defensivekv` keeps the code's behaviour): the window's mass is the true one,
//!   where the code sums the w columns before the window; the threshold is compared with absolute masses, per
//!   head; the first set never exceeds the head's mean budget less its window, and never goes negative;
//!   rows without past mass give 0, not NaN; no statistic crosses sequences.
//! * `norm_scale`: the code divides `ν` by its sum over the heads at the same position, the paper by its sum over the
//!   layer. Within a layer the latter changes nothing.
//! * `value_norm=l2`: the cheaper norm of [`ValueNorm::L2`], not the paper's.
//! * Cost: SnapKV's two passes and one output projection over the cache, `2·Hq·T·D·hidden` flops.

use super::{FirstSet, Needs, Queries, Room, Scored, Scorer, check_part, past_lens, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{NormScale, Reduce, ValueNorm, WindowAttention};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Defensive aggregation over window and group.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Defensive {
    /// `W`, the observation window.
    pub window: u32,
    /// Average-pooling kernel, odd.
    pub kernel: u32,
    /// Attention mass that the first slots must hold together with the window.
    pub threshold: f32,
    /// Norm of what a value writes.
    pub value_norm: ValueNorm,
    /// What value norms are divided by.
    pub norm_scale: NormScale,
}
parameters!(Defensive {
    window: "a positive integer",
    kernel: "an odd integer",
    threshold: "a number from 0 to 1",
    value_norm: "l1, l2 or plain",
    norm_scale: "none, layer or heads",
});

impl Default for Defensive {
    fn default() -> Self {
        Self {
            window: 32,
            kernel: 5,
            threshold: 0.9,
            value_norm: ValueNorm::L1,
            norm_scale: NormScale::Heads,
        }
    }
}

impl<B: Backend> Scorer<B> for Defensive {
    fn needs(&self) -> Needs {
        let queries = Queries::Last(self.window);
        Needs { queries, o_proj: self.value_norm.projects(), ..Needs::default() }
    }
    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        check_part("threshold", self.threshold)?;
        let attention = WindowAttention {
            row_pool: Some(self.kernel),
            ..WindowAttention::plain(self.window, Reduce::Max)
        };
        let lens = segment_lens(layers);
        let mut worst = backend.zeros(&lens)?;
        let mut mean = backend.zeros(&lens)?;
        backend.window_attention(&attention, layers, &mut worst, Some(&mut mean))?;
        let past = past_lens(layers, self.window);
        backend.floor_at_mean(&past, &mut worst)?;
        let mut norms = backend.zeros(&lens)?;
        backend.value_norm(self.value_norm, layers, &mut norms)?;
        backend.scale_norms(self.norm_scale, layers, &mut norms)?;
        backend.weigh(0.0, &worst, &mut norms)?;
        Ok(Scored { first: Some(mean), ..norms.into() })
    }
    fn first_set(&self, room: &Room) -> FirstSet {
        let window = self.window.max(room.recent);
        let slots = room.slots_per_head.saturating_sub(window.into());
        FirstSet { mass: self.threshold, slots }
    }
}
