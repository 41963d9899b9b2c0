//! The paged cache on the device: per KV head a table of pages of `[P, D]` rows, out of a shared [`PagePool`].
//!
//! Slot `s` of head `h` is row `tables[h][s / P] * P + s % P` of the pool. Engines with pools `[pages, H, P, D]` (HND)
//! have the same thing by reinterpretation: page `p`, head `h` of theirs is page `p * H + h` of ours. The tables are in
//! device memory, with room for all pages that a head may ever have. Decode steps take no pages: a head may grow to its
//! [capacity](PagedCache::capacity), the slots of the pages it has. [`PagedCache::reserve`] changes that, between steps.

use std::sync::Arc;

use super::super::gather::Kept;
use super::super::views::HeadRows;
use super::super::{DeviceLayer, DeviceSlice, Floats, Output, Selection};
use super::attend::Workspace;
use super::batch::Member;
use super::pool::PagePool;
use super::recompress::{Recompress, Recompression};
use super::slots::{Places, Slots, row_bytes};
use super::snapshot::{Place, Snapshot};
use super::thin::{Chosen, Order, kept_of_view, slots_of_view};
use crate::backend::ops::Attend;
use crate::cache::slots::with_slack;
use crate::error::{Error, Result};
use crate::geometry::{LayerShape, MAX_LEN};
use crate::ids::{KvHead, Position};
use crate::ragged::Ragged;
use crate::view::{LayerView, Rows};

