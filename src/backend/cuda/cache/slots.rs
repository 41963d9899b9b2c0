//! The books of a cache on the device: lengths, positions and counters, which kernels read and write, and what the host
//! knows without asking: capacities. Flat and paged caches differ in where rows lie, and in nothing written here.

use std::sync::Arc;

use super::super::driver::Memory;
use super::super::floats::{Sent, Slot, Table};
use super::super::gather::{COUNTERS, Held, REFUSED, SEEN, Source};
use super::super::lists::Lists;
use super::super::views::HeadRows;
use super::super::{Cuda, DeviceSlice, append, gather};
use crate::cache::slots::new_rows;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ids::{KvHead, Position};
use crate::view::Rows;

pub(super) struct Slots {
    pub(super) cuda: Cuda,
    pub(super) dtype: Dtype,
    pub(super) dim: u32,
    /// Slots that each head may reach now.
    pub(super) capacity: Vec<u32>,
    /// Slots that each head may ever reach: what sizes workspaces and grids, so that captured launches stay right.
    pub(super) bounds: Vec<u32>,
    /// Whether slots ascend by position.
    pub(super) ascending: bool,
    positions: Lists,
    books: Sent,
    lengths: Slot<u32>,
    capacities: Slot<u32>,
    counters: Slot<u32>,
    keys: Slot<HeadRows>,
    values: Slot<HeadRows>,
    pages: Slot<u32>,
    /// States of the tiles of an ordered compaction.
    pub(super) states: Memory,
    units: u32,
    /// Tells these books from others: batches hold a clone.
    pub(super) tag: Arc<()>,
}

/// Where the rows of a cache lie: per head, and the page tables.
pub(super) struct Places {
    pub(super) keys: Vec<HeadRows>,
    pub(super) values: Vec<HeadRows>,
    pub(super) pages: Vec<u32>,
}

/// What the device knows, read back.
pub(super) struct Seen {
    pub(super) lens: Vec<u32>,
    pub(super) positions: Vec<Vec<Position>>,
    pub(super) tokens: u32,
}

impl Slots {
    /// Empty heads with room for `capacity` slots each, of a sequence that has seen `tokens` tokens.
    pub(super) fn new(
        cuda: &Cuda,
        (dtype, dim): (Dtype, u32),
        tokens: u32,
        capacity: Vec<u32>,
        places: &Places,
    ) -> Result<Self> {
        let units = gather::units(row_bytes(dtype, dim))?;
        let mut table = Table::default();
        let lengths = table.push(&vec![0u32; capacity.len()]);
        let capacities = table.push(&capacity);
        let mut counters = [0u32; COUNTERS];
        counters[SEEN] = tokens;
        let counters = table.push(&counters);
        let (keys, values) = (table.push(&places.keys), table.push(&places.values));
        let pages = table.push(&places.pages);
        let books = table.send(cuda)?;
        let positions = Lists::new(cuda, "positions of a cache", &capacity)?;
        let longest = capacity.iter().copied().max().unwrap_or(0);
        let bytes = gather::slide_bytes(longest, capacity.len(), units);
        let states = Memory::new(&cuda.driver, "states of a compaction", bytes)?;
        let cuda = cuda.clone();
        let (ascending, bounds) = (true, capacity.clone());
        #[rustfmt::skip]
        return Ok(Self {
            cuda, dtype, dim, capacity, bounds, ascending, positions, books, lengths, capacities, counters, keys, values, pages,
            states, units, tag: Arc::new(()),
        });
    }

    pub(super) fn held(&self) -> Held {
        let rows = Source {
            keys: self.books.at(self.keys),
            values: self.books.at(self.values),
            pages: self.books.at(self.pages),
            positions: self.positions.rows(),
        };
        Held {
            rows,
            lengths: self.books.at(self.lengths),
            capacities: self.books.at(self.capacities),
            counters: self.books.at(self.counters),
            heads: self.capacity.len(),
            units: self.units,
        }
    }

