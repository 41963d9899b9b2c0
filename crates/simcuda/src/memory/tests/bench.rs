//! What a checked access costs: `cargo test --release -p simcuda -- --ignored --nocapture ns_per_access`.

use super::*;
use std::time::Instant;

/// Warps of one block stream over memory that fits into a cache, or does not; 512 bytes an access.
fn stream(name: &str, check: Checks, lane_at: impl Fn(u64, u64) -> u64) {
    for kib in [64, 4096] {
        measure(&format!("{name}, {kib} KiB"), check, kib << 10, &lane_at);
    }
}

fn measure(name: &str, check: Checks, bytes: u64, lane_at: impl Fn(u64, u64) -> u64) {
    let mut launch = Launch::global(bytes);
    let Target::Global(memory, base) = &mut launch.target else { unreachable!() };
    let row = |i| std::array::from_fn(|lane| *base + lane_at(i, lane as u64) % bytes);
    let rows: Vec<[u64; 32]> = (0..bytes / 512).map(row).collect();
    let mut lanes = [[1; 16]; 32];
    let mut best = [f64::MAX; 2];
    for round in 0..(48 << 20) / bytes as u32 {
        let mut clocks = Clocks::new(&op(round + 2), 4, 8);
        for (stores, best) in [false, true].into_iter().zip(&mut best) {
            let started = Instant::now();
            for (addresses, i) in rows.iter().zip(0..) {
                let (acquire, release, non_coherent) = (false, false, false);
                let (width, order, warp, inst) = (16, Order::Weak, i % 8, 7);
                let mask = u32::MAX;
                let r = Request {
                    mask,
                    addresses,
                    width,
                    order,
                    acquire,
                    release,
                    warp,
                    inst,
                    non_coherent,
                };
                if stores {
                    memory.store(&r, &mut clocks, check, &lanes).unwrap();
                } else {
                    memory.load(&r, &mut clocks, check, &mut lanes).unwrap();
                }
            }
            clocks.barrier(0, 0, 0xff);
            *best = best.min(started.elapsed().as_nanos() as f64 / rows.len() as f64);
        }
    }
    println!("{name}: load {:.0} ns, store {:.0} ns per warp", best[0], best[1]);
}

#[test]
#[ignore = "prints times"]
fn ns_per_access() {
    let none = Checks { init: false, race: false };
    stream("contiguous, no checks", none, |i, lane| i * 512 + lane * 16);
    stream("contiguous, init", Checks { init: true, ..none }, |i, lane| i * 512 + lane * 16);
    stream("contiguous, all checks", ALL, |i, lane| i * 512 + lane * 16);
    stream("rows of 256 bytes, no checks", none, |i, lane| {
        (2 * i + lane / 16) * 1021 * 256 + lane % 16 * 16
    });
    stream("32 places, no checks", none, |i, lane| (i * 32 + lane) * 1021 * 16);
    stream("rows of 256 bytes, all checks", ALL, |i, lane| {
        (2 * i + lane / 16) * 1021 * 256 + lane % 16 * 16
    });
    stream("32 places, all checks", ALL, |i, lane| (i * 32 + lane) * 1021 * 16);
}
