//! The flattened ragged cache: rows of all heads back to back, `[Σ capacity(h), D]`, keys and values apart.
//!
//! Head `h` owns rows `offsets[h] .. offsets[h + 1]` and uses the first `lens[h]` of them; the rest is slack
//! that `append` fills without moving anything. Without slack the offsets are the `cu_len` of
//! variable-length attention (one query group per head, as AdaKV calls it).

use std::ops::Range;

use super::buffer::{Buffer, copy_rows};
use super::slots::{Held, Slots, slide};
use super::source::{Piece, Source, cut};
use crate::backend::AttendView;
use crate::backend::cpu::{HostLayer, HostSlice};
use crate::error::Result;
use crate::geometry::LayerShape;
use crate::ids::Position;
use crate::ragged::Ragged;
use crate::view::{LayerView, Rows};

/// Bytes kept below which threads cost more than they save.
const PARALLEL_BYTES: usize = 1 << 20;

/// What is left of one layer of one sequence, in two buffers of its own.
#[derive(Debug)]
pub struct FlatCache {
    k: Buffer,
    v: Buffer,
    /// First row of each head, and the number of rows of all.
    offsets: Vec<u64>,
    slots: Slots,
}

impl FlatCache {
    /// Copies the kept positions of `view`, one ascending row per KV head, with room for `slack` more
    /// slots per head. The view may have any layout, and be compressed already.
    ///
    /// Errors: another number of heads, positions out of order or not held, more slots than memory.
    pub fn gather(view: &HostLayer<'_>, kept: &Ragged<Position>, slack: u32) -> Result<Self> {
        Self::build(&Source::new(view, kept)?, slack)
    }

    /// [`Self::gather`] into the memory of a cache that is done with, as far as it reaches: on first use the pages of new
    /// memory cost several times the copy. Rows beyond [`Self::bytes_reserved`] stay allocated: [`Self::repack`] frees them.
    ///
    /// Errors: those of [`Self::gather`], after which the cache is as it was.
    pub fn regather(
        &mut self,
        view: &HostLayer<'_>,
        kept: &Ragged<Position>,
        slack: u32,
    ) -> Result<()> {
        self.fill(&Source::new(view, kept)?, slack)
    }

    fn fill(&mut self, source: &Source<'_>, slack: u32) -> Result<()> {
        let slots = source.slots(slack)?;
        let mut offsets = vec![0];
        let mut rows = 0;
        for &capacity in &slots.capacity {
            rows += u64::from(capacity);
            offsets.push(rows);
        }
        let shape = (slots.dtype, slots.dim, rows);
        // All memory before anything is given up.
        let (k, v) = (self.k.grown(shape)?, self.v.grown(shape)?);
        for (buffer, grown) in [(&mut self.k, k), (&mut self.v, v)] {
            match grown {
                Some(grown) => *buffer = grown,
                None => buffer.reshape(shape),
            }
        }
        source.copy(pieces(&mut self.k, &slots), pieces(&mut self.v, &slots));
        (self.offsets, self.slots) = (offsets, slots);
        Ok(())
    }

    fn build(source: &Source<'_>, slack: u32) -> Result<Self> {
        let slots = Slots::empty(source.k.dtype(), source.k.dim() as u32);
        let nothing = || Buffer::zeroed(slots.dtype, slots.dim, 0);
        let (k, v) = (nothing()?, nothing()?);
        let mut cache = Self { k, v, offsets: Vec::new(), slots };
        cache.fill(source, slack)?;
        Ok(cache)
    }

    /// Thins the heads to `kept`, one ascending row per KV head, in place. Rows keep their order, heads
    /// their first row: what is freed becomes slack ([`Self::repack`] gives it back). Allocates nothing.
    ///
    /// Errors: another number of heads, positions out of order or not held.
    pub fn compact(&mut self, kept: &Ragged<Position>) -> Result<()> {
        self.slots.check_kept(kept)?;
        let (slots, offsets) = (&self.slots, self.offsets.as_slice());
        let (k, v) = (self.k.bytes_mut(), self.v.bytes_mut());
        let slide = |bytes| slide_heads(bytes, slots, offsets, kept, 0..kept.rows());
        if kept.total() * slots.row_bytes() < PARALLEL_BYTES {
            slide(k);
            slide(v);
        } else {
            rayon::join(|| slide(k), || slide(v));
        }
        self.slots.keep(kept);
        Ok(())
    }

    /// Moves everything to new buffers with room for `slack` more slots per head, and frees the old ones.
    ///
    /// Errors: more slots than memory.
    pub fn repack(&mut self, slack: u32) -> Result<()> {
        let kept: Vec<&[Position]> = self.slots.positions.iter().map(Vec::as_slice).collect();
        let held = kept.iter().map(|p| Held::At(p)).collect();
        let (k, v) = self.rows()?;
        *self = Self::build(&Source { k, v, tokens: self.tokens(), held, kept }, slack)?;
        Ok(())
    }