/// What is left of one layer of one sequence, in pages of a pool: [`crate::cache::PagedCache`] on the device. Every method
/// that takes a pool wants the one it was made with; any other is an error. Dropped without [`Self::release`], it
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
        let chosen = Chosen::upload(&pool.cuda, &slots_of_view(view, kept)?)?;
        Self::filled(pool, view, chosen.kept(), with_slack(kept.lens(), slack)?)
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
        let kept = kept_of_view(view, selection, first, capacity)?;
        Self::filled(pool, view, kept, capacity.to_vec())
    }

    fn filled(
        pool: &mut PagePool,
        view: &DeviceLayer<'_>,
        kept: Kept,
        capacity: Vec<u32>,
    ) -> Result<Self> {
        pool.check_layer(view.k().dtype(), view.k().dim())?;
        pool.check_free(capacity.iter().map(|&n| pool.of_slots(n) as u64).sum())?;
        let wanted: Vec<usize> = capacity.iter().map(|&n| pool.of_slots(n)).collect();
        let tables: Vec<Vec<u32>> =
            wanted.into_iter().map(|pages| pool.books.take(pages).collect()).collect();
        let made = Self::new(pool, tables.clone(), capacity, view.tokens())
            .and_then(|cache| cache.slots.fill_from(view, kept).map(|()| cache));
        made.inspect_err(|_| pool.books.give(tables.concat()))
    }

    /// Takes over what an engine's pages hold, where it is: head `h` has a slot for each of `positions[h]`, ascending, in the
    /// pages `tables[h]`, of a sequence that has seen `tokens` tokens. Heads may grow into the pages they have, and with
    /// [more](Self::reserve) by `slack` slots.
    ///
    /// From now on the pages are the cache's, and what it gives up is the pool's, until the engine
    /// [withdraws](PagePool::withdraw) it.
    ///
    /// Errors: [`NotTheEngines`](Error::NotTheEngines), tables too short for the slots, positions out of order or beyond the
    /// tokens, another number of heads.
    pub fn adopt(
        pool: &mut PagePool,
        tables: &[Vec<u32>],
        positions: &[Vec<Position>],
        tokens: u32,
        slack: u32,
    ) -> Result<Self> {
        // What a view promises is what a cache needs.
        let lens: Vec<u32> = positions.iter().map(|row| row.len() as u32).collect();
        let rows = |storage| Rows::paged(storage, pool.dim(), pool.page(), tables, &lens);
        let heads = tables.len() as u32;
        let shape = LayerShape::new(heads, heads, pool.dim())?;
        LayerView::new(shape, tokens, rows(pool.k())?, rows(pool.v())?)?
            .with_positions(positions)?;

        let mut bounds = with_slack(positions.iter().map(Vec::len), slack)?;
        for (bound, table) in bounds.iter_mut().zip(tables) {
            let slots = u64::from(pool.page()) * table.len() as u64;
            *bound = (*bound).max(u32::try_from(slots.min(MAX_LEN)).expect("below 2^31"));
        }
        let pages = || tables.iter().flatten().copied();
        pool.claim(pages())?;
        let made = Self::new(pool, tables.to_vec(), bounds, tokens)
            .and_then(|cache| cache.slots.enter(positions).map(|()| cache));
        made.inspect_err(|_| pool.disclaim(pages()))
    }

    /// Empty heads in pages that are theirs, with room in the tables for the pages of `bounds[h]` slots.
    fn new(pool: &PagePool, tables: Vec<Vec<u32>>, bounds: Vec<u32>, tokens: u32) -> Result<Self> {
        let (dtype, dim, page) = (pool.dtype(), pool.dim(), pool.page());
        let (mut firsts, mut pages) = (Vec::new(), Vec::new());
        for (table, &bound) in tables.iter().zip(&bounds) {
            firsts.push(pages.len());
            pages.extend_from_slice(table);
            pages.resize(firsts[firsts.len() - 1] + pool.of_slots(bound), 0);
        }
        let row = row_bytes(dtype, dim);
        let heads = |address: u64| {
            firsts.iter().map(|&first| HeadRows::paged(address, row, page, first)).collect()
        };
        let (keys, values) = (heads(pool.k().address()), heads(pool.v().address()));
        let places = Places { keys, values, pages };
        let slots = Slots::new(&pool.cuda, (dtype, dim), tokens, bounds, &places)?;
        let mut cache = Self { tables, firsts, page, slots, pool: pool.tag() };
        cache.set_capacity();
        if cache.slots.capacity != cache.slots.bounds {
            cache.write_places()?;
        }
        Ok(cache)
    }

    /// What heads may reach with the pages they have.
    fn set_capacity(&mut self) {
        for (h, table) in self.tables.iter().enumerate() {
            let slots = u64::from(self.page) * table.len() as u64;
            self.slots.capacity[h] = slots.min(self.slots.bounds[h].into()) as u32;
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

    /// Waits for the stream, then takes and gives back pages so that each head has those that its slots and `slack` more
    /// need. Tables change where they are: captured graphs stay valid.
    ///
    /// Errors: [`CacheFull`](Error::CacheFull) beyond what [`Self::gather`] reserved, [`OutOfPages`](Error::OutOfPages),
    /// another pool.
    pub fn reserve(&mut self, pool: &mut PagePool, slack: u32) -> Result<()> {
        pool.check_owner(&self.pool)?;
        let lens = self.slots.lens()?;
        let mut wanted = Vec::with_capacity(lens.len());
        for (h, (&len, &limit)) in lens.iter().zip(&self.slots.bounds).enumerate() {
            if u64::from(len) + u64::from(slack) > u64::from(limit) {
                let (head, len, capacity) = (KvHead(h as u32), len.into(), limit.into());
                return Err(Error::CacheFull { head, len, capacity, new: slack.into() });
            }
            wanted.push(pool.of_slots(len + slack));
        }
        let pairs = || self.tables.iter().map(Vec::len).zip(wanted.iter().copied());
        let missing: usize = pairs().map(|(has, wants)| wants.saturating_sub(has)).sum();
        let freed: usize = pairs().map(|(has, wants)| has.saturating_sub(wants)).sum();
        pool.check_free(missing.saturating_sub(freed) as u64)?;
        for (table, &pages) in self.tables.iter_mut().zip(&wanted) {
            pool.books.give(table.drain(pages.min(table.len())..));
        }
        for (table, &pages) in self.tables.iter_mut().zip(&wanted) {
            table.extend(pool.books.take(pages - table.len()));
        }
        self.set_capacity();
        self.write_places()
    }

    /// Gives all pages back and forgets all slots. The token count stays, and so does what the tables have room for.
    ///
    /// Errors: another pool.
    pub fn release(&mut self, pool: &mut PagePool) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.clear()?;
        self.slots.capacity.fill(0);
        self.write_places()?;
        self.tables.iter_mut().for_each(|table| pool.books.give(table.drain(..)));
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
    /// Errors: [`CacheFull`](Error::CacheFull) with the head that has the least room and the tokens refused.
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
