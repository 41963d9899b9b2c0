//! New tokens behind what a cache holds: launches `kernels/append.cu`.

use super::driver::Ptr;
use super::floats::Table;
use super::gather::{Held, Source, grid};
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads, aligned};
use super::{Cuda, DeviceSlice};
use crate::error::Result;
use crate::view::{Layout, Rows};

/// Two addresses and two strides each of keys and values, or a table and its pages; the cache; positions, lengths,
/// capacities, counters; tokens, units.
#[rustfmt::skip]
type Append = (
    u64, u64, i64, i64, i64, i64, Ptr<HeadRows>, Ptr<u32>,
    Ptr<HeadRows>, Ptr<HeadRows>, Ptr<u32>, Ptr<Ptr<u32>>, Ptr<u32>, Ptr<u32>, Ptr<u32>, u32, u32,
);
const APPEND: Kernel<Append> = Kernel::new("append", "append");

/// Address, strides, where to and how far apart; the same of another tensor; heads.
type Lend = (u64, i64, i64, Ptr<u8>, u32, u64, i64, i64, Ptr<u8>, u32, u32);
const LEND: Kernel<Lend> = Kernel::new("append", "lend");

/// Address, bytes from a head to the next, bytes from a row to the next.
pub(super) type Strided = (u64, i64, i64);

/// Rows at fixed strides as arguments; `None` if they are ragged or paged.
pub(super) fn strided(
    what: &'static str,
    rows: &Rows<'_, DeviceSlice<'_>>,
) -> Result<Option<Strided>> {
    let Layout::Strided { head_stride, row_stride, .. } = rows.layout() else { return Ok(None) };
    let bytes = |elements: usize| aligned(what, (elements * rows.dtype().size()) as u64);
    let base = aligned(what, rows.storage().address())?;
    Ok(Some((base, bytes(head_stride)? as i64, bytes(row_stride)? as i64)))
}

/// Writes `tokens` rows `[H, tokens, D]` behind each head, or none anywhere and counts them as refused. Rows at fixed
/// strides need no table, so nothing is allocated or copied for them.
pub(super) fn append(
    cuda: &Cuda,
    k: &Rows<'_, DeviceSlice<'_>>,
    v: &Rows<'_, DeviceSlice<'_>>,
    tokens: u32,
    cache: Held,
) -> Result<()> {
    let nowhere = (0, 0, 0);
    match (strided("new keys", k)?, strided("new values", v)?) {
        (Some(k), Some(v)) => launch(cuda, (k, v), (Ptr::NULL, Ptr::NULL), tokens, cache),
        _ => {
            let (mut heads, mut table) = (Heads::default(), Table::default());
            heads.push("new keys", k)?;
            heads.push("new values", v)?;
            let slots = heads.into_table(&mut table);
            let sent = table.send(cuda)?;
            let fresh = (sent.at(slots.rows), sent.at(slots.pages));
            launch(cuda, (nowhere, nowhere), fresh, tokens, cache)
        }
    }
}

fn launch(
    cuda: &Cuda,
    (k, v): (Strided, Strided),
    (fresh, pages): (Ptr<HeadRows>, Ptr<u32>),
    tokens: u32,
    cache: Held,
) -> Result<()> {
    let Source { keys, values, pages: to_pages, positions } = cache.rows;
    #[rustfmt::skip]
    let arguments = (
        k.0, v.0, k.1, k.2, v.1, v.2, fresh, pages,
        keys, values, to_pages, positions, cache.lengths, cache.capacities, cache.counters, tokens, cache.units,
    );
    APPEND.launch(&cuda.driver, "", grid(tokens, cache.heads, cache.units), arguments)
}

/// Describes rows at fixed strides on the device: a [`HeadRows`] of each head every `pitch` bytes from `to` on, of one
/// tensor or two. One launch.
pub(super) fn lend(
    cuda: &Cuda,
    heads: usize,
    (a, to, pitch): (Strided, Ptr<u8>, usize),
    other: Option<(Strided, Ptr<u8>, usize)>,
) -> Result<()> {
    let (b, other_to, other_pitch) = other.unwrap_or(((0, 0, 0), Ptr::NULL, 0));
    let (pitch, other_pitch) = (pitch as u32, other_pitch as u32);
    let arguments = (a.0, a.1, a.2, to, pitch, b.0, b.1, b.2, other_to, other_pitch, heads as u32);
    LEND.launch(&cuda.driver, "", Grid::new(heads.div_ceil(256), 1, 256), arguments)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&APPEND).into(), (&LEND).into()]
}
