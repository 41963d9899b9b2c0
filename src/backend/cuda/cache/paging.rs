//! Which pages a cache has: taken from the pool when it is filled, adopted from an engine, changed between steps, given back.

use super::super::gather::Kept;
use super::super::views::HeadRows;
use super::super::{DeviceLayer, Selection};
use super::paged::PagedCache;
use super::pool::PagePool;
use super::slots::{Places, Slots, row_bytes};
use super::thin::{Chosen, kept_of_view, slots_of_view};
use crate::cache::slots::with_slack;
use crate::error::{Error, Result};
use crate::geometry::{LayerShape, MAX_LEN};
use crate::ids::{KvHead, Position};
use crate::ragged::Ragged;
use crate::view::{LayerView, Rows};

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
}
