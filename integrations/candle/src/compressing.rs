//! Compression while the prompt is read: each layer is scored and evicted as soon as it has attended.
//!
//! A sequence that starts with this forward pass is never stored in full: its new keys and values are attended
//! to and scored where the engine has them, and only what stays is copied. Its caches thus never take more than
//! the budget and one layer, also where the budget is contested over all layers: with the planner's cascade,
//! earlier layers give up slots as later ones win them. Where a policy cannot cascade (two stages over all
//! layers, reference modes), layers stay whole until the last. A sequence that held tokens before is appended
//! to and thinned.
//!
//! A probe is such a pass as well: its tokens attend over all that is held, and are taken out again before the layer is scored by
//! their queries.

use std::ops::Range;

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{Cpu, HostLayer};
use kvbudget::cache::FlatCache;
use kvbudget::{BlockPrefill, CacheManager, Keep, LayerId, LayerView, Plan, Position, Ragged};

use crate::attention::{AttentionHook, Span};
use crate::batch::Batch;
use crate::cache::Settings;
use crate::step::{Loan, Step, rows_of};

/// The hook of one forward pass: it ends the prompts, or blocks of them, of the sequences that have tokens in it.
pub struct Compressing<'c> {
    settings: &'c Settings,
    batch: &'c mut Batch,
    /// The tokens are a probe's.
    probe: bool,
    /// One per sequence with tokens, from the first layer on.
    readers: Vec<Reader<'c>>,
    /// The layer that comes next.
    next: usize,
}

/// A sequence that is being read.
struct Reader<'c> {
    sequence: usize,
    rows: Range<usize>,
    /// Held nothing before: the new tokens are the engine's until it is known which stay.
    fresh: bool,
    /// Has evicted nothing before.
    dense: bool,
    manager: BlockPrefill<'c, Cpu>,
}

impl<'c> Compressing<'c> {
    pub(crate) fn new(settings: &'c Settings, batch: &'c mut Batch, probe: bool) -> Self {
        Self { settings, batch, probe, readers: Vec::new(), next: 0 }
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
        for mut reader in self.readers {
            plans.push(reader.manager.end_block().map_err(Error::wrap)?);
            self.batch.sequences[reader.sequence].compressed();
        }
        Ok(plans)
    }

    /// One manager per sequence with tokens.
    fn start(&mut self, spans: &[Span]) -> Result<()> {
        let Settings { geometry, policy, budget, cpu, .. } = self.settings;
        for (sequence, rows) in rows_of(spans).enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let books = self.batch.sequences[sequence].books();
            let (fresh, dense) = (books.tokens == 0 && !self.probe, books.held.is_none());
            let manager = BlockPrefill::new(cpu, policy, geometry, *budget, books);
            let mut manager = manager.map_err(Error::wrap)?;
            let new = if self.probe { 0 } else { rows.len() as u32 };
            manager.begin_block(new).map_err(Error::wrap)?;
            self.readers.push(Reader { sequence, rows, fresh, dense, manager });
        }
        Ok(())
    }

    /// Lends a layer of a reader to its manager and evicts what that settles.
    fn evict(&mut self, reader: usize, layer: usize, step: &Step, loan: &Loan<'_>) -> Result<()> {
        let Self { settings, batch, probe, readers, .. } = self;
        let Reader { sequence: index, rows, fresh, dense, manager } = &mut readers[reader];
        let (index, id) = (*index, LayerId(layer as u32));
        let sequence = &batch.sequences[index];
        let fresh_view = || -> Result<HostLayer<'_>> {
            let (k, v) = (loan.k.tokens(rows.clone())?, loan.v.tokens(rows.clone())?);
            LayerView::new(step.shape(), rows.len() as u32, k, v).map_err(Error::wrap)
        };
        let mut view = match fresh {
            true => fresh_view()?,
            false => sequence.view(layer, *dense).map_err(Error::wrap)?,
        };
        if *probe {
            view = view.with_probe(loan.q.tokens(rows.clone())?).map_err(Error::wrap)?;
        }
        let o_proj = settings.o_proj.get(layer);
        let keeps = sequence.observed(layer, view, o_proj, |view| manager.layer_done(id, view))?;
        // Earlier layers make room before this one's slots come in.
        for keep in keeps.iter().filter(|keep| keep.layer != id || !*fresh) {
            let sequence = &mut batch.sequences[index];
            let replaced =
                sequence.evict(keep.layer.index(), &keep.positions).map_err(Error::wrap)?;
            batch.note_peak(replaced);
        }
        if *fresh {
            let settled = keeps.into_iter().find(|keep| keep.layer == id);
            // All of them, if nothing is settled before the last layer.
            let all = || -> Ragged<Position> {
                let head = || (0..rows.len() as u32).map(Position).collect();
                (0..step.shape().kv_heads()).map(|_| head()).collect()
            };
            let kept = settled.map_or_else(all, |Keep { positions, .. }| positions);
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
            if !self.probe {
                self.batch.sequences[*sequence].remember(layer, &step.queries(rows)?)?;
            }
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
        if self.probe {
            for (Reader { sequence, .. }, span) in self.readers.iter().zip(active(spans)) {
                let sequence = &mut self.batch.sequences[*sequence];
                sequence.truncate(layer, span.position).map_err(Error::wrap)?;
            }
        }
        for reader in 0..self.readers.len() {
            self.evict(reader, layer, &step, &loan)?;
        }
        self.next += 1;
        Ok(attended)
    }
}

/// Spans of sequences that have tokens in a pass.
fn active(spans: &[Span]) -> impl Iterator<Item = &Span> {
    spans.iter().filter(|span| span.tokens > 0)
}
