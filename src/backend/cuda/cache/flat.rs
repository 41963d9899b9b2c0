//! The flattened ragged cache on the device: rows of all heads back to back, `[Σ capacity(h), D]`, keys and values apart.
//!
//! Head `h` owns rows `starts[h] .. starts[h] + capacity[h]` and uses the first ones; the rest is slack that `append`
//! fills without moving anything.

use super::super::driver::Memory;
use super::super::views::HeadRows;
use super::super::{Cuda, DeviceLayer, DeviceSlice, Floats, Output, Selection};
use super::attend::Workspace;
use super::batch::Member;
use super::recompress::{Recompress, Recompression};
use super::slots::{Places, Slots, row_bytes};
use super::snapshot::{Place, Snapshot};
use super::thin::{Chosen, Order, kept_of_view, slots_of_view};
use crate::backend::ops::Attend;
use crate::cache::slots::with_slack;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ids::Position;
use crate::ragged::Ragged;
use crate::view::Rows;

/// What is left of one layer of one sequence, in two buffers of its own: [`crate::cache::FlatCache`] on the device.
pub struct FlatCache {
    k: Memory,
    v: Memory,
    /// First row of each head.
    starts: Vec<u64>,
    slots: Slots,
}

impl FlatCache {
    /// Copies the kept positions of `view`, one ascending row per KV head, with room for `slack` more slots per head. The
    /// view may have any layout, and be compressed already.
    ///
    /// Errors: another number of heads, positions out of order or not held, more slots than memory; rows that are
    /// no multiple of 16 bytes, or that do not start at one.
    pub fn gather(
        cuda: &Cuda,
        view: &DeviceLayer<'_>,
        kept: &Ragged<Position>,
        slack: u32,
    ) -> Result<Self> {
        let chosen = Chosen::upload(cuda, &slots_of_view(view, kept)?)?;
        let capacity = with_slack(kept.lens(), slack)?;
        let cache = Self::new(cuda, view, capacity)?;
        cache.slots.fill_from(view, chosen.kept())?;
        Ok(cache)
    }

    /// Copies what a selection keeps of `view`, whose heads are its segments from `first` on, with room for `capacity[h]`
    /// slots of head `h`. Nothing is read back: how many slots each head keeps stays on the device. A head that
    /// keeps more than its capacity becomes empty, and [`Self::check`] is an error from then on.
    ///
    /// Errors: as [`Self::gather`]; segments that are not the view's heads.
    pub fn gather_selected(
        cuda: &Cuda,
        view: &DeviceLayer<'_>,
        selection: &Selection,
        first: usize,
        capacity: &[u32],
    ) -> Result<Self> {
        let kept = kept_of_view(view, selection, first, capacity)?;
        let cache = Self::new(cuda, view, capacity.to_vec())?;
        cache.slots.fill_from(view, kept)?;
        Ok(cache)
    }

    fn new(cuda: &Cuda, view: &DeviceLayer<'_>, capacity: Vec<u32>) -> Result<Self> {
        let of = (view.k().dtype(), view.k().dim() as u32);
        Self::empty(cuda, of, view.tokens(), capacity)
    }

    fn empty(cuda: &Cuda, of: (Dtype, u32), tokens: u32, capacity: Vec<u32>) -> Result<Self> {
        let row = row_bytes(of.0, of.1);
        let mut end = 0;
        let mut starts = Vec::with_capacity(capacity.len());
        for &n in &capacity {
            starts.push(end);
            end += u64::from(n);
        }
        let what = "rows of a cache";
        let bytes = usize::try_from(u128::from(end) * u128::from(row))
            .map_err(|_| Error::OutOfMemory { what, bytes: u64::MAX })?;
        let k = Memory::new(&cuda.driver, what, bytes)?;
        let v = Memory::new(&cuda.driver, what, bytes)?;
        let heads = |memory: &Memory| {
            let base = memory.at::<u8>(0).address;
            starts.iter().map(|start| HeadRows::strided(base + start * row, row as usize)).collect()
        };
        let places = Places { keys: heads(&k), values: heads(&v), pages: vec![] };
        let slots = Slots::new(cuda, of, tokens, capacity, &places)?;
        Ok(Self { k, v, starts, slots })
    }

