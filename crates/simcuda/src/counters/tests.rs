//! Access patterns whose counts were worked out by hand.

use super::*;

fn lanes(f: impl Fn(u64) -> u64) -> [u64; 32] {
    std::array::from_fn(|lane| f(lane as u64))
}

/// Requests, sectors, distinct bytes and ideal sectors of one load.
fn global(mask: u32, width: u32, f: impl Fn(u64) -> u64) -> [u64; 4] {
    let mut meter = Meter::default();
    meter.global(false, mask, &lanes(f), width);
    let count = meter.finish().global_load;
    [count.requests, count.sectors, count.bytes, count.ideal_sectors]
}

/// Wavefronts and ideal wavefronts of one store.
fn shared(mask: u32, width: u32, f: impl Fn(u64) -> u64) -> [u64; 2] {
    let mut meter = Meter::default();
    meter.shared(true, mask, &lanes(f), width);
    let count = meter.finish().shared_store;
    assert_eq!(count.requests, 1);
    [count.wavefronts, count.ideal_wavefronts]
}

fn ldmatrix(f: impl Fn(u64) -> u64) -> [u64; 2] {
    let mut meter = Meter::default();
    meter.ldmatrix(&lanes(f));
    let count = meter.finish().shared_load;
    assert_eq!(count.requests, 1);
    [count.wavefronts, count.ideal_wavefronts]
}

const ALL: u32 = u32::MAX;
const BASE: u64 = 0x7_0000_0000;

#[test]
fn coalesced_accesses_move_what_they_use() {
    assert_eq!(global(ALL, 1, |l| BASE + l), [1, 1, 32, 1]);
    assert_eq!(global(ALL, 2, |l| BASE + 2 * l), [1, 2, 64, 2]);
    assert_eq!(global(ALL, 4, |l| BASE + 4 * l), [1, 4, 128, 4]);
    assert_eq!(global(ALL, 8, |l| BASE + 8 * l), [1, 8, 256, 8]);
    assert_eq!(global(ALL, 16, |l| BASE + 16 * l), [1, 16, 512, 16]);
    assert_eq!(global(ALL, 4, |l| BASE + 4 * (31 - l)), [1, 4, 128, 4], "any order");
    assert_eq!(global(ALL, 4, |l| BASE + 4 * (l ^ 5)), [1, 4, 128, 4], "any order");
}

#[test]
fn strides_and_shifts_cost_sectors() {
    assert_eq!(global(ALL, 4, |l| BASE + 8 * l), [1, 8, 128, 4], "stride 2");
    assert_eq!(global(ALL, 4, |l| BASE + 32 * l), [1, 32, 128, 4], "a sector per lane");
    assert_eq!(global(ALL, 4, |l| BASE + 4 + 4 * l), [1, 5, 128, 4], "one word off");
    assert_eq!(global(ALL, 16, |l| BASE + 16 + 16 * l), [1, 17, 512, 16], "half a sector off");
    assert_eq!(global(ALL, 4, |_| BASE), [1, 1, 4, 1], "broadcast");
    assert_eq!(global(ALL, 4, |l| BASE + 4 * (l / 8)), [1, 1, 16, 1], "four words");
    assert_eq!(global(0x8000_0001, 4, |l| BASE + 4 * l), [1, 2, 8, 1], "only active lanes");
    assert_eq!(global(1 << 9, 16, |l| BASE + 16 * l), [1, 1, 16, 1]);
}

