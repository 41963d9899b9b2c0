//! What a checked access costs: `cargo test --release -p simcuda -- --ignored --nocapture ns_per_access`.

use super::*;
use std::time::Instant;

/// Warps of one block stream over 4 MiB, 512 bytes an access.
fn stream(name: &str, check: Checks, mut lane_at: impl FnMut(u64, u64) -> u64) {
    const BYTES: u64 = 4 << 20;
    let mut launch = Launch::global(BYTES);
    let Target::Global(memory, base) = &mut launch.target else { unreachable!() };
    let mut lanes = [[1; 16]; 32];
    let (mut load, mut store) = (f64::MAX, f64::MAX);
    for round in 0..12 {
        let mut clocks = Clocks::new(&op(round + 2), 4, 8);
        for stores in [false, true] {
            let started = Instant::now();
            for i in 0..BYTES / 512 {
                let addresses = std::array::from_fn(|lane| *base + lane_at(i, lane as u64) % BYTES);
                let r = Request {
                    mask: u32::MAX,
                    addresses: &addresses,
                    width: 16,
                    order: Order::Weak,
                    acquire: false,
                    release: false,
                    warp: (i % 8) as u32,
                    inst: 7,
                    non_coherent: false,
                };
                if stores {
                    memory.store(&r, &mut clocks, check, &lanes).unwrap();
                } else {
                    memory.load(&r, &mut clocks, check, &mut lanes).unwrap();
                }
            }
            clocks.barrier(0, 0, 0xff);
            let best = if stores { &mut store } else { &mut load };
            *best = best.min(started.elapsed().as_nanos() as f64 / (BYTES / 512) as f64);
        }
    }
    println!("{name}: load {load:.0} ns, store {store:.0} ns per warp");
}

#[test]
#[ignore = "prints times"]
fn ns_per_access() {
    let none = Checks { init: false, race: false };
    stream("contiguous, no checks", none, |i, lane| i * 512 + lane * 16);
    stream("contiguous, init", Checks { init: true, ..none }, |i, lane| i * 512 + lane * 16);
    stream("contiguous, all checks", ALL, |i, lane| i * 512 + lane * 16);
    // Rows of 256 bytes in any order.
    stream("two rows, all checks", ALL, |i, lane| {
        (2 * i + lane / 16) * 1021 % 16384 * 256 + lane % 16 * 16
    });
    stream("32 places, all checks", ALL, |i, lane| (i + lane * 8192) * 16);
}