    /// A buffer of this cache's elements.
    pub(super) fn lend<'a>(&self, memory: &'a Memory) -> DeviceSlice<'a> {
        DeviceSlice::of(memory, self.dtype)
    }

    pub(super) fn row_bytes(&self) -> u64 {
        row_bytes(self.dtype, self.dim)
    }

    /// Checks new rows `[H, M, D]` and appends them.
    pub(super) fn append(
        &mut self,
        k: &Rows<'_, DeviceSlice<'_>>,
        v: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
        let heads = self.capacity.len();
        let new = new_rows((self.dtype, self.dim), heads, k, v)?;
        if new == 0 {
            return Ok(());
        }
        append::append(&self.cuda, k, v, new, self.held())
    }

    /// Waits for the stream, then reads lengths.
    pub(super) fn lens(&self) -> Result<Vec<u32>> {
        self.books.read(self.lengths, self.capacity.len())
    }

    pub(super) fn counters(&self) -> Result<Vec<u32>> {
        self.books.read(self.counters, COUNTERS)
    }

    /// The error of tokens or rows that found no room.
    pub(super) fn check(&self) -> Result<()> {
        let refused = self.counters()?[REFUSED];
        if refused == 0 {
            return Ok(());
        }
        let lens = self.lens()?;
        let tightest = (0..lens.len()).min_by_key(|&h| self.capacity[h] - lens[h]).unwrap_or(0);
        Err(Error::CacheFull {
            head: KvHead(tightest as u32),
            len: lens[tightest].into(),
            capacity: self.capacity[tightest].into(),
            new: refused.into(),
        })
    }

    /// Waits for the stream, then reads all there is to know.
    pub(super) fn read(&self) -> Result<Seen> {
        let lens = self.lens()?;
        let positions = self.positions.read(&lens)?.into_iter();
        let positions = positions.map(|row| row.into_iter().map(Position).collect()).collect();
        Ok(Seen { lens, positions, tokens: self.counters()?[SEEN] })
    }

    /// Whether slots ascend by position, which views promise.
    pub(super) fn check_order(&self) -> Result<()> {
        if self.ascending {
            return Ok(());
        }
        let why = "it was compacted without keeping the order of its slots";
        Err(Error::Unsupported { what: "scoring of this cache", why })
    }

    /// Tells the device new capacities, and pages of a head from its first one on.
    pub(super) fn write_places(&self, tables: &[(usize, &[u32])]) -> Result<()> {
        for (first, table) in tables {
            self.books.write(self.pages, *first, table)?;
        }
        self.books.write(self.capacities, 0, &self.capacity)
    }

    /// Enters slots whose rows are there.
    pub(super) fn enter(&self, positions: &[Vec<Position>]) -> Result<()> {
        for (h, row) in positions.iter().enumerate() {
            self.positions.write(h, bytemuck::cast_slice(row))?;
        }
        let lens: Vec<u32> = positions.iter().map(|row| row.len() as u32).collect();
        self.books.write(self.lengths, 0, &lens)
    }

    /// Waits for the stream, then reads where keys and values lie, with page tables counted from address zero.
    pub(super) fn places(&self) -> Result<[Vec<HeadRows>; 2]> {
        let pages = self.books.at(self.pages);
        let read = |slot| -> Result<Vec<HeadRows>> {
            let rows = self.books.read::<HeadRows>(slot, self.capacity.len())?.into_iter();
            Ok(rows.map(|row| row.with_absolute_table(pages)).collect())
        };
        Ok([read(self.keys)?, read(self.values)?])
    }

    /// Forgets all slots.
    pub(super) fn clear(&self) -> Result<()> {
        self.books.write(self.lengths, 0, &vec![0u32; self.capacity.len()])
    }
}

pub(super) fn row_bytes(dtype: Dtype, dim: u32) -> u64 {
    u64::from(dim) * dtype.size() as u64
}
