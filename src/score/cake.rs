//! CAKE: slots that the window attends to, and those that it attends to by turns.
//!
//! `score[h, t] = avgpool( mean_g ( mean_w P[h·G + g, w, t] + γ · var_w P[h·G + g, w, t] ) )` for slots before the window: attention that
//! shifts from query to query may come back. Window slots score 0 and are protected instead. Beside the scores go the entropy of the
//! window's attention and its variance, summed over the layer, by which layers share out the budget
//! ([`Preference`](crate::allocate::Preference)).
//!
//! * Source: CAKE (arXiv 2503.12491, ICLR 2025), W = 32, kernel 5, γ = 200 as in `CakeGlobalPress` of DefensiveKV's code.
//! * `var` is the sample variance, as `torch.var` has it; of a window of one query, where that is NaN, it is 0.
//! * Entropy is `-P ln P`, which is 0 where `P` is. The code guards the logarithm by 1e-10, which adds at most that much per term.
//! * Cost: SnapKV's two passes over K, `2·Hq·W·T·D` flops each, and a few operations more per weight.

use super::{Needs, Queries, Scored, Scorer, past_lens, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{AttentionSpread, Pool, Pooling};
use crate::error::Result;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Window attention and its variance, pooled over neighbours.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Cake {
    /// `W`, the observation window.
    pub window: u32,
    /// Average-pooling kernel, odd.
    pub kernel: u32,
    /// `γ`: what a variance counts for beside a mean.
    pub gamma: f32,
}
parameters!(Cake {
    window: "a positive integer",
    kernel: "an odd integer",
    gamma: "a finite number",
});

impl Default for Cake {
    fn default() -> Self {
        Self { window: 32, kernel: 5, gamma: 200.0 }
    }
}

impl<B: Backend> Scorer<B> for Cake {
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
        let mut scores = backend.zeros(&lens)?;
        let mut spread = backend.zeros(&vec![2; lens.len()])?;
        let op = AttentionSpread { window: self.window, gamma: self.gamma };
        backend.attention_spread(op, layers, &mut scores, &mut spread)?;
        let lens = past_lens(layers, self.window);
        // Of a mean as of its terms: averages of averages have no order.
        let pool = Pool { kind: Pooling::Avg, kernel: self.kernel, lens: &lens };
        backend.pool(&pool, &mut scores)?;
        Ok(Scored { spread: Some(spread), ..scores.into() })
    }
}
