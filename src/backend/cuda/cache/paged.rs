//! The paged cache on the device: per KV head a table of pages of `[P, D]` rows, out of a shared [`PagePool`].
//!
//! Slot `s` of head `h` is row `tables[h][s / P] * P + s % P` of the pool. Engines with pools `[pages, H, P, D]` (HND)
//! have the same thing by reinterpretation: page `p`, head `h` of theirs is page `p * H + h` of ours. The tables are in
//! device memory, with room for all pages that a head may ever have. Decode steps take no pages: a head may grow to its
//! [capacity](PagedCache::capacity), the slots of the pages it has. [`PagedCache::reserve`] changes that, between steps.

use std::sync::Arc;

use super::super::{DeviceSlice, Floats, Output, Selection};
use super::attend::Workspace;
use super::batch::Member;
use super::pool::PagePool;
use super::recompress::{Recompress, Recompression};
use super::slots::Slots;
use super::snapshot::{Place, Snapshot};
use super::thin::Order;
use crate::backend::ops::Attend;
use crate::error::Result;
use crate::ids::Position;
use crate::ragged::Ragged;
use crate::view::Rows;

/// What is left of one layer of one sequence, in pages of a pool: [`crate::cache::PagedCache`] on the device. Every method
/// that takes a pool wants the one it was made with; any other is an error. Dropped without [`Self::release`], it
/// keeps its pages for ever.
#[must_use = "its pages stay taken until `release`"]
pub struct PagedCache {
    pub(super) tables: Vec<Vec<u32>>,
    /// First entry of each head's table among all; there is room for pages of its bound.
    pub(super) firsts: Vec<usize>,
    pub(super) page: u32,
    pub(super) slots: Slots,
    /// The pool's tag.
    pub(super) pool: Arc<()>,
}

impl PagedCache {
    /// Thins the heads to `kept`, one ascending row per KV head, in place. Emptied pages stay, as room to grow
    /// ([`Self::reserve`] gives them back). Reads positions back to find the slots.
    ///
    /// Errors: another number of heads, positions out of order or not held, another pool.
    pub fn compact(
        &mut self,
        pool: &mut PagePool,
        kept: &Ragged<Position>,
        order: Order,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.compact(kept, order)
    }

    /// Thins the heads to what a selection keeps of them, in place: head `h` is its segment `first + h`. Launches only.
    ///
    /// Errors: fewer segments than heads, segments longer than the heads' capacities, another pool.
    pub fn compact_selected(
        &mut self,
        pool: &mut PagePool,
        selection: &Selection,
        first: usize,
        order: Order,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.compact_selected(selection, first, order)
    }

    /// Appends `M` tokens: keys and values `[H, M, D]`, at positions `tokens .. tokens + M` of every head, in the pages
    /// there are. Nothing waits; nothing is allocated or copied from the host if the new rows lie at fixed strides.
    ///
    /// Where a head has no room, or the sequence would grow to `2^31` tokens, no head takes them and
    /// [`Self::check`] is an error from then on.
    ///
    /// Errors: other heads, dims, lengths or dtype, rows that are not aligned to 16 bytes, another pool.
    pub fn append(
        &mut self,
        pool: &mut PagePool,
        k: &Rows<'_, DeviceSlice<'_>>,
        v: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.append(k, v)
    }

    /// Bytes of workspace that [`Self::attend`] needs for `tokens` queries of each of `query_heads` heads: the same at every
    /// step, whatever the lengths.
    ///
    /// Errors: query heads that are no positive multiple of the cache's heads.
    pub fn attend_bytes(&self, query_heads: usize, tokens: u32) -> Result<usize> {
        self.slots.over().bytes(query_heads, tokens)
    }

    /// Attention of queries `[Hq, M, D]` at fixed strides, of the newest `M` tokens, over what the cache holds when the
    /// stream gets there, as [`Backend::attend`](crate::backend::Backend::attend) has it: to [`Floats`] or to an engine's rows
    /// ([`Output`]); `lse`, if given, has `Hq` rows of `M`. Launches only: it may be captured, and replayed while lengths grow.
    ///
    /// Errors: shapes or dtypes that do not fit, outputs in the memory of inputs, head dims beyond 256, a workspace below
    /// [`Self::attend_bytes`], another pool.
    pub fn attend<'a>(
        &self,
        pool: &PagePool,
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: impl Into<Output<'a>>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.over().attend(&[pool.k(), pool.v()], op, q, &out.into(), lse, workspace)
    }

    /// This cache as one of a [`Batch`](super::Batch).
    ///
    /// Errors: another pool.
    pub fn member<'a>(&'a self, pool: &'a PagePool) -> Result<Member<'a>> {
        pool.check_owner(&self.pool)?;
        Ok(Member { slots: &self.slots, memory: [pool.k(), pool.v()] })
    }

    /// Prepares [`Self::recompress`], for this cache and others of the same shape and capacities.
    ///
    /// Errors: parameters without a meaning, a budget below what is protected and the floors; more than the device's
    /// memory or the kernels' limits.
    pub fn recompression(&self, config: &Recompress, query_heads: usize) -> Result<Recompression> {
        self.slots.recompression(config, query_heads)
    }

    /// Thins the cache by the scores that the queries `[Hq, ≥ window, D]` of the newest tokens give its slots; their order
    /// stays. A cache within the budget stays as it is. Launches only, as [`Self::attend`].
    ///
    /// Errors: shapes or dtypes that do not fit, fewer queries than the window, a recompression for other capacities,
    /// slots in no order,
    /// another pool.
    pub fn recompress(
        &mut self,
        pool: &PagePool,
        q: &Rows<'_, DeviceSlice<'_>>,
        with: &mut Recompression,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.recompress(q, with)
    }

    /// Waits for the stream, and says whether anything found no room since the cache was made.
    ///
    /// Errors: [`CacheFull`](crate::Error::CacheFull) with the head that has the least room and the tokens refused.
    pub fn check(&self) -> Result<()> {
        self.slots.check()
    }

    /// Waits for the stream, and reads back what the device knows: lengths, positions, tokens.
    ///
    /// Errors: another pool.
    pub fn read<'a>(&'a self, pool: &'a PagePool) -> Result<Snapshot<'a>> {
        pool.check_owner(&self.pool)?;
        let place = Place::Paged(self.page, &self.tables);
        let (slots, seen) = (&self.slots, self.slots.read()?);
        Ok(Snapshot { slots, seen, place, k: pool.k(), v: pool.v() })
    }

    /// Pages of each head, in slot order.
    pub fn tables(&self) -> &[Vec<u32>] {
        &self.tables
    }
    /// Slots of each head. Waits for the stream.
    pub fn lens(&self) -> Result<Vec<u32>> {
        self.slots.lens()
    }
    /// Slots that each head may reach with the pages it has.
    pub fn capacity(&self) -> &[u32] {
        &self.slots.capacity
    }
    /// Bytes of the pages taken.
    pub fn bytes_reserved(&self) -> u64 {
        let pages: usize = self.tables.iter().map(Vec::len).sum();
        2 * pages as u64 * u64::from(self.page) * self.slots.row_bytes()
    }
}
