//! Compaction: launches `kernels/gather.cu` and `kernels/compact.cu`.

use super::Cuda;
use super::driver::{Memory, Ptr};
use super::launch::{Grid, Kernel};
use super::selection::Cut;
use super::views::HeadRows;
use crate::error::{Error, Result};

type Keys = Ptr<HeadRows>;
type Values = Ptr<HeadRows>;
type Pages = Ptr<u32>;
type Positions = Ptr<Ptr<u32>>;
type Cuts = Ptr<Cut>;
type Slots = Ptr<u32>;

/// Source, target, cuts, kept slots, counts, capacities, lengths, refused, NaN scores, units.
#[rustfmt::skip]
type Gather = (
    Keys, Values, Pages, Positions, Keys, Values, Pages, Positions, Cuts, Slots,
    Ptr<u32>, Ptr<u32>, Ptr<u32>, Ptr<u32>, Ptr<u32>, u32,
);
const GATHER: Kernel<Gather> = Kernel::new("gather", "gather");
/// Cache, cuts, kept slots, lengths, NaN scores, states, units.
#[rustfmt::skip]
type Slide = (Keys, Values, Pages, Positions, Cuts, Slots, Ptr<u32>, Ptr<u32>, Ptr<u32>, u32);
const SLIDE: Kernel<Slide> = Kernel::new("compact", "slide");
/// Cache, cuts, kept slots, lengths, NaN scores, units.
const FILL: Kernel<(Keys, Values, Pages, Positions, Cuts, Slots, Ptr<u32>, Ptr<u32>, u32)> =
    Kernel::new("compact", "fill");

const THREADS: u32 = 256;
/// Rows that a thread copies.
const PER_THREAD: u32 = 4;

/// Rows of all heads on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub keys: Ptr<HeadRows>,
    pub values: Ptr<HeadRows>,
    /// Page tables of keys and values.
    pub pages: Ptr<u32>,
    /// Positions of each head's slots; null if a slot is its position.
    pub positions: Ptr<Ptr<u32>>,
}

/// A cache on the device: what kernels read and write of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub rows: Source,
    pub lengths: Ptr<u32>,
    pub capacities: Ptr<u32>,
    /// Tokens seen, tokens or rows refused, blocks arrived, as `kernels/append.cu` has them; scores of NaN.
    pub counters: Ptr<u32>,
    pub heads: usize,
    /// Sixteenths of a row's bytes.
    pub units: u32,
}

pub(super) const SEEN: usize = 0;
pub(super) const REFUSED: usize = 1;
pub(super) const NAN: usize = 3;
pub(super) const COUNTERS: usize = 4;

/// Slots to keep, on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    /// Of each head, its part of `slots`; null for the first `counts`.
    pub cuts: Ptr<Cut>,
    /// Ascending in each part.
    pub slots: Ptr<u32>,
    pub counts: Ptr<u32>,
    /// The host's upper bound of what a head keeps.
    pub most: u32,
}

/// Units of 16 bytes in a row, as many as a block has threads at most.
pub(super) fn units(row_bytes: u64) -> Result<u32> {
    let (what, limit) = ("bytes of a row of keys or values on CUDA", u64::from(THREADS) * 16);
    match super::views::aligned("rows of a cache", row_bytes)? {
        got if got > limit => Err(Error::TooLarge { what, got, limit }),
        got => Ok(got as u32 / 16),
    }
}

/// Blocks that copy `rows` rows of a head.
pub(super) fn grid(rows: u32, heads: usize, units: u32) -> Grid {
    Grid::new(rows.div_ceil(PER_THREAD * (THREADS / units)).max(1) as usize, heads, THREADS)
}

/// Bytes that [`slide`] needs for heads of so many kept slots at most.
pub(super) fn slide_bytes(most: u32, heads: usize, units: u32) -> usize {
    let (tiles, ..) = grid(most, heads, units).blocks;
    heads * (tiles as usize + 1) * size_of::<u32>()
}

/// Fills a new cache with the kept slots of `from`. A head that keeps more than its capacity becomes empty.
pub(super) fn gather(cuda: &Cuda, from: Source, to: Held, kept: Kept) -> Result<()> {
    let arguments = (
        from.keys,
        from.values,
        from.pages,
        from.positions,
        to.rows.keys,
        to.rows.values,
        to.rows.pages,
        to.rows.positions,
        kept.cuts,
        kept.slots,
        kept.counts,
        to.capacities,
        to.lengths,
        to.counters.add(REFUSED),
        to.counters.add(NAN),
        to.units,
    );
    GATHER.launch(&cuda.driver, "", grid(kept.most, to.heads, to.units), arguments)
}

/// Thins a cache in place; slots keep their order. `states` holds [`slide_bytes`].
pub(super) fn slide(cuda: &Cuda, cache: Held, kept: Kept, states: &Memory) -> Result<()> {
    states.clear(0, slide_bytes(kept.most, cache.heads, cache.units))?;
    let Source { keys, values, pages, positions } = cache.rows;
    let (lengths, nan, states) = (cache.lengths, cache.counters.add(NAN), states.at(0));
    let Kept { cuts, slots, .. } = kept;
    let units = cache.units;
    let arguments = (keys, values, pages, positions, cuts, slots, lengths, nan, states, units);
    SLIDE.launch(&cuda.driver, "", grid(kept.most, cache.heads, units), arguments)
}

/// Thins a cache in place; the last rows go where slots became free.
pub(super) fn fill(cuda: &Cuda, cache: Held, kept: Kept) -> Result<()> {
    let Source { keys, values, pages, positions } = cache.rows;
    let (lengths, nan, units) = (cache.lengths, cache.counters.add(NAN), cache.units);
    let Kept { cuts, slots, .. } = kept;
    let arguments = (keys, values, pages, positions, cuts, slots, lengths, nan, units);
    FILL.launch(&cuda.driver, "", grid(kept.most, cache.heads, units), arguments)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&GATHER).into(), (&SLIDE).into(), (&FILL).into()]
}
