//! The paged cache: per KV head a table of pages of `[P, D]` rows, out of a shared [`PagePool`].
//!
//! Slot `s` of head `h` is row `tables[h][s / P] * P + s % P` of the pool. Heads of one layer may thus have
//! different lengths. Engines with paged pools `[pages, H, P, D]` (HND) have the same thing by
//! reinterpretation: page `p`, head `h` of theirs is page `p * H + h` of ours, `[pages * H, 1, P, D]`, and
//! their attention kernel sees one-head sequences. A head's last page may be partly used, no other may.

use std::sync::Arc;

use super::buffer::{Buffer, copy_rows, reserved};
use super::pool::PagePool;
use super::slots::{Held, Slots, slide};
use super::source::{Piece, Source};
use crate::backend::AttendView;
use crate::backend::cpu::{HostLayer, HostSlice};
use crate::error::Result;
use crate::geometry::LayerShape;
use crate::ids::Position;
use crate::ragged::Ragged;
use crate::view::{LayerView, Rows};

/// Bytes kept below which threads cost more than they save.
const PARALLEL_BYTES: usize = 1 << 20;

/// What is left of one layer of one sequence, in pages of a pool. Every method wants the pool of
/// [`Self::gather`]; any other is an error. Dropped without [`Self::release`], it keeps its pages for ever.
#[derive(Debug)]
#[must_use = "its pages stay taken until `release`"]
pub struct PagedCache {
    tables: Vec<Vec<u32>>,
    page: u32,
    slots: Slots,
    pool: Arc<()>,
}

impl PagedCache {
    /// Copies the kept positions of `view`, one ascending row per KV head, to free pages. Heads may later
    /// grow by `slack` slots: their books are reserved now, their pages taken when needed.
    ///
    /// Errors: another number of heads, positions out of order or not held, a pool of another dtype or
    /// dim, [`OutOfPages`](crate::Error::OutOfPages).
    pub fn gather(
        pool: &mut PagePool,
        view: &HostLayer<'_>,
        kept: &Ragged<Position>,
        slack: u32,
    ) -> Result<Self> {
        let source = Source::new(view, kept)?;
        pool.check_layer(source.k.dtype(), source.k.dim())?;
        let slots = source.slots(slack)?;
        let pages = |&slots: &u32| pool.of_slots(slots) as u128;
        let tables = slots.capacity.iter().map(|n| reserved("page table", pages(n)));
        let mut tables = tables.collect::<Result<Vec<Vec<u32>>>>()?;
        pool.check_free(slots.lens.iter().map(|n| pages(n) as u64).sum())?;
        for (table, &len) in tables.iter_mut().zip(&slots.lens) {
            let pages = pool.of_slots(len);
            table.extend(pool.books.take(pages));
        }
        let cache = Self { tables, page: pool.page(), slots, pool: pool.tag() };
        source.copy(cache.pieces(&mut pool.k), cache.pieces(&mut pool.v));
        Ok(cache)
    }

