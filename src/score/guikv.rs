//! GUI-KV: what the last queries attend to, what stands out on the current screenshot, less what it repeats of earlier ones.
//!
//! With frames `1..F` among the sequence's spans, the last being the current one:
//! * base: SnapKV's window attention, `W` = 8, averaged over 5 neighbours. The published sum over the window is `W` times the
//!   mean used here: the saliency is weighed with `saliency / W` instead, which orders alike.
//! * spatial saliency: `+ saliency · softmax_i(z_i / temperature)` over the tokens `i` of frame `F`, with the z-scores of their
//!   hidden norms. After pooling, not itself pooled; of the residual stream, unless the engine lends the norms behind the
//!   norm before attention, which the published code takes.
//! * temporal redundancy: per head, the subspace of frame `F`'s keys and `ρ = ‖k - BᵀB k‖` of the earlier frames' keys. The
//!   `⌊(1 - C/n)·m⌋` of their `m` slots with least `ρ`, over all earlier frames together, score 0, at a budget of `C` of the
//!   head's `n` slots: last of all, yet not forbidden. `n` counts slots held, so that after every frame the earlier ones lose
//!   of what they still had.
//!
//! * Source: GUI-KV (arXiv 2510.00536), from a description: its code is not for commercial use, and was not looked at. One
//!   selection per KV head by the mean over its group, where the code selects per query head. The code takes the first 32 keys
//!   of the frame for its subspace (`subspace=first`), the text speaks of a key subspace: here the principal one.
//! * The window's tokens are protected and score 0: what of a frame lies in the window takes no part.
//! * Cost: SnapKV's with `W` = 8; `4·rank·D` flops per earlier slot; the frame's keys travel to the host, for `2·D²` flops
//!   per key there and `O(D³)` per head.

use std::ops::Range;

use rayon::prelude::*;

use super::{Needs, Queries, Redundant, Room, Scored, Scorer, SnapKv, Subspace, segment_lens};
use crate::backend::Backend;
use crate::backend::ops::{Pooling, Reduce, Residuals, Saliency};
use crate::error::{Error, Result};
use crate::ids::LayerId;
use crate::parameters::parameters;
use crate::ragged::Ragged;
use crate::spans::SpanKind;
use crate::view::{LayerView, Storage};

/// Window attention over frames, less what the current one repeats.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct GuiKv {
    /// `W`, the observation window.
    pub window: u32,
    /// Average-pooling kernel, odd.
    pub kernel: u32,
    /// Weight of the current frame's saliency, whose shares sum to 1, against the attention mass of `W` queries.
    pub saliency: f32,
    /// What z-scores are divided by before the softmax.
    pub temperature: f32,
    /// Directions of the current frame's keys, at most.
    pub rank: u32,
    /// Which ones.
    pub subspace: Subspace,
}
parameters!(GuiKv {
    window: "a positive integer",
    kernel: "an odd integer",
    saliency: "a number",
    temperature: "a positive number",
    rank: "a positive integer",
    subspace: "first, pivoted or svd",
});

impl Default for GuiKv {
    fn default() -> Self {
        Self {
            window: 8,
            kernel: 5,
            saliency: 2.0,
            temperature: 3.5,
            rank: 32,
            subspace: Subspace::Svd,
        }
    }
}

/// Of one segment, slots.
struct Frames {
    current: Range<u32>,
    earlier: Vec<Range<u32>>,
}

impl GuiKv {
    /// What a head holds of the frames, as far as redundancy goes: nothing without keys of the current and of an earlier one.
    fn frames<S: Storage>(
        &self,
        layer: &LayerView<'_, S>,
        head: usize,
        frames: &[Range<u32>],
    ) -> Frames {
        let past = layer.tokens().saturating_sub(self.window);
        let slots = |positions: &Range<u32>, end: u32| {
            let before = |position: u32| layer.slots_before(head, position.min(end)) as u32;
            before(positions.start)..before(positions.end)
        };
        let (current, earlier) = match frames.split_last() {
            Some((current, earlier)) => (slots(current, u32::MAX), earlier),
            None => (0..0, frames),
        };
        let earlier: Vec<_> = earlier
            .iter()
            .map(|frame| slots(frame, past))
            .filter(|slots| !slots.is_empty())
            .collect();
        if current.is_empty() || earlier.is_empty() {
            return Frames { current: 0..0, earlier: Vec::new() };
        }
        Frames { current, earlier }
    }

