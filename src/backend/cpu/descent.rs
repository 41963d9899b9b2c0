//! Radix descent: the largest key such that the keys at or above it, by row, still satisfy a monotone test.
//!
//! A row's keys are never written down: each pass converts a block of scores into L1, which takes a few
//! vector instructions where storing them would take memory bandwidth. The first digit costs a pass over all scores;
//! only the keys that share it are written, as long as they differ, and the other digits are found among them.
//! A histogram has bins and sums of bins, so that few of either are looked at, however many rows there are.

use std::ops::Range;

use rayon::prelude::*;

use super::tile::{self, Arithmetic, BLOCK, Isa, Kept, Kernel, LANES};

/// Bits of the digits, most significant first: `(shift, bits)`.
pub(super) const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
pub(super) const BINS: usize = 1 << 11;
/// Bins of a sum, and sums of a histogram.
const GROUP: usize = 64;
const GROUPS: usize = BINS / GROUP;

/// The key of protected slots, which no float maps to.
const PROTECTED: u32 = u32::MAX;

/// Keys of a task: fewer cost less than waking a thread.
const TASK: usize = 16 << 10;

/// Rows of a task, so that it has enough keys.
pub(super) fn rows_per_task(rows: &[impl Row]) -> usize {
    let keys: usize = rows.iter().map(Row::len).sum();
    (TASK * rows.len()).div_ceil(keys.max(1)).max(1)
}

/// Keys of some row.
pub(super) trait Row {
    fn len(&self) -> usize;
}

/// Order-preserving key of a score: NaN is 0, -∞ follows, -0 = +0.
#[inline(always)]
pub(super) fn key(score: f32) -> u32 {
    // Adding zero turns -0 into +0.
    let bits = (score + 0.0).to_bits();
    let key = bits ^ (((bits as i32) >> 31) as u32 | 1 << 31);
    if score.is_nan() { 0 } else { key }
}

/// The scores of one row, and the slots that come before all others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment<'a> {
    pub(super) scores: &'a [f32],
    pub(super) protected: &'a [Range<u32>],
}

impl Segment<'_> {
    /// Calls `work` with the first slot and the keys of each block.
    #[inline(always)]
    pub(super) fn blocks(&self, mut work: impl FnMut(usize, &[u32])) {
        let mut block = [0; BLOCK];
        let mut protected = self.protected;
        for (i, scores) in self.scores.chunks(BLOCK).enumerate() {
            let (first, keys) = (i * BLOCK, &mut block[..scores.len()]);
            keys.iter_mut().zip(scores).for_each(|(k, &x)| *k = key(x));
            while let Some((range, later)) = protected.split_first() {
                let inside = |slot: u32| (slot as usize).clamp(first, first + scores.len()) - first;
                keys[inside(range.start)..inside(range.end)].fill(PROTECTED);
                if range.end as usize > first + scores.len() {
                    break;
                }
                protected = later;
            }
            work(first, keys);
        }
    }
}

/// The keys of a row that share the digits found so far.
enum Keys<'a> {
    All(Segment<'a>),
    Some(Vec<u32>),
    /// So many times the same.
    Same(u32, usize),
}

impl Row for Segment<'_> {
    fn len(&self) -> usize {
        self.scores.len()
    }
}

impl Row for Keys<'_> {
    fn len(&self) -> usize {
        match self {
            Keys::All(segment) => segment.scores.len(),
            Keys::Some(keys) => keys.len(),
            &Keys::Same(_, count) => count,
        }
    }
}

/// How many keys have each digit, and sums of [`GROUP`] bins.
#[derive(Clone)]
struct Histogram {
    bins: [u32; BINS],
    groups: [u32; GROUPS],
}

/// Finds the cut of some rows. Public fields are what [`Self::run`] leaves.
pub(super) struct Descent<'a> {
    rows: Vec<Keys<'a>>,
    /// Keys above the cut, by row.
    pub(super) above: Vec<u64>,
    /// Keys equal to the cut, by row.
    pub(super) equal: Vec<u64>,
    pub(super) cut: u32,
    isa: Isa,
}

impl<'a> Descent<'a> {
    pub(super) fn new(isa: Isa, rows: &[Segment<'a>]) -> Self {
        let rows: Vec<_> = rows.iter().copied().map(Keys::All).collect();
        let zeros = vec![0; rows.len()];
        Self { rows, above: zeros.clone(), equal: zeros, cut: 0, isa }
    }

    /// `reached` must hold for the counts of all keys, and keep holding as counts grow.
    pub(super) fn run(&mut self, reached: impl Fn(&[u64]) -> bool) {
        let isa = self.isa;
        let mut histograms =
            vec![Histogram { bins: [0; BINS], groups: [0; GROUPS] }; self.rows.len()];
        for (shift, _) in DIGITS {
            let least = rows_per_task(&self.rows);
            let rows = self.rows.par_iter().zip(&mut histograms).with_min_len(least);
            rows.for_each(|(keys, out)| isa.run(Count { keys, shift, out }));

            let group = self.step(GROUPS, |row, group| histograms[row].groups[group], &reached);
            let bin = |i: usize| group * GROUP + i;
            let digit = bin(self.step(GROUP, |row, i| histograms[row].bins[bin(i)], &reached));
            self.cut |= (digit as u32) << shift;
            self.equal.iter_mut().zip(&histograms).for_each(|(n, h)| *n = h.bins[digit].into());
            if shift == 0 {
                break;
            }
            let range = (self.cut, (1 << shift) - 1);
            let rows = self.rows.par_iter_mut().zip(&self.equal).with_min_len(least);
            rows.for_each(|(keys, &count)| keys.narrow(isa, range, count as usize));
        }
    }

    /// The highest of `n` edges at which the test holds; [`Self::above`] becomes the counts above the next.
    fn step(
        &mut self,
        n: usize,
        count: impl Fn(usize, usize) -> u32,
        reached: impl Fn(&[u64]) -> bool,
    ) -> usize {
        let mut counts = self.above.clone();
        for edge in (0..n).rev() {
            counts.iter_mut().enumerate().for_each(|(row, c)| *c += u64::from(count(row, edge)));
            // All keys reach; at the lowest edge nothing else is left.
            if edge == 0 || reached(&counts) {
                return edge;
            }
            self.above.copy_from_slice(&counts);
        }
        0
    }
}

impl Keys<'_> {
    /// Keeps the `count` keys in a range.
    fn narrow(&mut self, isa: Isa, range: (u32, u32), count: usize) {
        if count < self.len() {
            *self = Keys::Some(self.among(isa, range, count));
        }
        if let Some(key) = self.only(isa) {
            *self = Keys::Same(key, count);
        }
    }

