//! Counting during one launch, and what only counting needs: the set of sectors touched so far.
//!
//! It runs at every instruction, so the commonest patterns (full masks, consecutive elements) have short paths.

use std::collections::HashMap;

use super::{Counters, Instructions, KINDS, Kind, Words};

/// Bytes of a sector, the unit in which memory moves.
const SECTOR: u64 = 32;

/// Counts during one launch. Masks name the lanes that execute; addresses of other lanes are not looked at. Accesses
/// are aligned (the memory checks come first), so none crosses a sector.
#[derive(Default)]
pub(crate) struct Meter {
    counters: Counters,
    warp: [u64; KINDS],
    thread: [u64; KINDS],
    footprint: Footprint,
}

impl Meter {
    /// The shape of the launch.
    pub(crate) fn launch(&mut self, blocks: u64, threads_per_block: u64, shared_per_block: u64) {
        self.counters.blocks += blocks;
        self.counters.threads += blocks * threads_per_block;
        self.counters.shared_bytes += blocks * shared_per_block;
    }

    /// One warp instruction. Every instruction passes here; those below are counted by what they do as well.
    #[inline]
    pub(crate) fn instruction(&mut self, kind: Kind, mask: u32) {
        self.warp[kind as usize] += 1;
        // Counting bits is slow on the baseline target, and most masks are full.
        let lanes = if mask == u32::MAX { 32 } else { mask.count_ones() };
        self.thread[kind as usize] += u64::from(lanes);
    }

    /// A load from or store to global memory of `width` bytes per lane.
    pub(crate) fn global(&mut self, write: bool, mask: u32, addresses: &[u64; 32], width: u32) {
        let (bytes, sectors);
        if contiguous(mask, addresses, width) {
            bytes = 32 * u64::from(width);
            sectors = self.footprint.touch_range(addresses[0], bytes, write);
        } else {
            let mut keys = Keys::of(mask, addresses);
            bytes = keys.distinct() * u64::from(width);
            sectors = self.footprint.touch(keys.get(), write);
        }
        let count =
            if write { &mut self.counters.global_store } else { &mut self.counters.global_load };
        count.requests += 1;
        count.sectors += sectors;
        count.bytes += bytes;
        count.ideal_sectors += bytes.div_ceil(SECTOR);
    }

    /// A load from or store to shared memory of `width` bytes per lane.
    pub(crate) fn shared(&mut self, write: bool, mask: u32, addresses: &[u64; 32], width: u32) {
        let unit = u64::from(width.max(4));
        let group = (128 / unit) as u32;
        let count =
            if write { &mut self.counters.shared_store } else { &mut self.counters.shared_load };
        count.requests += 1;
        if contiguous(mask, addresses, width) {
            count.wavefronts += u64::from(32 / group);
            count.ideal_wavefronts += u64::from(32 / group);
            return;
        }
        for first in (0..32).step_by(group as usize) {
            let lanes = mask & ((u32::MAX >> (32 - group)) << first);
            if lanes != 0 {
                count.wavefronts += Keys::of(lanes, addresses).wavefronts(unit);
                count.ideal_wavefronts += 1;
            }
        }
    }

    /// `ldmatrix`: 8 row addresses of 16 bytes per matrix, one pass each if they meet no bank twice.
    pub(crate) fn ldmatrix(&mut self, rows: &[u64]) {
        let count = &mut self.counters.shared_load;
        count.requests += 1;
        for phase in rows.chunks(8) {
            count.wavefronts += Keys::from_slice(phase).wavefronts(16);
            count.ideal_wavefronts += 1;
        }
    }