    /// `-ρ` of earlier frames' keys.
    fn redundant<B: Backend>(
        &self,
        backend: &B,
        layers: &[LayerView<'_, B::Storage<'_>>],
        frames: Vec<Frames>,
    ) -> Result<Redundant<B::Floats>> {
        let dims = layers.iter().flat_map(|l| vec![l.k().dim(); l.shape().kv_heads()]);
        let dims: Vec<usize> = dims.collect();
        let read = |frame: &Frames| match self.subspace {
            // No others are looked at.
            Subspace::First => {
                let Range { start, end } = frame.current;
                start..end.min(start.saturating_add(self.rank))
            }
            Subspace::Pivoted | Subspace::Svd => frame.current.clone(),
        };
        let keys = backend.keys(&frames.iter().map(read).collect::<Vec<_>>(), layers)?;
        let of_segment =
            |(s, &dim): (usize, &usize)| self.subspace.basis(keys.row(s), dim, self.rank as usize);
        let bases: Vec<Vec<f32>> = dims.par_iter().enumerate().map(of_segment).collect();
        let bases: Ragged<f32> = bases.into_iter().collect();
        let earlier: Ragged<Range<u32>> = frames.into_iter().map(|f| f.earlier).collect();
        let slots = earlier.iter().map(|ranges| ranges.iter().map(|r| r.len() as u32).sum());
        let slots = slots.collect();
        let mut by = backend.zeros(&segment_lens(layers))?;
        let op = Residuals { bases: &bases, slots: &earlier };
        backend.residual_norms(&op, layers, &mut by)?;
        Ok(Redundant { by, slots })
    }
}

impl<B: Backend> Scorer<B> for GuiKv {
    fn needs(&self) -> Needs {
        let queries = Queries::Last(self.window);
        Needs { queries, hidden_norms: true, spans: true, ..Needs::default() }
    }

    fn score(
        &self,
        backend: &B,
        id: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        if self.rank == 0 {
            return Err(Error::Zero { what: "rank" });
        }
        let spans = layers.iter().map(|layer| layer.spans("guikv"));
        let frames = spans.map(|spans| Ok(spans?.of(SpanKind::Frame).collect()));
        let frames: Vec<Vec<Range<u32>>> = frames.collect::<Result<_>>()?;
        let Self { window, kernel, .. } = *self;
        let base = SnapKv { window, kernel, pooling: Pooling::Avg, group: Reduce::Mean };
        let Scored { mut scores, .. } = base.score(backend, id, layers)?;

        let current = layers.iter().zip(&frames).map(|(layer, frames)| {
            let past = layer.tokens().saturating_sub(self.window);
            frames.last().map_or(0..0, |frame| frame.start..frame.end.min(past))
        });
        let saliency = Saliency {
            weight: self.saliency / self.window as f32,
            temperature: self.temperature,
            stretches: &current.collect::<Vec<_>>(),
        };
        backend.saliency(&saliency, layers, &mut scores)?;

        let of_heads = |(layer, frames): (&LayerView<'_, B::Storage<'_>>, &Vec<Range<u32>>)| {
            let heads = 0..layer.shape().kv_heads();
            heads.map(|head| self.frames(layer, head, frames)).collect::<Vec<_>>()
        };
        let frames: Vec<Frames> = layers.iter().zip(&frames).flat_map(of_heads).collect();
        if frames.iter().all(|frames| frames.earlier.is_empty()) {
            return Ok(scores.into());
        }
        let redundant = Some(self.redundant(backend, layers, frames)?);
        Ok(Scored { redundant, ..scores.into() })
    }

    fn dropped(&self, room: &Room, len: u32, redundant: u32) -> u32 {
        let over = u64::from(len).saturating_sub(room.slots_per_head);
        (over * u64::from(redundant) / u64::from(len).max(1)) as u32
    }
}
