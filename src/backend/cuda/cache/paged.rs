//! The paged cache on the device: per KV head a table of pages of `[P, D]` rows, out of a shared [`PagePool`].
//!
//! Slot `s` of head `h` is row `tables[h][s / P] * P + s % P` of the pool. Engines with pools `[pages, H, P, D]` (HND)
//! have the same thing by reinterpretation: page `p`, head `h` of theirs is page `p * H + h` of ours. The tables are in
//! device memory, with room for all pages that a head may ever have. Decode steps take no pages: a head may grow to its
//! [capacity](PagedCache::capacity), the slots of the pages it has. [`PagedCache::reserve`] changes that, between steps.

use std::sync::Arc;

use super::super::gather::Kept;
use super::super::views::HeadRows;
use super::super::{DeviceLayer, DeviceSlice, Floats, Selection};
use super::attend::Workspace;
use super::pool::PagePool;
use super::recompress::{Recompress, Recompression};
use super::slots::{self, Chosen, Order, Places, Slots};
use super::snapshot::{Place, Snapshot};
use crate::backend::ops::Attend;
use crate::cache::slots::expect;
use crate::error::{Error, Result};
use crate::ids::{KvHead, Position};
use crate::ragged::Ragged;
use crate::view::Rows;

/// What is left of one layer of one sequence, in pages of a pool: [`crate::cache::PagedCache`] on the device. Every method
/// that takes a pool wants the one of [`Self::gather`]; any other is an error. Dropped without [`Self::release`], it
/// keeps its pages for ever.
#[must_use = "its pages stay taken until `release`"]
pub struct PagedCache {
    tables: Vec<Vec<u32>>,
    /// First entry of each head's table among all; there is room for pages of its bound.
    firsts: Vec<usize>,
    page: u32,
    slots: Slots,
    pool: Arc<()>,
}

impl PagedCache {
    /// Copies the kept positions of `view`, one ascending row per KV head, to free pages, as many as `slack` more slots per
    /// head need as well.
    ///
    /// Errors: another number of heads, positions out of order or not held, a pool of another dtype or dim,
    /// [`OutOfPages`](Error::OutOfPages).
    pub fn gather(
        pool: &mut PagePool,
        view: &DeviceLayer<'_>,
        kept: &Ragged<Position>,
        slack: u32,
    ) -> Result<Self> {
        let chosen = Chosen::upload(&pool.cuda, &slots::slots_of_view(view, kept)?)?;
        let capacity = slots::with_slack(kept.lens(), slack)?;
        Self::filled(pool, view, chosen.kept(), capacity)
    }

    /// Copies what a selection keeps of `view`, whose heads are its segments from `first` on, to pages for `capacity[h]`
    /// slots of head `h`. Nothing is read back: how many slots each head keeps stays on the device. A head that
    /// keeps more than its capacity becomes empty, and [`Self::check`] is an error from then on.
    ///
    /// Errors: as [`Self::gather`]; segments that are not the view's heads.
    pub fn gather_selected(
        pool: &mut PagePool,
        view: &DeviceLayer<'_>,
        selection: &Selection,
        first: usize,
        capacity: &[u32],
    ) -> Result<Self> {
        let kept = slots::kept_of_view(view, selection, first, capacity)?;
        Self::filled(pool, view, kept, capacity.to_vec())
    }