    /// The `count` keys in a range.
    fn among(&self, isa: Isa, range: (u32, u32), count: usize) -> Vec<u32> {
        let mut found = Vec::with_capacity(count);
        let mut kept: Kept = [0; BLOCK + LANES];
        let mut take = |keys: &[u32]| {
            let n = tile::compress(isa, keys, range, keys, &mut kept);
            found.extend_from_slice(&kept[..n]);
        };
        match self {
            Keys::All(segment) => isa.run(Blocks(segment, |_, keys: &[u32]| take(keys))),
            Keys::Some(keys) => keys.chunks(BLOCK).for_each(take),
            Keys::Same(..) => {}
        }
        found
    }

    /// The key that all are.
    fn only(&self, isa: Isa) -> Option<u32> {
        match self {
            // Protected slots have another key than scores.
            Keys::All(row) if row.protected.iter().all(Range::is_empty) => {
                isa.run(Only(row.scores.iter().map(|&x| key(x))))
            }
            Keys::All(_) => None,
            Keys::Some(keys) => isa.run(Only(keys.iter().copied())),
            &Keys::Same(key, _) => Some(key),
        }
    }
}

/// The key that all are.
struct Only<I>(I);

impl<I: Iterator<Item = u32>> Kernel for Only<I> {
    type Output = Option<u32>;
    #[inline(always)]
    fn run<A: Arithmetic>(mut self) -> Option<u32> {
        let first = self.0.next()?;
        let differ = self.0.fold(0, |differ, key| differ | (key ^ first));
        (differ == 0).then_some(first)
    }
}

/// Goes through the blocks of a row with the machine's best instructions.
pub(super) struct Blocks<'a, F>(pub(super) &'a Segment<'a>, pub(super) F);

impl<F: FnMut(usize, &[u32])> Kernel for Blocks<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        self.0.blocks(self.1);
    }
}

/// Fills a histogram.
struct Count<'a, 'b> {
    keys: &'a Keys<'b>,
    shift: u32,
    out: &'a mut Histogram,
}

impl Kernel for Count<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        // Constants, so that the shifts are.
        match self.shift {
            21 => self.count::<21, 11>(),
            10 => self.count::<10, 11>(),
            _ => self.count::<0, 10>(),
        }
    }
}

/// Bins of one copy. The distance is no multiple of 4 KB, or loads would wait for stores to the same bin of another copy.
type Copy = [u32; BINS + LANES];

impl Count<'_, '_> {
    #[inline(always)]
    fn count<const SHIFT: u32, const BITS: u32>(self) {
        let Histogram { bins, groups } = self.out;
        match self.keys {
            &Keys::Same(key, count) => {
                bins.fill(0);
                bins[digit::<SHIFT, BITS>(key)] = count as u32;
            }
            Keys::Some(keys) if keys.len() < 2 * BINS => {
                bins.fill(0);
                keys.iter().for_each(|&k| bins[digit::<SHIFT, BITS>(k)] += 1);
            }
            keys => {
                let mut copies: [Copy; 4] = [[0; BINS + LANES]; 4];
                match keys {
                    Keys::All(row) => row.blocks(|_, k| count::<SHIFT, BITS>(k, &mut copies)),
                    Keys::Some(keys) => count::<SHIFT, BITS>(keys, &mut copies),
                    Keys::Same(..) => {}
                }
                let [a, b, c, d] = &copies;
                for (i, bin) in bins.iter_mut().enumerate() {
                    *bin = a[i] + b[i] + c[i] + d[i];
                }
            }
        }
        for (sum, bins) in groups.iter_mut().zip(bins.as_chunks::<GROUP>().0) {
            *sum = bins.iter().sum();
        }
    }
}

#[inline(always)]
fn digit<const SHIFT: u32, const BITS: u32>(key: u32) -> usize {
    (key >> SHIFT) as usize & ((1 << BITS) - 1) & (BINS - 1)
}

/// Counts digits, by turns in one of four copies: equal keys would wait for each other's counter.
#[inline(always)]
fn count<const SHIFT: u32, const BITS: u32>(keys: &[u32], [a, b, c, d]: &mut [Copy; 4]) {
    let (chunks, rest) = keys.as_chunks();
    for &[k, l, m, n] in chunks {
        a[digit::<SHIFT, BITS>(k)] += 1;
        b[digit::<SHIFT, BITS>(l)] += 1;
        c[digit::<SHIFT, BITS>(m)] += 1;
        d[digit::<SHIFT, BITS>(n)] += 1;
    }
    rest.iter().for_each(|&k| a[digit::<SHIFT, BITS>(k)] += 1);
}