    /// `atom` or `red` of `width` bytes per lane.
    pub(crate) fn atomic(&mut self, global: bool, mask: u32, addresses: &[u64; 32], width: u32) {
        debug_assert!(width.is_power_of_two() && width <= 16);
        let mut keys = Keys::of(mask, addresses);
        let serial = keys.multiplicity();
        let count = if global {
            self.footprint.touch(keys.get(), false);
            self.counters.global_atomic.sectors += self.footprint.touch(keys.get(), true);
            &mut self.counters.global_atomic
        } else {
            &mut self.counters.shared_atomic
        };
        count.requests += 1;
        count.serial += serial;
    }

    /// `cp.async`: a load from global memory of the lanes in `read` (those whose source size is not zero) and a store
    /// to shared memory of the lanes in `mask`, without a register between them.
    pub(crate) fn cp_async(
        &mut self,
        mask: u32,
        read: u32,
        global: &[u64; 32],
        shared: &[u64; 32],
        width: u32,
    ) {
        self.counters.cp_async += 1;
        if read != 0 {
            self.global(false, read, global, width);
        }
        self.shared(true, mask, shared, width);
    }

    /// A warp arrived at a barrier of its block.
    pub(crate) fn barrier(&mut self) {
        self.counters.barriers += 1;
    }

    /// A branch parted a warp.
    pub(crate) fn divergence(&mut self) {
        self.counters.divergent_branches += 1;
    }

    /// A matrix multiplication by a warp.
    pub(crate) fn mma(&mut self, flops: u64) {
        self.counters.mma += 1;
        self.counters.mma_flops += flops;
    }

    /// The counts.
    pub(crate) fn finish(mut self) -> Counters {
        let by_kind = |counts: [u64; KINDS]| {
            let words = std::iter::once(counts.iter().sum()).chain(counts);
            Instructions::take(&mut { words }).expect("a total, then a word per kind")
        };
        self.counters.warp_instructions = by_kind(self.warp);
        self.counters.thread_instructions = by_kind(self.thread);
        self.counters.dram_read_sectors = self.footprint.read;
        self.counters.dram_write_sectors = self.footprint.written;
        self.counters
    }
}

/// Whether 32 lanes access consecutive elements, the commonest pattern by far.
#[inline]
fn contiguous(mask: u32, addresses: &[u64; 32], width: u32) -> bool {
    let (mut off, mut expected) = (0, addresses[0]);
    for address in addresses {
        off |= address ^ expected;
        expected = expected.wrapping_add(u64::from(width));
    }
    mask == u32::MAX && off == 0
}

/// Up to 32 addresses, in the order of lanes until [`Keys::distinct`].
struct Keys {
    keys: [u64; 32],
    len: usize,
}

impl Keys {
    #[inline]
    fn of(mask: u32, addresses: &[u64; 32]) -> Self {
        if mask == u32::MAX {
            return Self { keys: *addresses, len: 32 };
        }
        let mut keys = [0; 32];
        let (mut len, mut rest) = (0, mask);
        while rest != 0 {
            keys[len] = addresses[rest.trailing_zeros() as usize];
            len += 1;
            rest &= rest - 1;
        }
        Self { keys, len }
    }

    fn from_slice(addresses: &[u64]) -> Self {
        let mut keys = [0; 32];
        keys[..addresses.len()].copy_from_slice(addresses);
        Self { keys, len: addresses.len() }
    }

    fn get(&self) -> &[u64] {
        &self.keys[..self.len]
    }

    /// `unit` is a power of two.
    #[inline]
    fn divide(&mut self, unit: u64) {
        let shift = unit.trailing_zeros();
        self.keys.iter_mut().for_each(|key| *key >>= shift);
    }

    /// Sorts, unless in order already, as most accesses are.
    #[inline]
    fn sort(&mut self) {
        let keys = &mut self.keys[..self.len];
        if !keys.is_sorted() {
            keys.sort_unstable();
        }
    }

    /// Drops repetitions; returns how many are left.
    fn distinct(&mut self) -> u64 {
        self.sort();
        let (mut len, mut last) = (0, None);
        for i in 0..self.len {
            let key = self.keys[i];
            self.keys[len] = key;
            len += usize::from(last != Some(key));
            last = Some(key);
        }
        self.len = len;
        len as u64
    }