    fn filled(
        pool: &mut PagePool,
        view: &DeviceLayer<'_>,
        kept: Kept,
        capacity: Vec<u32>,
    ) -> Result<Self> {
        let (dtype, dim) = (view.k().dtype(), view.k().dim());
        if dtype != pool.dtype() {
            let (expected, got) = (pool.dtype(), dtype);
            return Err(Error::Dtype { what: "layer for a page pool", expected, got });
        }
        expect("head dim of a page pool", pool.dim() as usize, dim)?;
        let page = pool.page();
        let pages = |slots: u32| slots.div_ceil(page) as usize;
        pool.check_free(capacity.iter().map(|&n| pages(n) as u64).sum())?;
        let tables: Vec<Vec<u32>> =
            capacity.iter().map(|&n| pool.take(pages(n)).collect()).collect();
        let (mut firsts, mut end) = (Vec::new(), 0);
        for table in &tables {
            firsts.push(end);
            end += table.len();
        }
        let row = slots::row_bytes(dtype, pool.dim());
        let heads = |address: u64| {
            firsts.iter().map(|&first| HeadRows::paged(address, row, page, first)).collect()
        };
        let places = Places {
            keys: heads(pool.k().address()),
            values: heads(pool.v().address()),
            pages: tables.concat(),
        };
        let made = Slots::new(&pool.cuda, (dtype, pool.dim()), view.tokens(), capacity, &places)
            .and_then(|slots| slots.fill_from(view, kept).map(|()| slots));
        match made {
            Ok(slots) => Ok(Self { tables, firsts, page, slots, pool: Arc::clone(pool.tag()) }),
            Err(error) => {
                pool.give(places.pages);
                Err(error)
            }
        }
    }

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
        self.check_pool(pool)?;
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
        self.check_pool(pool)?;
        self.slots.compact_selected(selection, first, order)
    }

    /// Waits for the stream, then takes and gives back pages so that each head has those that its slots and `slack` more
    /// need. Tables change where they are: captured graphs stay valid.
    ///
    /// Errors: [`CacheFull`](Error::CacheFull) beyond what [`Self::gather`] reserved, [`OutOfPages`](Error::OutOfPages),
    /// another pool.
    pub fn reserve(&mut self, pool: &mut PagePool, slack: u32) -> Result<()> {
        self.check_pool(pool)?;
        let lens = self.slots.lens()?;
        let mut wanted = Vec::with_capacity(lens.len());
        for (h, (&len, &limit)) in lens.iter().zip(&self.slots.bounds).enumerate() {
            if u64::from(len) + u64::from(slack) > u64::from(limit) {
                let (head, len, capacity) = (KvHead(h as u32), len.into(), limit.into());
                return Err(Error::CacheFull { head, len, capacity, new: slack.into() });
            }
            wanted.push((len + slack).div_ceil(self.page) as usize);
        }
        let pairs = || self.tables.iter().map(Vec::len).zip(wanted.iter().copied());
        let missing: usize = pairs().map(|(has, wants)| wants.saturating_sub(has)).sum();
        let freed: usize = pairs().map(|(has, wants)| has.saturating_sub(wants)).sum();
        pool.check_free(missing.saturating_sub(freed) as u64)?;
        for (table, &pages) in self.tables.iter_mut().zip(&wanted) {
            pool.give(table.drain(pages.min(table.len())..));
        }
        for (h, (table, &pages)) in self.tables.iter_mut().zip(&wanted).enumerate() {
            table.extend(pool.take(pages - table.len()));
            let slots = u64::from(self.page) * pages as u64;
            self.slots.capacity[h] = slots.min(self.slots.bounds[h].into()) as u32;
        }
        self.write_places()
    }

    /// Gives all pages back and forgets all slots. The token count stays, and so does what the tables have room for.
    ///
    /// Errors: another pool.
    pub fn release(&mut self, pool: &mut PagePool) -> Result<()> {
        self.check_pool(pool)?;
        self.slots.clear()?;
        self.slots.capacity.fill(0);
        self.write_places()?;
        self.tables.iter_mut().for_each(|table| pool.give(table.drain(..)));
        Ok(())
    }

    fn write_places(&self) -> Result<()> {
        let starts = self.firsts.iter().copied();
        let tables: Vec<(usize, &[u32])> =
            starts.zip(self.tables.iter().map(Vec::as_slice)).collect();
        self.slots.write_places(&tables)
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
        self.check_pool(pool)?;
        self.slots.append(k, v)
    }

    /// Bytes of workspace that [`Self::attend`] needs for `tokens` queries of each of `query_heads` heads: the same at every
    /// step, whatever the lengths.
    ///
    /// Errors: query heads that are no positive multiple of the cache's heads.
    pub fn attend_bytes(&self, query_heads: usize, tokens: u32) -> Result<usize> {
        self.slots.attend_bytes(query_heads, tokens)
    }

    /// Attention of queries `[Hq, M, D]` at fixed strides, of the newest `M` tokens, over what the cache holds when the
    /// stream gets there: as [`Backend::attend`](crate::backend::Backend::attend), `out` has `Hq` rows of `M·D`, `lse`,
    /// if given, `Hq` rows of `M`. Launches only: it may be captured, and replayed while lengths grow.
    ///
    /// Errors: shapes or dtypes that do not fit, head dims beyond 256, a workspace below [`Self::attend_bytes`],
    /// another pool.
    pub fn attend(
        &self,
        pool: &PagePool,
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: &mut Floats,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_pool(pool)?;
        self.slots.attend(op, q, out, lse, workspace)
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
        self.check_pool(pool)?;
        self.slots.recompress(q, with)
    }

    /// Waits for the stream, and says whether anything found no room since the cache was made.
    ///
    /// Errors: [`CacheFull`](Error::CacheFull) with the head that has the least room and the tokens refused.
    pub fn check(&self) -> Result<()> {
        self.slots.check()
    }

    /// Waits for the stream, and reads back what the device knows: lengths, positions, tokens.
    ///
    /// Errors: another pool.
    pub fn read<'a>(&'a self, pool: &'a PagePool) -> Result<Snapshot<'a>> {
        self.check_pool(pool)?;
        let place = Place::Paged(self.page, &self.tables);
        let (slots, seen) = (&self.slots, self.slots.read()?);
        Ok(Snapshot { slots, seen, place, k: pool.k(), v: pool.v() })
    }

    fn check_pool(&self, pool: &PagePool) -> Result<()> {
        if Arc::ptr_eq(&self.pool, pool.tag()) {
            return Ok(());
        }
        Err(Error::Unsupported { what: "page pool", why: "the cache's pages are of another pool" })
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
