//! The sequences of a batch and one layer's new tokens for them, checked; and the books on memory.

use std::ops::Range;

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::Geometry;

use crate::attention::Span;
use crate::sequence::SequenceCache;
use crate::step::{Loan, Step, View};

/// Sequences in the order of their spans.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) sequences: Vec<SequenceCache>,
    /// Most bytes reserved at once.
    pub(crate) peak: u64,
}

impl Batch {
    /// One layer's new tokens.
    ///
    /// Errors: shapes other than the geometry and the spans say, positions that do not go on where a sequence is.
    pub(crate) fn step(
        &self,
        geometry: &Geometry,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        spans: &[Span],
    ) -> Result<Step> {
        let Some(&shape) = geometry.layers().get(layer) else {
            bail!("expected a layer below {}, got {layer}", geometry.layers().len());
        };
        if spans.len() != self.sequences.len() {
            bail!("expected {} spans, one per sequence, got {}", self.sequences.len(), spans.len());
        }
        for (i, (span, sequence)) in spans.iter().zip(&self.sequences).enumerate() {
            let tokens = sequence.layers()[layer].tokens();
            if span.tokens > 0 && span.position != tokens {
                bail!(
                    "sequence {i}, layer {layer}: expected position {tokens}, the tokens seen so far, got {}",
                    span.position
                );
            }
        }
        Step::new(shape, [q, k, v], spans)
    }

    /// Makes room for `new` more tokens in a layer of a sequence.
    pub(crate) fn reserve(&mut self, sequence: usize, layer: usize, new: u32) -> Result<()> {
        let replaced = self.sequences[sequence].reserve(layer, new).map_err(Error::wrap)?;
        if let Some(replaced) = replaced {
            self.note_peak(replaced);
        }
        Ok(())
    }

    /// Appends a sequence's rows of a step to a layer that has room for them.
    pub(crate) fn append(
        &mut self,
        sequence: usize,
        layer: usize,
        loan: &Loan<'_>,
        rows: &Range<usize>,
    ) -> Result<()> {
        let (k, v) = (loan.k.tokens(rows.clone())?, loan.v.tokens(rows.clone())?);
        self.sequences[sequence].append(layer, &k, &v).map_err(Error::wrap)
    }

    /// Raises the peak to what is reserved now and `replaced` bytes that were until a moment ago.
    pub(crate) fn note_peak(&mut self, replaced: u64) {
        let reserved: u64 = self.sequences.iter().map(SequenceCache::bytes_reserved).sum();
        self.peak = self.peak.max(reserved + replaced);
    }

    /// The attention of a sequence's new tokens to all that a layer holds.
    pub(crate) fn attend_view<'a>(
        &'a self,
        sequence: usize,
        layer: usize,
        loan: &'a Loan<'_>,
        rows: &Range<usize>,
    ) -> Result<View<'a>> {
        let q = loan.q.tokens(rows.clone())?;
        self.sequences[sequence].layers()[layer].attend_view(q).map_err(Error::wrap)
    }
}