#[test]
fn shared_words_meet_in_banks() {
    assert_eq!(shared(ALL, 4, |l| 4 * l), [1, 1]);
    assert_eq!(shared(ALL, 4, |l| 4 * (31 - l)), [1, 1]);
    assert_eq!(shared(ALL, 4, |_| 64), [1, 1], "broadcast");
    assert_eq!(shared(ALL, 4, |l| 4 * (l / 2)), [1, 1], "pairs share words");
    assert_eq!(shared(ALL, 4, |l| 8 * l), [2, 1], "stride 2");
    assert_eq!(shared(ALL, 4, |l| 12 * l), [1, 1], "an odd stride");
    assert_eq!(shared(ALL, 4, |l| 128 * l), [32, 1], "a column");
    assert_eq!(shared(ALL, 4, |l| 132 * l), [1, 1], "a padded column");
    assert_eq!(shared(ALL, 4, |l| 128 * (l % 2)), [2, 1], "two words of one bank");
    assert_eq!(shared(0x0000_00ff, 4, |l| 128 * l), [8, 1], "only active lanes");
    assert_eq!(shared(ALL, 1, |l| l), [1, 1], "bytes of eight words");
    assert_eq!(shared(ALL, 2, |l| 2 * l), [1, 1]);
    assert_eq!(shared(ALL, 1, |l| 128 * l), [32, 1]);
}

#[test]
fn wide_shared_accesses_take_half_and_quarter_warps() {
    assert_eq!(shared(ALL, 8, |l| 8 * l), [2, 2]);
    assert_eq!(shared(ALL, 8, |l| 16 * l), [4, 2], "stride 2");
    assert_eq!(shared(ALL, 8, |l| 128 * (l / 16) + 8 * (l % 16)), [2, 2]);
    assert_eq!(shared(0x0000_ffff, 8, |l| 8 * l), [1, 1], "an inactive half costs nothing");
    assert_eq!(shared(ALL, 8, |l| 128 * l), [32, 2]);
    assert_eq!(shared(ALL, 16, |l| 16 * l), [4, 4]);
    assert_eq!(shared(ALL, 16, |l| 32 * l), [8, 4], "stride 2");
    assert_eq!(shared(ALL, 16, |l| 144 * l), [4, 4], "padded rows");
    assert_eq!(shared(ALL, 16, |l| 128 * l), [32, 4], "a column of 16-byte cells");
    assert_eq!(shared(ALL, 16, |_| 0), [4, 4]);
    assert_eq!(shared(0xff00_0000, 16, |l| 16 * l), [1, 1]);
}

#[test]
fn ldmatrix_takes_a_pass_per_eight_rows() {
    // 32 rows of 256 bytes (D = 128, two bytes each): all rows of a matrix start in the same bank.
    assert_eq!(ldmatrix(|l| 256 * l), [32, 4]);
    // The same padded by 16 bytes, and swizzled: column cell XOR row.
    assert_eq!(ldmatrix(|l| 272 * l), [4, 4]);
    assert_eq!(ldmatrix(|l| 256 * l + 16 * (l % 8)), [4, 4]);
    // 64-byte rows fill the banks every two rows.
    assert_eq!(ldmatrix(|l| 64 * l), [16, 4]);
    assert_eq!(ldmatrix(|l| 64 * l + 16 * ((l / 2) % 4)), [4, 4]);
    let mut meter = Meter::default();
    meter.ldmatrix(&[0, 16, 32, 48, 64, 80, 96, 112]);
    assert_eq!(meter.finish().shared_load.wavefronts, 1, ".x1");
}

#[test]
fn atomics_take_turns_at_an_address() {
    let count = |global, mask, f: &dyn Fn(u64) -> u64| {
        let mut meter = Meter::default();
        meter.atomic(global, mask, &lanes(f), 4);
        let counters = meter.finish();
        let count = if global { counters.global_atomic } else { counters.shared_atomic };
        [count.requests, count.serial, count.sectors]
    };
    assert_eq!(count(true, ALL, &|_| BASE), [1, 32, 1]);
    assert_eq!(count(true, ALL, &|l| BASE + 4 * l), [1, 1, 4]);
    assert_eq!(count(true, ALL, &|l| BASE + 4 * (l % 5)), [1, 7, 1]);
    assert_eq!(count(true, 0b1110, &|_| BASE), [1, 3, 1]);
    assert_eq!(count(false, ALL, &|l| 4 * (l / 16)), [1, 16, 0]);
}

