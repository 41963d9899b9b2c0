//! The books of a cache on the device: lengths, positions and counters, which kernels read and write, and what the host
//! knows without asking: capacities. Flat and paged caches differ in where rows lie, and in nothing written here.

use super::super::driver::{Memory, Ptr};
use super::super::floats::{Sent, Slot, Table};
use super::super::gather::{COUNTERS, Held, Kept, REFUSED, SEEN, Source};
use super::super::lists::Lists;
use super::super::selection::Cut;
use super::super::views::{HeadRows, Heads};
use super::super::{Cuda, DeviceLayer, DeviceSlice, Selection, append, gather};
use crate::cache::slots as host;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;
use crate::ids::{KvHead, Position};
use crate::ragged::Ragged;
use crate::view::Rows;

/// What becomes of the order of slots when a cache is thinned in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Rows slide down and stay ascending by position, as everything that looks at neighbours or at "the last slots"
    /// wants: scoring again, pooling, protection.
    Ascending,
    /// The last rows go into the holes: fewer rows move and no block waits for another. Attention does not mind. From
    /// then on the cache cannot be scored, and the last bits of attention depend on the order.
    Any,
}

pub(super) struct Slots {
    pub(super) cuda: Cuda,
    pub(super) dtype: Dtype,
    pub(super) dim: u32,
    /// Slots that each head may reach now.
    pub(super) capacity: Vec<u32>,
    /// Slots that each head may ever reach: what sizes workspaces and grids, so that captured launches stay right.
    pub(super) bounds: Vec<u32>,
    /// Whether slots ascend by position.
    ascending: bool,
    positions: Lists,
    books: Sent,
    lengths: Slot<u32>,
    capacities: Slot<u32>,
    counters: Slot<u32>,
    keys: Slot<HeadRows>,
    values: Slot<HeadRows>,
    pages: Slot<u32>,
    /// States of the tiles of an ordered compaction.
    states: Memory,
    units: u32,
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
            states, units,
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

    /// Copies the kept slots of a view here.
    pub(super) fn fill_from(&self, view: &DeviceLayer<'_>, kept: Kept) -> Result<()> {
        let mut heads = Heads::default();
        heads.push("keys", view.k())?;
        heads.push("values", view.v())?;
        let mut table = Table::default();
        let slots = heads.into_table(&mut table);
        let sent = table.send(&self.cuda)?;
        let positions = view.positions().map(|positions| {
            let rows: Vec<Vec<u32>> = positions.iter().map(|row| numbers(row)).collect();
            Lists::upload(&self.cuda, "positions of a view", &rows)
        });
        let positions = positions.transpose()?;
        let keys = sent.at(slots.rows);
        let from = Source {
            keys,
            values: keys.add(self.capacity.len()),
            pages: sent.at(slots.pages),
            positions: positions.as_ref().map_or(Ptr::NULL, Lists::rows),
        };
        gather::gather(&self.cuda, from, self.held(), kept)
    }

    /// Thins the heads in place.
    pub(super) fn thin(&mut self, kept: Kept, order: Order) -> Result<()> {
        match order {
            Order::Ascending => gather::slide(&self.cuda, self.held(), kept, &self.states),
            Order::Any => {
                gather::fill(&self.cuda, self.held(), kept)?;
                self.ascending = false;
                Ok(())
            }
        }
    }

    /// Thins the heads to `kept` positions, which are checked, in place.
    pub(super) fn compact(&mut self, kept: &Ragged<Position>, order: Order) -> Result<()> {
        let chosen = Chosen::upload(&self.cuda, &self.slots_of(kept)?)?;
        self.thin(chosen.kept(), order)
    }

    /// Thins the heads to selected slots in place.
    pub(super) fn compact_selected(
        &mut self,
        selection: &Selection,
        first: usize,
        order: Order,
    ) -> Result<()> {
        let segments = selected(selection, first, self.capacity.len())?;
        let mut most = 0;
        for (&capacity, &(len, bound)) in self.capacity.iter().zip(segments) {
            // Slots of scores that are older or newer than the cache may be wrong, but lie in its memory.
            if len > capacity {
                let (what, expected) = ("slots of a selected segment", capacity.into());
                return Err(Error::Shape { what, expected, got: len.into() });
            }
            most = most.max(bound);
        }
        self.thin(kept_of(selection, first, most), order)
    }

    /// Copies all slots of another cache, whose heads hold `most` at most.
    pub(super) fn take_all(&mut self, from: &Self, most: u32) -> Result<()> {
        let source = from.held();
        let kept = Kept { cuts: Ptr::NULL, slots: Ptr::NULL, counts: source.lengths, most };
        gather::gather(&self.cuda, source.rows, self.held(), kept)?;
        self.ascending = from.ascending;
        Ok(())
    }

    /// The slots of `kept` positions, which are checked.
    fn slots_of(&self, kept: &Ragged<Position>) -> Result<Vec<Vec<u32>>> {
        host::expect("heads of the kept positions", self.capacity.len(), kept.rows())?;
        let seen = self.read()?;
        let slots = |(h, held): (usize, &Vec<Position>)| {
            // Slots by position; the identity while they ascend.
            let mut order: Vec<usize> = (0..held.len()).collect();
            order.sort_by_key(|&slot| held[slot]);
            let sorted: Vec<Position> = order.iter().map(|&slot| held[slot]).collect();
            let places = slots_of(host::Held::At(&sorted), h, kept.row(h), seen.tokens)?;
            let mut slots: Vec<u32> =
                places.into_iter().map(|place| order[place as usize] as u32).collect();
            slots.sort_unstable();
            Ok(slots)
        };
        seen.positions.iter().enumerate().map(slots).collect()
    }

