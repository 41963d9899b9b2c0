//! Context reconstruction (KVzip): what the model looks at when it is made to repeat its context.
//!
//! After prefill the context's tokens run through the model once more, behind their own cache (an instruction to
//! repeat them, then the tokens). A slot is worth the most attention that any of these tokens pays to it:
//! `score[h, t] = max_{g, m} softmax(q[h·G + g, m] · k_h)[t]`. No question is needed, so the cache that is left
//! serves any.
//!
//! * Source: KVzip (arXiv 2505.23416, §3). Its code takes the softmax over one chunk of the context and the
//!   repetition of it, to save time; here it is over everything the token sees, as the model itself computes it.
//! * Cost: a second prefill of all tokens over a context twice as long, and the full cache until it is over: a
//!   cascade is of no use. Long contexts are repeated in chunks, and the maximum runs over all of them.
//! * The second pass is the engine's: [`Reconstruction`] takes its queries layer by layer, and
//!   [`Planner::push_scored`](crate::Planner::push_scored) its result.

use super::{Needs, Scored, Scorer};
use crate::backend::Backend;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::view::LayerView;

/// Scores of a second pass, brought by the caller. Pushing a layer without them is an error.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Reconstruct {}
parameters!(Reconstruct {});

impl<B: Backend> Scorer<B> for Reconstruct {
    fn needs(&self) -> Needs {
        Needs { second_pass: true, ..Needs::default() }
    }

    fn score(
        &self,
        _: &B,
        _: LayerId,
        _: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        Err(Error::Missing {
            method: "reconstruct",
            what: "scores of a second pass (Reconstruction, Planner::push_scored)",
        })
    }
}

/// The scores of one sequence while its context is being repeated.
pub struct Reconstruction<B: Backend> {
    layers: Vec<B::Floats>,
}

impl<B: Backend> Reconstruction<B> {
    /// Nothing seen yet, for the `tokens` of a dense context.
    pub fn new(backend: &B, geometry: &Geometry, tokens: u32) -> Result<Self> {
        let zeros = |shape: &crate::LayerShape| backend.zeros(&vec![tokens; shape.kv_heads()]);
        Ok(Self { layers: geometry.layers().iter().map(zeros).collect::<Result<_>>()? })
    }

    /// Takes in one layer of one forward pass: `view` holds the context's slots, then those of the `M` tokens that
    /// repeat it, with the queries of these `M`.
    pub fn observe(
        &mut self,
        backend: &B,
        layer: LayerId,
        view: &LayerView<'_, B::Storage<'_>>,
    ) -> Result<()> {
        let layers = self.layers.len();
        let scores = self.layers.get_mut(layer.index()).ok_or(Error::LayerOrder {
            expected: layers.saturating_sub(1),
            got: layer.index(),
            layers,
        })?;
        let attention = WindowAttention::plain(view.q("reconstruct")?.len(0) as u32, Reduce::Max);
        let mut seen = backend.zeros(&super::segment_lens(std::slice::from_ref(view)))?;
        backend.window_attention(&attention, std::slice::from_ref(view), &mut seen, None)?;
        backend.raise(&seen, scores)
    }

    /// Scores `[H, T]` of each layer, for [`Planner::push_scored`](crate::Planner::push_scored).
    pub fn into_scores(self) -> Vec<B::Floats> {
        self.layers
    }
}