    /// How often the most frequent key occurs.
    fn multiplicity(&mut self) -> u64 {
        self.sort();
        self.get().chunk_by(|a, b| a == b).map(<[u64]>::len).max().unwrap_or(0) as u64
    }

    /// Passes through the banks when each key is an access of `unit` bytes: all banks together hold `128 / unit`.
    fn wavefronts(mut self, unit: u64) -> u64 {
        self.divide(unit);
        let mask = 128 / unit - 1;
        let bank = |key: &u64| (key & mask) as u32 & 31;
        // Usually every lane has a bank of its own.
        let met = self.get().iter().fold(0u32, |met, key| met | 1u32.wrapping_shl(bank(key)));
        if met.count_ones() as usize == self.len {
            return 1;
        }
        self.distinct();
        let mut words = [0u8; 32];
        for key in self.get() {
            words[bank(key) as usize] += 1;
        }
        u64::from(words.into_iter().max().unwrap_or(0))
    }
}

/// The sectors touched so far, as two bits per sector in pages of 64 KiB.
#[derive(Default)]
struct Footprint {
    read: u64,
    written: u64,
    pages: Vec<Page>,
    index: HashMap<u64, usize>,
    /// The last page number and its index for each value of the page number's low bits, to spare most lookups.
    recent: Vec<(u64, usize)>,
}

#[derive(Clone, Copy)]
struct Page {
    read: [u64; 32],
    written: [u64; 32],
}

const RECENT: u64 = 256;

impl Footprint {
    /// Touches the sectors of ascending addresses; returns how many they are.
    fn touch(&mut self, addresses: &[u64], write: bool) -> u64 {
        let (mut sectors, mut word, mut bits) = (0, 0, 0);
        for address in addresses {
            let sector = address / SECTOR;
            if sector / 64 != word {
                sectors += self.touch_word(word, bits, write);
                (word, bits) = (sector / 64, 0);
            }
            bits |= 1 << (sector % 64);
        }
        sectors + self.touch_word(word, bits, write)
    }

    /// The same for a run of at most 64 sectors of bytes.
    fn touch_range(&mut self, address: u64, bytes: u64, write: bool) -> u64 {
        let (first, last) = (address / SECTOR, (address + bytes - 1) / SECTOR);
        let (from, to) = (u64::MAX << (first % 64), u64::MAX >> (63 - last % 64));
        if first / 64 == last / 64 {
            return self.touch_word(first / 64, from & to, write);
        }
        self.touch_word(first / 64, from, write) + self.touch_word(last / 64, to, write)
    }

    /// Touches sectors `64 * word + i` for the bits `i`; returns how many they are.
    #[inline]
    fn touch_word(&mut self, word: u64, bits: u64, write: bool) -> u64 {
        if bits != 0 {
            let page = self.page(word / 32);
            let (read, written) =
                (&mut page.read[word as usize % 32], &mut page.written[word as usize % 32]);
            if write {
                let new = bits & !*written;
                *written |= bits;
                self.written += u64::from(new.count_ones());
            } else {
                let new = bits & !(*read | *written);
                *read |= bits;
                self.read += u64::from(new.count_ones());
            }
        }
        u64::from(bits.count_ones())
    }

    #[inline]
    fn page(&mut self, number: u64) -> &mut Page {
        if self.recent.is_empty() {
            self.recent = vec![(u64::MAX, 0); RECENT as usize];
        }
        let recent = &mut self.recent[(number % RECENT) as usize];
        if recent.0 != number {
            let pages = &mut self.pages;
            let index = *self.index.entry(number).or_insert_with(|| {
                pages.push(Page { read: [0; 32], written: [0; 32] });
                pages.len() - 1
            });
            *recent = (number, index);
        }
        &mut self.pages[recent.1]
    }
}
