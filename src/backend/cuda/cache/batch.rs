//! Several caches as one: attention of a whole batch in one launch more than that of a sequence, whatever its size.

use std::sync::Arc;

use super::super::driver::{Memory, Ptr};
use super::super::floats::{Sent, Slot, Table};
use super::super::rows::launch_pick;
use super::super::views::HeadRows;
use super::super::{Cuda, DeviceSlice, Floats, Output};
use super::attend::{Over, Workspace};
use super::slots::Slots;
use crate::backend::ops::Attend;
use crate::cache::slots::expect;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Rows;

/// A cache on loan to a [`Batch`].
#[derive(Clone, Copy)]
pub struct Member<'a> {
    pub(super) slots: &'a Slots,
    /// What keys and values lie in.
    pub(super) memory: [DeviceSlice<'a>; 2],
}

/// Tables of caches of one dtype and head dim, flat or paged: made once, used at every step while they grow, are thinned
/// and change pages.
pub struct Batch {
    cuda: Cuda,
    of: (Dtype, u32),
    bounds: Vec<u32>,
    /// Which caches: addresses alone could be those of others by now.
    tags: Vec<Arc<()>>,
    sent: Sent,
    keys: Slot<HeadRows>,
    values: Slot<HeadRows>,
    /// Lengths of all heads side by side, and how they come there.
    lengths: Memory,
    picks: Picks,
}

/// Words that go from each cache's lengths to those of the batch.
struct Picks {
    to: Slot<u64>,
    counts: Slot<u32>,
    from: Slot<u64>,
    slots: Slot<u32>,
    starts: Slot<u64>,
    longest: u32,
}

impl Batch {
    /// The tables of these caches, in this order. Waits for the stream.
    ///
    /// Errors: no cache; caches of different dtypes or head dims.
    pub fn new(members: &[Member<'_>]) -> Result<Self> {
        let Some(first) = members.first() else {
            return Err(Error::Zero { what: "caches of a batch" });
        };
        let (cuda, dtype, dim) = (first.slots.cuda.clone(), first.slots.dtype, first.slots.dim);
        let (mut keys, mut values, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
        let (mut starts, mut counts, mut from) = (Vec::new(), Vec::new(), Vec::new());
        for Member { slots, .. } in members {
            if slots.dtype != dtype {
                let (what, got) = ("caches of a batch", slots.dtype);
                return Err(Error::Dtype { what, expected: dtype, got });
            }
            expect("head dim of a batch", dim as usize, slots.dim as usize)?;
            starts.push(bounds.len());
            bounds.extend_from_slice(&slots.bounds);
            counts.push(slots.bounds.len() as u32);
            from.push(slots.held().lengths.address);
            let [k, v] = slots.places()?;
            keys.extend(k);
            values.extend(v);
        }
        let lengths =
            Memory::new(&cuda.driver, "lengths of a batch", size_of_val(bounds.as_slice()))?;
        let to: Vec<u64> = starts.iter().map(|&s| lengths.at::<u32>(s * 4).address).collect();
        let longest = counts.iter().copied().max().unwrap_or(0);
        let mut table = Table::default();
        let picks = Picks {
            to: table.push(&to),
            counts: table.push(&counts),
            from: table.push(&from),
            slots: table.push(&(0..longest).collect::<Vec<_>>()),
            starts: table.push(&vec![0u64; members.len()]),
            longest,
        };
        let (keys, values) = (table.push(&keys), table.push(&values));
        let tags = members.iter().map(|member| Arc::clone(&member.slots.tag)).collect();
        let sent = table.send(&cuda)?;
        Ok(Self { cuda, of: (dtype, dim), bounds, tags, sent, keys, values, lengths, picks })
    }

    fn over(&self) -> Over<'_> {
        Over {
            cuda: &self.cuda,
            of: self.of,
            bounds: &self.bounds,
            keys: self.sent.at(self.keys),
            values: self.sent.at(self.values),
            // Tables count from address zero.
            pages: Ptr::NULL,
            lengths: self.lengths.at(0),
        }
    }

    /// Bytes of workspace that [`Self::attend`] needs for `tokens` queries of each of `query_heads` heads of all sequences.
    ///
    /// Errors: query heads that are no positive multiple of the caches' heads.
    pub fn attend_bytes(&self, query_heads: usize, tokens: u32) -> Result<usize> {
        self.over().bytes(query_heads, tokens)
    }

    /// Attention of queries `[B, Hq, M, D]`, at fixed strides as rows of `B * Hq` heads, over what the caches hold when the
    /// stream gets there. Otherwise as [`FlatCache::attend`](super::FlatCache::attend).
    ///
    /// Errors: the same; other caches than the batch was made of, or in another order, or repacked since.
    pub fn attend<'a>(
        &self,
        members: &[Member<'_>],
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: impl Into<Output<'a>>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let same = |(member, tag): (&Member<'_>, &Arc<()>)| Arc::ptr_eq(&member.slots.tag, tag);
        if members.len() != self.tags.len() || !members.iter().zip(&self.tags).all(same) {
            let why = "it was made of other caches, or before one of them was repacked";
            return Err(Error::Unsupported { what: "batch", why });
        }
        let Picks { to, counts, from, slots, starts, longest } = &self.picks;
        let sent = &self.sent;
        // Lengths are moved as the words they are.
        let rows = |slot: &Slot<u64>| Ptr::at(sent.at(*slot).address);
        let arguments = (rows(to), sent.at(*counts), rows(from), sent.at(*slots), sent.at(*starts));
        launch_pick(&self.cuda, *longest, members.len(), arguments)?;
        let memory: Vec<DeviceSlice<'_>> = members.iter().flat_map(|of| of.memory).collect();
        self.over().attend(&memory, op, q, &out.into(), lse, workspace)
    }
}