    /// Appends `M` tokens: keys and values `[H, M, D]`, at positions `tokens() .. tokens() + M` of every
    /// head. Costs `O(M)` per head and allocates nothing.
    ///
    /// Errors: other heads, dims, lengths or dtype; [`CacheFull`](crate::Error::CacheFull) without slack.
    pub fn append(
        &mut self,
        k: &Rows<'_, HostSlice<'_>>,
        v: &Rows<'_, HostSlice<'_>>,
    ) -> Result<()> {
        let new = self.slots.check_new(k, v)?;
        let row = self.slots.row_bytes();
        for (buffer, rows) in [(&mut self.k, k), (&mut self.v, v)] {
            let bytes = buffer.bytes_mut();
            for (h, &len) in self.slots.lens.iter().enumerate() {
                let at = (self.offsets[h] as usize + len as usize) * row;
                copy_rows(&mut bytes[at..at + new as usize * row], rows, h, 0);
            }
        }
        self.slots.push(new);
        Ok(())
    }

    /// Goes back to `tokens` tokens: later ones become slack, as if they had never been appended. Slots evicted since they came do
    /// not come back.
    ///
    /// Errors: more tokens than were seen.
    pub fn truncate(&mut self, tokens: u32) -> Result<()> {
        self.slots.truncate(tokens)
    }

    /// Lends keys, values and positions, to be scored again or gathered elsewhere.
    ///
    /// Errors: a shape of other KV heads or head dim.
    pub fn view(&self, shape: LayerShape) -> Result<HostLayer<'_>> {
        let (k, v) = self.rows()?;
        LayerView::new(shape, self.tokens(), k, v)?.with_positions(self.positions())
    }

    /// Lends keys and values to the attention of queries `[Hq, M, D]`.
    pub fn attend_view<'a>(
        &'a self,
        q: Rows<'a, HostSlice<'a>>,
    ) -> Result<AttendView<'a, HostSlice<'a>>> {
        let (k, v) = self.rows()?;
        Ok(AttendView { q, k, v })
    }

    fn rows(&self) -> Result<(Rows<'_, HostSlice<'_>>, Rows<'_, HostSlice<'_>>)> {
        let rows = |buffer| {
            let Slots { dim, lens, .. } = &self.slots;
            Rows::ragged(Buffer::storage(buffer), *dim, self.starts(), lens)
        };
        Ok((rows(&self.k)?, rows(&self.v)?))
    }

    /// First row of each head.
    pub fn starts(&self) -> &[u64] {
        &self.offsets[..self.slots.lens.len()]
    }
    /// Slots of each head.
    pub fn lens(&self) -> &[u32] {
        &self.slots.lens
    }
    /// Slots reserved for each head.
    pub fn capacity(&self) -> &[u32] {
        &self.slots.capacity
    }
    /// Row boundaries of the heads, `H + 1` of them, if no head has slack: see [`Self::repack`].
    pub fn cu_len(&self) -> Option<&[u64]> {
        (self.slots.lens == self.slots.capacity).then_some(&self.offsets)
    }
    /// Positions of each head's slots, ascending.
    pub fn positions(&self) -> &[Vec<Position>] {
        &self.slots.positions
    }
    /// Tokens the sequence has seen: the position of the next one.
    pub fn tokens(&self) -> u32 {
        self.slots.tokens
    }
    /// Bytes of the keys and values held.
    pub fn bytes_used(&self) -> u64 {
        2 * self.slots.total() * self.slots.row_bytes() as u64
    }
    /// Bytes of the key and value buffers, slack included.
    pub fn bytes_reserved(&self) -> u64 {
        (self.k.len() + self.v.len()) as u64
    }
}

/// The rows in use, as disjoint pieces.
fn pieces<'b>(buffer: &'b mut Buffer, slots: &Slots) -> Vec<Piece<'b>> {
    let row = slots.row_bytes();
    let mut rest = buffer.bytes_mut();
    let mut out = Vec::new();
    for (h, (&len, &capacity)) in slots.lens.iter().zip(&slots.capacity).enumerate() {
        let (head, later) = rest.split_at_mut(capacity as usize * row);
        rest = later;
        cut(&mut out, h, &mut head[..len as usize * row], row);
    }
    out
}

/// Compacts some heads, whose rows are `bytes`; halves of the work go to other threads, without a list.
fn slide_heads(
    bytes: &mut [u8],
    slots: &Slots,
    offsets: &[u64],
    kept: &Ragged<Position>,
    heads: Range<usize>,
) {
    let row = slots.row_bytes();
    let at = |h: usize| (offsets[h] - offsets[heads.start]) as usize * row;
    if heads.len() == 1 || bytes.len() < PARALLEL_BYTES {
        for h in heads.clone() {
            let held = Held::At(&slots.positions[h]);
            let moves = held.moves(kept.row(h), 0, kept.len(h));
            slide(&mut bytes[at(h)..at(h + 1)], row, moves, |slot| (slot, usize::MAX));
        }
    } else {
        let middle = heads.start + heads.len() / 2;
        let (low, high) = bytes.split_at_mut(at(middle));
        rayon::join(
            || slide_heads(low, slots, offsets, kept, heads.start..middle),
            || slide_heads(high, slots, offsets, kept, middle..heads.end),
        );
    }
}