    /// Thins the heads to `kept`, one ascending row per KV head, in place. Heads keep their first row: what is freed
    /// becomes slack ([`Self::repack`] gives it back). Reads positions back to find the slots.
    ///
    /// Errors: another number of heads, positions out of order or not held.
    pub fn compact(&mut self, kept: &Ragged<Position>, order: Order) -> Result<()> {
        self.slots.compact(kept, order)
    }

    /// Thins the heads to what a selection keeps of them, in place: head `h` is its segment `first + h`. Launches only.
    ///
    /// Errors: fewer segments than heads, segments longer than the heads' capacities.
    pub fn compact_selected(
        &mut self,
        selection: &Selection,
        first: usize,
        order: Order,
    ) -> Result<()> {
        self.slots.compact_selected(selection, first, order)
    }

    /// Moves everything to new buffers with room for `slack` more slots per head, and frees the old ones. Reads lengths
    /// back. Addresses change: graphs captured before are void.
    ///
    /// Errors: more slots than memory.
    pub fn repack(&mut self, slack: u32) -> Result<()> {
        let seen = self.slots.read()?;
        let capacity = with_slack(seen.lens.iter().map(|&n| n as usize), slack)?;
        let of = (self.slots.dtype, self.slots.dim);
        let mut packed = Self::empty(&self.slots.cuda, of, seen.tokens, capacity)?;
        packed.slots.take_all(&self.slots, seen.lens.iter().copied().max().unwrap_or(0))?;
        *self = packed;
        Ok(())
    }

    /// Appends `M` tokens: keys and values `[H, M, D]`, at positions `tokens .. tokens + M` of every head. Nothing waits;
    /// nothing is allocated or copied from the host if the new rows lie at fixed strides.
    ///
    /// Where a head has no room, or the sequence would grow to `2^31` tokens, no head takes them and
    /// [`Self::check`] is an error from then on.
    ///
    /// Errors: other heads, dims, lengths or dtype, rows that are not aligned to 16 bytes.
    pub fn append(
        &mut self,
        k: &Rows<'_, DeviceSlice<'_>>,
        v: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
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
    /// [`Self::attend_bytes`].
    pub fn attend<'a>(
        &self,
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: impl Into<Output<'a>>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.slots.over().attend(&[self.k(), self.v()], op, q, &out.into(), lse, workspace)
    }

    /// This cache as one of a [`Batch`](super::Batch).
    pub fn member(&self) -> Member<'_> {
        Member { slots: &self.slots, memory: [self.k(), self.v()] }
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
    /// slots in no order.
    pub fn recompress(
        &mut self,
        q: &Rows<'_, DeviceSlice<'_>>,
        with: &mut Recompression,
    ) -> Result<()> {
        self.slots.recompress(q, with)
    }

    /// Waits for the stream, and says whether anything found no room since the cache was made or repacked.
    ///
    /// Errors: [`CacheFull`](Error::CacheFull) with the head that has the least room and the tokens refused.
    pub fn check(&self) -> Result<()> {
        self.slots.check()
    }

    /// Waits for the stream, and reads back what the device knows: lengths, positions, tokens.
    pub fn read(&self) -> Result<Snapshot<'_>> {
        let (slots, seen, place) = (&self.slots, self.slots.read()?, Place::Flat(&self.starts));
        Ok(Snapshot { slots, seen, place, k: self.k(), v: self.v() })
    }

    /// All keys, `[Σ capacity, D]`; rows beyond a head's length are undefined.
    pub fn k(&self) -> DeviceSlice<'_> {
        self.slots.lend(&self.k)
    }
    /// All values, `[Σ capacity, D]`.
    pub fn v(&self) -> DeviceSlice<'_> {
        self.slots.lend(&self.v)
    }
    /// First row of each head.
    pub fn starts(&self) -> &[u64] {
        &self.starts
    }
    /// Slots of each head. Waits for the stream.
    pub fn lens(&self) -> Result<Vec<u32>> {
        self.slots.lens()
    }
    /// Slots reserved for each head.
    pub fn capacity(&self) -> &[u32] {
        &self.slots.capacity
    }
    /// Bytes of the key and value buffers, slack included.
    pub fn bytes_reserved(&self) -> u64 {
        (self.k.bytes() + self.v.bytes()) as u64
    }
}