    /// The rows in use, as disjoint pieces. Right after [`Self::gather`] pages ascend from head to head,
    /// since the lowest free page is taken first.
    fn pieces<'b>(&self, buffer: &'b mut Buffer) -> Vec<Piece<'b>> {
        let row = self.slots.row_bytes();
        let page = self.page as usize;
        let mut rest = buffer.bytes_mut();
        let mut passed = 0;
        let mut out = Vec::new();
        for (head, (table, &len)) in self.tables.iter().zip(&self.slots.lens).enumerate() {
            for (i, &p) in table.iter().enumerate() {
                let (_, here) = rest.split_at_mut((p as usize - passed) * page * row);
                let (bytes, later) = here.split_at_mut(page * row);
                (rest, passed) = (later, p as usize + 1);
                let first = i * page;
                let rows = page.min(len as usize - first);
                out.push(Piece { head, first, bytes: &mut bytes[..rows * row] });
            }
        }
        out
    }

    /// Thins the heads to `kept`, one ascending row per KV head, in place: rows move left across pages in
    /// their order, and emptied pages go back to the pool. Allocates nothing.
    ///
    /// Errors: another number of heads, positions out of order or not held, another pool.
    pub fn compact(&mut self, pool: &mut PagePool, kept: &Ragged<Position>) -> Result<()> {
        pool.check_owner(&self.pool)?;
        self.slots.check_kept(kept)?;
        let (k, v) = (pool.k.bytes_mut(), pool.v.bytes_mut());
        if kept.total() * self.slots.row_bytes() < PARALLEL_BYTES {
            self.slide(k, kept);
            self.slide(v, kept);
        } else {
            // Heads share the pool without order, so keys and values are what threads can share out.
            rayon::join(|| self.slide(k, kept), || self.slide(v, kept));
        }
        self.slots.keep(kept);
        for (table, &len) in self.tables.iter_mut().zip(&self.slots.lens) {
            let pages = pool.of_slots(len);
            pool.books.give(table.drain(pages..));
        }
        Ok(())
    }

    fn slide(&self, bytes: &mut [u8], kept: &Ragged<Position>) {
        for (h, positions) in self.slots.positions.iter().enumerate() {
            let moves = Held::At(positions).moves(kept.row(h), 0, kept.len(h));
            slide(bytes, self.slots.row_bytes(), moves, |slot| self.place(h, slot));
        }
    }

    /// The row of a slot, and the rows from it to the end of its page.
    fn place(&self, head: usize, slot: usize) -> (usize, usize) {
        let page = self.page as usize;
        let inside = slot % page;
        (self.tables[head][slot / page] as usize * page + inside, page - inside)
    }

    /// Appends `M` tokens: keys and values `[H, M, D]`, at positions `tokens() .. tokens() + M` of every
    /// head. Takes pages where the last one is full. Costs `O(M)` per head and allocates nothing.
    ///
    /// Errors: other heads, dims, lengths or dtype; [`CacheFull`](crate::Error::CacheFull) beyond the slack of
    /// [`Self::gather`]; [`OutOfPages`](crate::Error::OutOfPages); another pool.
    pub fn append(
        &mut self,
        pool: &mut PagePool,
        k: &Rows<'_, HostSlice<'_>>,
        v: &Rows<'_, HostSlice<'_>>,
    ) -> Result<()> {
        pool.check_owner(&self.pool)?;
        let new = self.slots.check_new(k, v)?;
        let (page, lens) = (self.page, &self.slots.lens);
        let missing = |len: u32| ((len + new).div_ceil(page) - len.div_ceil(page)) as usize;
        pool.check_free(lens.iter().map(|&len| missing(len) as u64).sum())?;
        for (table, &len) in self.tables.iter_mut().zip(lens) {
            // Within the capacity of the table: no allocation.
            table.extend(pool.books.take(missing(len)));
        }
        let row = self.slots.row_bytes();
        for (buffer, rows) in [(&mut pool.k, k), (&mut pool.v, v)] {
            let bytes = buffer.bytes_mut();
            for (h, &len) in self.slots.lens.iter().enumerate() {
                let mut done = 0;
                while done < new as usize {
                    let (at, piece) = self.place(h, len as usize + done);
                    let count = piece.min(new as usize - done);
                    copy_rows(&mut bytes[at * row..(at + count) * row], rows, h, done);
                    done += count;
                }
            }
        }
        self.slots.push(new);
        Ok(())
    }

    /// Gives all pages back and forgets all slots. The token count stays, and so does the capacity.
    ///
    /// Errors: another pool.
    pub fn release(&mut self, pool: &mut PagePool) -> Result<()> {
        pool.check_owner(&self.pool)?;
        for table in &mut self.tables {
            pool.books.give(table.drain(..));
        }
        self.slots.lens.fill(0);
        self.slots.positions.iter_mut().for_each(Vec::clear);
        Ok(())
    }

    /// Lends keys, values and positions, to be scored again or gathered elsewhere.
    ///
    /// Errors: a shape of other KV heads or head dim, another pool.
    pub fn view<'a>(&'a self, pool: &'a PagePool, shape: LayerShape) -> Result<HostLayer<'a>> {
        let (k, v) = self.rows(pool)?;
        LayerView::new(shape, self.tokens(), k, v)?.with_positions(self.positions())
    }

    /// Lends keys and values to the attention of queries `[Hq, M, D]`.
    ///
    /// Errors: another pool.
    pub fn attend_view<'a>(
        &'a self,
        pool: &'a PagePool,
        q: Rows<'a, HostSlice<'a>>,
    ) -> Result<AttendView<'a, HostSlice<'a>>> {
        let (k, v) = self.rows(pool)?;
        Ok(AttendView { q, k, v })
    }

    fn rows<'a>(
        &'a self,
        pool: &'a PagePool,
    ) -> Result<(Rows<'a, HostSlice<'a>>, Rows<'a, HostSlice<'a>>)> {
        pool.check_owner(&self.pool)?;
        let Slots { dim, lens, .. } = &self.slots;
        let rows = |storage| Rows::paged(storage, *dim, self.page, &self.tables, lens);
        Ok((rows(pool.k())?, rows(pool.v())?))
    }

    /// Pages of each head, in slot order.
    pub fn tables(&self) -> &[Vec<u32>] {
        &self.tables
    }
    /// Slots of each head.
    pub fn lens(&self) -> &[u32] {
        &self.slots.lens
    }
    /// Slots that each head may reach.
    pub fn capacity(&self) -> &[u32] {
        &self.slots.capacity
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
    /// Bytes of the pages taken.
    pub fn bytes_reserved(&self) -> u64 {
        let pages: usize = self.tables.iter().map(Vec::len).sum();
        2 * pages as u64 * u64::from(self.page) * self.slots.row_bytes() as u64
    }
}