#[test]
fn the_footprint_counts_a_sector_once() {
    let mut meter = Meter::default();
    for _ in 0..3 {
        meter.global(false, ALL, &lanes(|l| BASE + 4 * l), 4);
    }
    // Written first: reading it back needs nothing from outside.
    meter.global(true, ALL, &lanes(|l| BASE + 0x10_0000 + 16 * l), 16);
    meter.global(false, ALL, &lanes(|l| BASE + 0x10_0000 + 16 * l), 16);
    // Read first, written later: both.
    meter.global(true, 1, &lanes(|_| BASE), 4);
    // Far apart, more pages than are kept at hand, and back.
    for page in (0..600).chain(0..600) {
        meter.global(false, 1, &lanes(|_| BASE + (page + 100) * 0x1_0000), 4);
    }
    meter.atomic(true, ALL, &lanes(|_| BASE + 0x8000), 4);
    let counters = meter.finish();
    assert_eq!(counters.dram_read_sectors, 4 + 600 + 1);
    assert_eq!(counters.dram_write_sectors, 16 + 1 + 1);
    assert_eq!(counters.global_load.sectors, 3 * 4 + 16 + 1200);
}

#[test]
fn cp_async_is_a_load_and_a_store() {
    let mut meter = Meter::default();
    meter.instruction(Kind::Async, ALL);
    let (global, shared) = (lanes(|l| BASE + 16 * l), lanes(|l| 16 * l));
    meter.cp_async(ALL, 0x0000_ffff, &global, &shared, 16);
    meter.cp_async(ALL, 0, &global, &shared, 16);
    let counters = meter.finish();
    assert_eq!((counters.cp_async, counters.warp_instructions.asynchronous), (2, 1));
    assert_eq!((counters.global_load.requests, counters.global_load.sectors), (1, 8));
    assert_eq!((counters.shared_store.requests, counters.shared_store.wavefronts), (2, 8));
}

#[test]
fn instructions_count_by_class_and_in_total() {
    let mut meter = Meter::default();
    meter.launch(3, 64, 100);
    meter.instruction(Kind::Integer, ALL);
    meter.instruction(Kind::Integer, 1);
    meter.instruction(Kind::Mma, ALL);
    meter.instruction(Kind::Control, 0xf);
    meter.mma(4096);
    meter.barrier();
    meter.divergence();
    let counters = meter.finish();
    let (warp, thread) = (&counters.warp_instructions, &counters.thread_instructions);
    assert_eq!([warp.total, warp.integer, warp.mma, warp.control, warp.float], [4, 2, 1, 1, 0]);
    assert_eq!([thread.total, thread.integer, thread.mma, thread.control], [69, 33, 32, 4]);
    assert_eq!((counters.blocks, counters.threads, counters.shared_bytes), (3, 192, 300));
    assert_eq!((counters.mma, counters.mma_flops), (1, 4096));
    assert_eq!((counters.barriers, counters.divergent_branches), (1, 1));
}

#[test]
fn words_are_the_counters() {
    let n = Counters::default().to_words().len() as u64;
    let words: Vec<u64> = (1..=n).collect();
    let mut counters = Counters::from_words(&words).unwrap();
    assert_eq!(counters.to_words(), words);
    assert_eq!((counters.blocks, counters.dram_write_sectors), (1, n));
    assert_eq!(Counters::from_words(&words[1..]), None);
    assert_eq!(Counters::from_words(&[&words[..], &[0]].concat()), None);
    let before = counters.clone();
    counters.add(&before);
    assert_eq!(counters.to_words(), words.iter().map(|w| 2 * w).collect::<Vec<_>>());
}

#[test]
fn the_table_is_aligned_and_leaves_zeros_out() {
    let mut counters = Counters::default();
    counters.global_load.sectors = 393_216;
    counters.mma = 7;
    let lines: Vec<_> = counters.to_string().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("global load sectors ") && lines[0].ends_with(" 393216"));
    assert!(lines[1].starts_with("mma ") && lines[1].len() == lines[0].len());
}
