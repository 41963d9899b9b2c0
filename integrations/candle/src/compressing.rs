//! Compression while the prompt is read: each layer is scored and evicted as soon as it has attended.
//!
//! A sequence that starts with this forward pass is never stored in full: its new keys and values are attended
//! to and scored where the engine has them, and only what stays is copied. Its caches thus never take more than
//! the budget and one layer, also where the budget is contested over all layers: with the planner's cascade,
//! earlier layers give up slots as later ones win them. Where a policy cannot cascade (two stages over all
//! layers, reference modes), layers stay whole until the last. A sequence that held tokens before is appended
//! to and thinned.

use std::ops::Range;

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{Cpu, HostLayer};
use kvbudget::cache::FlatCache;
use kvbudget::{LayerId, LayerView, Plan, Planner, Position, Sequence};

use crate::attention::{AttentionHook, Span};
use crate::batch::Batch;
use crate::cache::Settings;
use crate::step::{Loan, Step, rows_of};

/// The hook of one forward pass: it ends the prompts of the sequences that have tokens in it.
pub struct Compressing<'c> {
    settings: &'c Settings,
    batch: &'c mut Batch,
    /// One per sequence with tokens, from the first layer on.
    readers: Vec<Reader<'c>>,
    /// The layer that comes next.
    next: usize,
}

/// A sequence that is being read.
struct Reader<'c> {
    sequence: usize,
    rows: Range<usize>,
    /// Held nothing before.
    fresh: bool,
    /// Has evicted nothing before.
    dense: bool,
    planner: Planner<'c, Cpu>,
}

impl<'c> Compressing<'c> {
    pub(crate) fn new(settings: &'c Settings, batch: &'c mut Batch) -> Self {
        Self { settings, batch, readers: Vec::new(), next: 0 }
    }

    /// The plans, one per sequence with tokens, once the forward pass is through.
    ///
    /// Errors: layers are missing.
    pub fn finish(self) -> Result<Vec<Plan>> {
        let layers = self.settings.geometry.layers().len();
        if self.next != layers {
            bail!("expected a forward pass of {layers} layers, got {}", self.next);
        }
        let mut plans = Vec::new();
        for reader in self.readers {
            plans.extend(reader.planner.finish().map_err(Error::wrap)?);
            self.batch.sequences[reader.sequence].compressed();
        }
        Ok(plans)
    }

    /// One planner per sequence with tokens.
    fn start(&mut self, spans: &[Span]) -> Result<()> {
        let Settings { geometry, policy, budget, cpu, .. } = self.settings;
        for (sequence, rows) in rows_of(spans).enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let cache = &self.batch.sequences[sequence];
            let (position, end) = (cache.tokens(), cache.tokens() + rows.len() as u32);
            // What the heads will hold once the new tokens are there.
            let held = cache.held().map(|layers| -> Vec<Vec<Vec<Position>>> {
                let new = (position..end).map(Position);
                let head = |head: &Vec<Position>| head.iter().copied().chain(new.clone()).collect();
                layers.into_iter().map(|heads| heads.iter().map(head).collect()).collect()
            });
            let held: Option<Vec<&[Vec<Position>]>> =
                held.as_ref().map(|layers| layers.iter().map(Vec::as_slice).collect());
            let described = Sequence { tokens: end, held: held.as_deref(), spans: None };
            let planner =
                Planner::new(cpu, policy, geometry, *budget, &[described]).map_err(Error::wrap)?;
            let config = policy.config();
            let planner = match config.two_stage.is_none() && config.reference.is_none() {
                true => planner.cascade().map_err(Error::wrap)?,
                false => planner,
            };
            let (fresh, dense) = (position == 0, held.is_none());
            self.readers.push(Reader { sequence, rows, fresh, dense, planner });
        }
        Ok(())
    }

    /// Scores a layer of a reader and evicts what that settles.
    fn evict(&mut self, reader: usize, layer: usize, step: &Step, loan: &Loan<'_>) -> Result<()> {
        let Self { settings, batch, readers, .. } = self;
        let Reader { sequence: index, rows, fresh, dense, planner } = &mut readers[reader];
        let (index, id) = (*index, LayerId(layer as u32));
        let sequence = &batch.sequences[index];
        let fresh_view = || -> Result<HostLayer<'_>> {
            let (k, v) = (loan.k.tokens(rows.clone())?, loan.v.tokens(rows.clone())?);
            LayerView::new(step.shape(), rows.len() as u32, k, v).map_err(Error::wrap)
        };
        let view = match fresh {
            true => fresh_view()?,
            false => sequence.view(layer, *dense).map_err(Error::wrap)?,
        };
        let o_proj = settings.o_proj.get(layer);
        let changed = sequence.observed(layer, view, o_proj, |view| planner.push(&[*view]))?;
        // Earlier layers make room before this one's slots come in.
        for &earlier in changed.iter().filter(|&&l| l != id || !*fresh) {
            let kept = planner.held(0, earlier).unwrap_or_default();
            let sequence = &mut batch.sequences[index];
            let replaced = sequence.evict(earlier.index(), &kept).map_err(Error::wrap)?;
            batch.note_peak(replaced);
        }
        if *fresh {
            // All of them, if the policy settles nothing before the last layer.
            let kept = planner.held(0, id).unwrap_or_default();
            let cache = FlatCache::gather(&fresh_view()?, &kept, 0).map_err(Error::wrap)?;
            batch.sequences[index].put(layer, cache);
            batch.note_peak(0);
        }
        Ok(())
    }
}

impl AttentionHook for Compressing<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        if layer != self.next {
            bail!("compressing: expected layer {}, got {layer}", self.next);
        }
        let step = self.batch.step(&self.settings.geometry, layer, [q, k, v], spans)?;
        if layer == 0 {
            self.start(spans)?;
        }
        let loan = step.lend()?;
        for Reader { sequence, rows, fresh, .. } in &self.readers {
            self.batch.sequences[*sequence].remember(layer, &step.queries(rows)?)?;
            if !fresh {
                self.batch.reserve(*sequence, layer, rows.len() as u32)?;
                self.batch.append(*sequence, layer, &loan, rows)?;
            }
        }
        let views = self.readers.iter().map(|Reader { sequence, rows, fresh, .. }| match fresh {
            true => loan.attend_view(rows),
            false => self.batch.attend_view(*sequence, layer, &loan, rows),
        });
        let attended = step.attend(&self.settings.cpu, &views.collect::<Result<Vec<_>>>()?)?;
        for reader in 0..self.readers.len() {
            self.evict(reader, layer, &step, &loan)?;
        }
        self.next += 1;
        Ok(attended)
    }
}
