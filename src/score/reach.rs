//! Reach: what the model looks at now, and then what it may look back at from afar, in the worst case.
//!
//! First the slots that carry the bulk of the present: the smallest set of each head that holds
//! `1 - (1 - threshold)·(1 - r)²` of the mean attention of the last `near` queries, at a budget of the fraction `r`,
//! within `1 - (1 - present)·(1 - r)²` of the head's mean share of the budget. Then the rest by
//! `R[h, t] = max over the last `queries` queries m with t + gap <= m, and over the group, of P[h·G + g, m, t]`,
//! averaged over neighbours, raised to its mean over the head and weighed with the value norm
//! `ν[t] = mean_g ‖v_t · W_o‖₁`.
//!
//! * Source: this crate. From DefensiveKV (Alg. 1 and 2) come the maximum, the prior, the value norm and the first
//!   set. What differs was chosen on the development half of the tasks of `integrations/candle/fidelity`
//!   (docs/methods.md has the figures):
//!   - hundreds of queries instead of a window of 32. The prior, a head's mean, says how far back a head
//!     looks, and 32 queries say it badly. With budgets contested over all layers, or a profile, it is what
//!     heads that retrieve live on;
//!   - attention to the nearest `gap` slots counts for nothing in it: every head looks there;
//!   - the first set is about the present alone and its mass includes the newest tokens, so that few need protection;
//!   - the first set is bounded by a part of the budget: heads that look everywhere at once would take all
//!     of it. This bound trades what comes next (prose goes on as before) against what may be asked for later
//!     (retrieval), and a larger budget affords more of the former: hence the `(1 - r)²`;
//!   - value norms as they are: dividing them by their sum over a layer's heads hides which heads write much.
//! * Cost: SnapKV's with `W = queries + near`, and one output projection over the cache.

use super::{FirstSet, Needs, Queries, Room, Scored, Scorer, check_part, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{NormScale, Pool, Pooling, Reduce, ValueNorm, WindowAttention};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// The present first, then long-range attention.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Reach {
    /// Queries that look back: those of so many last tokens.
    pub queries: u32,
    /// Least distance between such a query and a slot.
    pub gap: u32,
    /// Average-pooling kernel, odd.
    pub kernel: u32,
    /// Norm of what a value writes.
    pub value_norm: ValueNorm,
    /// What value norms are divided by.
    pub norm_scale: NormScale,
    /// Queries of the present: those of so many last tokens.
    pub near: u32,
    /// Part of their attention mass that the first slots must hold, at a budget of nothing; 0 for no such slots.
    pub threshold: f32,
    /// Part of the budget that the first slots may take, at a budget of nothing.
    pub present: f32,
}
parameters!(Reach {
    queries: "a positive integer",
    gap: "an integer",
    kernel: "an odd integer",
    value_norm: "l1, l2 or plain",
    norm_scale: "none, layer or heads",
    near: "a positive integer",
    threshold: "a number from 0 to 1",
    present: "a number from 0 to 1",
});

impl Default for Reach {
    fn default() -> Self {
        Self {
            queries: 256,
            gap: 64,
            kernel: 5,
            value_norm: ValueNorm::L1,
            norm_scale: NormScale::None,
            near: 16,
            threshold: 0.85,
            present: 0.4,
        }
    }
}

impl<B: Backend> Scorer<B> for Reach {
    fn needs(&self) -> Needs {
        let queries = Queries::Last(self.queries.max(self.near));
        Needs { queries, o_proj: self.value_norm.projects(), ..Needs::default() }
    }

    fn score(
        &self,
        backend: &B,
        _: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        check_part("threshold", self.threshold)?;
        check_part("present", self.present)?;
        let lens = segment_lens(layers);
        let attention = |window, reduce, gap| WindowAttention {
            score_window: true,
            gap,
            ..WindowAttention::plain(window, reduce)
        };
        let mut scores = backend.zeros(&lens)?;
        let far = attention(self.queries, Reduce::Max, self.gap);
        backend.window_attention(&far, layers, &mut scores, None)?;
        let pool = Pool { kind: Pooling::Avg, kernel: self.kernel, lens: &lens };
        backend.pool(&pool, &mut scores)?;
        backend.floor_at_mean(&lens, &mut scores)?;
        let mut norms = backend.zeros(&lens)?;
        backend.value_norm(self.value_norm, layers, &mut norms)?;
        backend.scale_norms(self.norm_scale, layers, &mut norms)?;
        backend.weigh(0.0, &scores, &mut norms)?;

        let mut now = backend.zeros(&lens)?;
        let near = attention(self.near, Reduce::Mean, 0);
        backend.window_attention(&near, layers, &mut now, None)?;
        Ok(Scored { first: Some(now), ..norms.into() })
    }

    fn first_set(&self, room: &Room) -> FirstSet {
        if self.threshold == 0.0 {
            return FirstSet::default();
        }
        let slots = room.slots_per_head;
        let missing = 1.0 - (slots as f32 / room.tokens.max(1) as f32).min(1.0);
        let grown = |part: f32| 1.0 - (1.0 - part) * missing * missing;
        let free = slots.saturating_sub(room.recent.into());
        let slots = (free as f64 * f64::from(grown(self.present))) as u64;
        FirstSet { mass: grown(self.threshold), slots }
    }
}
