//! What a test may choose about a launch: the schedule, the freedom that the PTX specification leaves to the
//! hardware, and which checks are on. Plain data; the default is what a test wants.

/// In what order warps and blocks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// As many blocks resident as an H100 would hold; each warp runs until it waits.
    InOrder,
    /// All resident blocks advance in turns of this many warp instructions per warp.
    Quantum(u32),
    /// One block at a time, the last one first: a block that waits for another never ends, which is reported, unless
    /// tickets made sure that the other one has started.
    OneBlock,
    /// Blocks start in a seeded random order, warps run in seeded random order and turns.
    Random,
}

/// When the data of `cp.async` becomes visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpAsync {
    /// At the wait that covers it, never before.
    Late,
    /// At issue.
    Early,
}

/// How `mma` adds its sixteen products to the accumulator; hardware does not document it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MmaModel {
    /// f32 fused multiply-adds in the order of k.
    Chain,
    /// The exact sum, rounded once.
    Exact,
    /// Products and accumulator aligned to the largest exponent, cut 25 places below it and summed, the sum rounded
    /// toward zero: the published model of an H100 (arXiv 2512.07004).
    Truncated,
}

/// When work submitted to a stream runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streams {
    /// At submission.
    Eager,
    /// When something waits for it, in seeded random order between streams that are not ordered.
    Lazy,
}

/// Which checks are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Uninitialised memory and registers.
    pub init: bool,
    /// Races in shared and global memory, between threads, blocks and streams.
    pub race: bool,
}

/// How launches on a device run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Order of warps and blocks.
    pub schedule: Schedule,
    /// Visibility of `cp.async`.
    pub cp_async: CpAsync,
    /// Rounding of `mma`.
    pub mma: MmaModel,
    /// Move the results of approximate functions by up to their documented error, seeded; otherwise they are
    /// rounded correctly.
    pub perturb: bool,
    /// When stream work runs.
    pub streams: Streams,
    /// Seed of everything random here. The same seed gives the same run.
    pub seed: u64,
    /// Which checks are on. Bounds, lifetime and alignment are always checked.
    pub checks: Checks,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            schedule: Schedule::InOrder,
            cp_async: CpAsync::Late,
            mma: MmaModel::Chain,
            perturb: false,
            streams: Streams::Eager,
            seed: 0,
            checks: Checks { init: true, race: true },
        }
    }
}
