//! A cache as a borrowed view: lengths and positions as they were when they were read, rows where they are.

use super::super::gather::NAN;
use super::super::{DeviceLayer, DeviceSlice};
use super::slots::{Seen, Slots};
use crate::backend::AttendView;
use crate::error::Result;
use crate::geometry::LayerShape;
use crate::ids::Position;
use crate::view::{LayerView, Rows};

/// What [`FlatCache::read`](super::FlatCache::read) and [`PagedCache::read`](super::PagedCache::read) saw. It lends the
/// cache like any other layer; while it lives, the cache does not change.
pub struct Snapshot<'a> {
    pub(super) slots: &'a Slots,
    pub(super) seen: Seen,
    pub(super) place: Place<'a>,
    pub(super) k: DeviceSlice<'a>,
    pub(super) v: DeviceSlice<'a>,
}

pub(super) enum Place<'a> {
    /// First row of each head.
    Flat(&'a [u64]),
    /// Rows of a page, pages of each head.
    Paged(u32, &'a [Vec<u32>]),
}

impl Snapshot<'_> {
    /// Lends keys, values and positions, to be scored again or gathered elsewhere.
    ///
    /// Errors: a shape of other KV heads or head dim; slots that no longer ascend by position.
    pub fn view(&self, shape: LayerShape) -> Result<DeviceLayer<'_>> {
        self.slots.check_order()?;
        let (k, v) = self.rows()?;
        LayerView::new(shape, self.seen.tokens, k, v)?.with_positions(&self.seen.positions)
    }

    /// Lends keys and values to the attention of queries `[Hq, M, D]`.
    pub fn attend_view<'b>(
        &'b self,
        q: Rows<'b, DeviceSlice<'b>>,
    ) -> Result<AttendView<'b, DeviceSlice<'b>>> {
        let (k, v) = self.rows()?;
        Ok(AttendView { q, k, v })
    }

    fn rows(&self) -> Result<(Rows<'_, DeviceSlice<'_>>, Rows<'_, DeviceSlice<'_>>)> {
        let (dim, lens) = (self.slots.dim, self.seen.lens.as_slice());
        let rows = |storage| match self.place {
            Place::Flat(starts) => Rows::ragged(storage, dim, starts, lens),
            Place::Paged(page, tables) => Rows::paged(storage, dim, page, tables, lens),
        };
        Ok((rows(self.k)?, rows(self.v)?))
    }

    /// Slots of each head.
    pub fn lens(&self) -> &[u32] {
        &self.seen.lens
    }
    /// Positions of each head's slots; ascending unless compacted in [any order](super::Order::Any).
    pub fn positions(&self) -> &[Vec<Position>] {
        &self.seen.positions
    }
    /// Tokens the sequence has seen: the position of the next one.
    pub fn tokens(&self) -> u32 {
        self.seen.tokens
    }
    /// Scores of NaN among those of the selections that this cache was filled and thinned by since it was made or
    /// repacked: nothing waits to refuse them on the device, they rank below all others. Protected slots, whose scores
    /// nobody looks at, do not count. Waits for the stream.
    pub fn nan_scores(&self) -> Result<u32> {
        Ok(self.slots.counters()?[NAN])
    }
    /// Bytes of the keys and values held.
    pub fn bytes_used(&self) -> u64 {
        let slots: u64 = self.seen.lens.iter().map(|&n| u64::from(n)).sum();
        2 * slots * self.slots.row_bytes()
    }
}
