//! How a cache is filled and thinned: what is kept, by the host's choice of positions or by the device's selection, and
//! in which order.

use super::super::driver::Ptr;
use super::super::floats::{Sent, Slot, Table};
use super::super::gather::{Kept, Source};
use super::super::lists::Lists;
use super::super::selection::Cut;
use super::super::views::Heads;
use super::super::{Cuda, DeviceLayer, Selection, gather};
use super::slots::Slots;
use crate::cache::slots as host;
use crate::error::{Error, Result};
use crate::ids::Position;
use crate::ragged::Ragged;

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

impl Slots {
    /// Copies the kept slots of a view here.
    pub(super) fn fill_from(&self, view: &DeviceLayer<'_>, kept: Kept) -> Result<()> {
        let mut heads = Heads::default();
        heads.push("keys", view.k())?;
        heads.push("values", view.v())?;
        let mut table = Table::default();
        let slots = heads.into_table(&mut table);
        let sent = table.send(&self.cuda)?;
        let positions = view.positions().map(|positions| {
            let rows: Vec<&[u32]> = positions.iter().map(|row| bytemuck::cast_slice(row)).collect();
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
    host::with_slack(capacity.iter().map(|&n| n as usize), 0)?;
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