    /// Checks new rows `[H, M, D]` and appends them.
    pub(super) fn append(
        &mut self,
        k: &Rows<'_, DeviceSlice<'_>>,
        v: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
        let heads = self.capacity.len();
        for (what, rows) in [("new keys", k), ("new values", v)] {
            if rows.dtype() != self.dtype {
                return Err(Error::Dtype { what, expected: self.dtype, got: rows.dtype() });
            }
            host::expect("heads of new keys and values", heads, rows.heads())?;
            host::expect("head dim of new keys and values", self.dim as usize, rows.dim())?;
        }
        let new = k.len(0);
        for h in 0..heads {
            host::expect("new keys of a head", new, k.len(h))?;
            host::expect("new values of a head", new, v.len(h))?;
        }
        if new == 0 {
            return Ok(());
        }
        append::append(&self.cuda, k, v, new as u32, self.held())
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

    /// Forgets all slots.
    pub(super) fn clear(&self) -> Result<()> {
        self.books.write(self.lengths, 0, &vec![0u32; self.capacity.len()])
    }
}

pub(super) fn row_bytes(dtype: Dtype, dim: u32) -> u64 {
    u64::from(dim) * dtype.size() as u64
}

fn numbers(positions: &[Position]) -> Vec<u32> {
    positions.iter().map(|p| p.0).collect()
}

/// Slots of ascending positions, which are checked.
fn slots_of(held: host::Held<'_>, head: usize, kept: &[Position], tokens: u32) -> Result<Vec<u32>> {
    held.check(head, kept, tokens)?;
    let moves = held.moves(kept, 0, kept.len());
    Ok(moves.flat_map(|m| m.from as u32..(m.from + m.rows) as u32).collect())
}

/// Slots that the host chose, on the device.
pub(super) struct Chosen {
    sent: Sent,
    cuts: Slot<Cut>,
    slots: Slot<u32>,
    most: u32,
}

impl Chosen {
    pub(super) fn upload(cuda: &Cuda, rows: &[Vec<u32>]) -> Result<Self> {
        let (mut table, mut start) = (Table::default(), 0);
        let cut = |row: &Vec<u32>| {
            start += row.len();
            Cut::chosen(start - row.len(), row.len())
        };
        let cuts = table.push(&rows.iter().map(cut).collect::<Vec<_>>());
        let slots = table.push(&rows.concat());
        let most = rows.iter().map(|row| row.len() as u32).max().unwrap_or(0);
        Ok(Self { sent: table.send(cuda)?, cuts, slots, most })
    }

    pub(super) fn kept(&self) -> Kept {
        let (cuts, slots) = (self.sent.at(self.cuts), self.sent.at(self.slots));
        Kept { cuts, slots, counts: Ptr::NULL, most: self.most }
    }
}

/// Segments `first ..` of a selection: their slots, and how many they keep at most.
fn selected(selection: &Selection, first: usize, heads: usize) -> Result<&[(u32, u32)]> {
    let all = selection.segments();
    let end = first.saturating_add(heads);
    host::expect("segments of a selection", all.len().max(end), all.len())?;
    Ok(&all[first..end])
}

fn kept_of(selection: &Selection, first: usize, most: u32) -> Kept {
    let (cuts, slots) = (selection.cuts().add(first), selection.positions());
    Kept { cuts, slots, counts: Ptr::NULL, most }
}

/// What is selected of a view, for heads of these capacities.
pub(super) fn kept_of_view(
    view: &DeviceLayer<'_>,
    selection: &Selection,
    first: usize,
    capacity: &[u32],
) -> Result<Kept> {
    let heads = view.k().heads();
    host::expect("capacities of heads", heads, capacity.len())?;
    let mut most = 0;
    for (h, &(len, bound)) in selected(selection, first, heads)?.iter().enumerate() {
        host::expect("slots of a selected segment", view.k().len(h), len as usize)?;
        most = most.max(bound.min(capacity[h]));
    }
    with_slack(capacity.iter().map(|&n| n as usize), 0)?;
    Ok(kept_of(selection, first, most))
}

/// The slots of kept positions of a view, which are checked.
pub(super) fn slots_of_view(
    view: &DeviceLayer<'_>,
    kept: &Ragged<Position>,
) -> Result<Vec<Vec<u32>>> {
    host::expect("heads of the kept positions", view.k().heads(), kept.rows())?;
    let slots = |(h, row): (usize, &[Position])| {
        let dense = host::Held::Dense(view.k().len(h));
        let held = view.positions().map_or(dense, |positions| host::Held::At(&positions[h]));
        slots_of(held, h, row, view.tokens())
    };
    kept.iter().enumerate().map(slots).collect()
}

/// Capacities of heads that hold `lens` slots and `slack` more.
pub(super) fn with_slack(lens: impl Iterator<Item = usize>, slack: u32) -> Result<Vec<u32>> {
    let room = |len: usize| match len as u64 + u64::from(slack) {
        got if got > MAX_LEN => {
            Err(Error::TooLarge { what: "slots reserved for a head", got, limit: MAX_LEN })
        }
        got => Ok(got as u32),
    };
    lens.map(room).collect()
}
