//! The least time that a launch's counters allow on a device: a lower bound, not a prediction.
//!
//! Each resource alone, at its peak rate and used by every multiprocessor that has a block. Latency, dependencies,
//! waits and the compiler's own instructions are left out, so the time on a device is longer, often by much. What
//! the figures are for: to see which resource binds, and that a change moved less through it.

use std::fmt;

use crate::Counters;

/// Peak rates of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Product name.
    pub name: &'static str,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Clock under load, in Hz.
    pub clock: f64,
    /// Warp instructions that a multiprocessor issues per clock.
    pub issue: f64,
    /// Shared memory wavefronts (128 bytes) that a multiprocessor takes per clock.
    pub wavefronts: f64,
    /// Bytes per second between L2 and the multiprocessors.
    pub l2: f64,
    /// Bytes per second of DRAM.
    pub dram: f64,
    /// Flops per second of dense f16 and bf16 matrix multiplication, all multiprocessors together.
    pub mma: f64,
}

/// H100 SXM. Multiprocessors, issue slots, DRAM and matrix rates are the vendor's (H100 whitepaper; 989.4 TFLOP/s
/// dense), the L2 rate is what microbenchmarks reach. The clock is the one usually held; the highest is 1.98 GHz, at
/// which issue and shared memory are 11 % faster.
pub const H100_SXM: Device = Device {
    name: "H100 SXM",
    multiprocessors: 132,
    clock: 1.755e9,
    issue: 4.0,
    wavefronts: 1.0,
    l2: 5.5e12,
    dram: 3.35e12,
    mma: 989.4e12,
};

/// A100 80GB SXM, all figures the vendor's (A100 whitepaper and data sheet; L2: 5120 bytes per clock).
pub const A100_SXM: Device = Device {
    name: "A100 80GB SXM",
    multiprocessors: 108,
    clock: 1.41e9,
    issue: 4.0,
    wavefronts: 1.0,
    l2: 5120.0 * 1.41e9,
    dram: 2.039e12,
    mma: 312e12,
};

/// What a launch needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Issue slots: one per warp instruction of the PTX.
    Issue,
    /// Shared memory banks.
    Shared,
    /// Matrix units.
    Mma,
    /// DRAM: each sector read from outside or written, once. Holds if L2 holds nothing before and keeps nothing.
    Dram,
    /// L2: each sector of each request, as if L1 never hit. L1 does hit, so this one is no bound and never binds.
    L2,
}

/// Computes bounds.
#[derive(Debug)]
pub struct Roofline;

/// Seconds per resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    /// The device.
    pub device: Device,
    /// Seconds that each resource needs on its own.
    pub seconds: [(Resource, f64); 5],
    /// Multiprocessors that have a block.
    pub busy: u32,
}

impl Roofline {
    /// The bound for one launch (for several: that of their sum, as if they ran side by side).
    pub fn of(counters: &Counters, device: &Device) -> Bound {
        let all = device.multiprocessors;
        let busy = match u32::try_from(counters.blocks) {
            Ok(0) | Err(_) => all,
            Ok(blocks) => blocks.min(all),
        };
        let clocks = f64::from(busy) * device.clock;
        let Counters { global_load, global_store, global_atomic, .. } = counters;
        let l2 = global_load.sectors + global_store.sectors + global_atomic.sectors;
        let dram = counters.dram_read_sectors + counters.dram_write_sectors;
        let wavefronts = counters.shared_load.wavefronts + counters.shared_store.wavefronts;
        let time = |count: u64, rate: f64| count as f64 / rate;
        let seconds = [
            (Resource::Issue, time(counters.warp_instructions.total, device.issue * clocks)),
            (Resource::Shared, time(wavefronts, device.wavefronts * clocks)),
            (
                Resource::Mma,
                time(counters.mma_flops, device.mma * f64::from(busy) / f64::from(all)),
            ),
            (Resource::Dram, time(32 * dram, device.dram)),
            (Resource::L2, time(32 * l2, device.l2)),
        ];
        Bound { device: device.clone(), seconds, busy }
    }
}

impl Bound {
    /// The resource that needs longest, and how long.
    pub fn binds(&self) -> (Resource, f64) {
        let bounds = self.seconds.iter().filter(|(resource, _)| *resource != Resource::L2);
        *bounds.max_by(|a, b| a.1.total_cmp(&b.1)).expect("not all resources are L2")
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Device { name, multiprocessors, .. } = &self.device;
        writeln!(f, "{name}, {} of {multiprocessors} multiprocessors have a block", self.busy)?;
        for (resource, seconds) in &self.seconds {
            let (name, remark) = match resource {
                Resource::Issue => ("issue", ""),
                Resource::Shared => ("shared memory", ""),
                Resource::Mma => ("mma", ""),
                Resource::Dram => ("DRAM", "  if L2 is cold"),
                Resource::L2 => ("L2", "  no bound: as if L1 never hit"),
            };
            writeln!(f, "{name:<14} {:>12.2} us{remark}", seconds * 1e6)?;
        }
        let (resource, seconds) = self.binds();
        writeln!(
            f,
            "{:<14} {:>12.2} us  {resource:?} binds; lower bound, not a prediction",
            "bound",
            seconds * 1e6
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scoring of 8 heads x 4096 keys, D = 128, 32 queries, as counted once by hand.
    fn score_mma() -> Counters {
        let mut counters = Counters { blocks: 512, mma: 65_536, ..Counters::default() };
        counters.mma_flops = counters.mma * 2 * 16 * 8 * 16;
        counters.warp_instructions.total = 1_110_000;
        counters.shared_load.wavefronts = 196_608;
        counters.global_load.sectors = 393_216;
        counters.global_store.sectors = 262_144;
        counters.dram_read_sectors = 265_000;
        counters.dram_write_sectors = 131_875;
        counters
    }

    fn microseconds(bound: &Bound) -> [f64; 5] {
        bound.seconds.map(|(_, seconds)| (seconds * 1e8).round() / 100.0)
    }

    #[test]
    fn h100() {
        let bound = Roofline::of(&score_mma(), &H100_SXM);
        // 1.11 M / (132 x 4 x 1.755 GHz); 196 608 / (132 x 1.755 GHz); 268 Mflop / 989 Tflop/s;
        // 12.7 MB / 3.35 TB/s; 21 MB / 5.5 TB/s.
        assert_eq!(microseconds(&bound), [1.20, 0.85, 0.27, 3.79, 3.81]);
        assert_eq!(bound.binds().0, Resource::Dram);
        assert_eq!(bound.busy, 132);
    }

    #[test]
    fn a100() {
        let bound = Roofline::of(&score_mma(), &A100_SXM);
        // 108 multiprocessors at 1.41 GHz, 312 Tflop/s, 2.039 TB/s, 7.22 TB/s.
        assert_eq!(microseconds(&bound), [1.82, 1.29, 0.86, 6.23, 2.9]);
    }

    #[test]
    fn few_blocks_leave_multiprocessors_idle() {
        let mut counters = score_mma();
        counters.blocks = 33;
        let bound = Roofline::of(&counters, &H100_SXM);
        assert_eq!(microseconds(&bound), [4.79, 3.39, 1.09, 3.79, 3.81]);
        assert_eq!(bound.binds().0, Resource::Issue);
    }

    #[test]
    fn the_table_says_what_it_is() {
        let table = Roofline::of(&Counters::default(), &H100_SXM).to_string();
        assert!(table.contains("lower bound, not a prediction"), "{table}");
        let table = Roofline::of(&score_mma(), &H100_SXM).to_string();
        assert!(table.contains("Dram binds; lower bound, not a prediction"), "{table}");
        assert!(table.contains("DRAM                   3.79 us"), "{table}");
    }
}
