//! The one error type of the crate: a variant per cause, each with what was expected and what came.
//!
//! After an error nothing has changed: planning mutates nothing, and cache operations check before they write.

use crate::dtype::Dtype;
use crate::ids::{KvHead, LayerId};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, by cause.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Query heads must be a multiple of KV heads (GQA).
    #[error(
        "{query_heads} query heads cannot be shared by {kv_heads} kv heads: expected a positive multiple"
    )]
    HeadsNotDivisible {
        /// Query heads given.
        query_heads: u32,
        /// KV heads given.
        kv_heads: u32,
    },
    /// A quantity that must not be zero.
    #[error("{what} must be positive, got 0")]
    Zero {
        /// Which quantity.
        what: &'static str,
    },
    /// A tensor's shape differs from what the geometry says.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// Which tensor and dimension.
        what: &'static str,
        /// The number expected.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// A view reaches past the memory it borrows.
    #[error("{what} needs {needed} elements, but its storage holds {available}")]
    OutOfStorage {
        /// Which tensor.
        what: &'static str,
        /// Elements that the shape and strides reach.
        needed: u64,
        /// Elements in the storage.
        available: u64,
    },
    /// A size that does not fit the crate's limits (`T < 2^31` per head, 64-bit totals).
    #[error("{what} is too large: {got}, at most {limit}")]
    TooLarge {
        /// Which quantity.
        what: &'static str,
        /// The value.
        got: u64,
        /// The largest allowed.
        limit: u64,
    },
    /// Memory that the allocator refuses.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
    },
    /// No CUDA driver on this machine, or none that can be loaded.
    #[error("no CUDA driver: {reason}")]
    NoDriver {
        /// What the loader said.
        reason: String,
    },
    /// A driver that cannot read the kernels.
    #[error("the CUDA driver supports version {got}, expected at least {expected}")]
    OldDriver {
        /// Version needed, as `cuDriverGetVersion` has it: 12000 is 12.0.
        expected: i32,
        /// What came; 0 if the driver did not say.
        got: i32,
    },
    /// A device number without a device.
    #[error("no CUDA device {ordinal}: there are {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// A device older than the kernels.
    #[error("the device has compute capability {}.{}, expected at least {}.{}", got.0, got.1, expected.0, expected.1)]
    ComputeCapability {
        /// Major and minor needed.
        expected: (i32, i32),
        /// The device's.
        got: (i32, i32),
    },
    /// A call of the CUDA driver that failed.
    #[error("{call} failed: {name} (CUDA error {code})")]
    Driver {
        /// The call, or the kernel that was launched.
        call: &'static str,
        /// The `CUresult`.
        code: u32,
        /// Its name.
        name: String,
    },
    /// Device memory that vector accesses cannot read.
    #[error("{what}: addresses, strides and rows must be multiples of {expected} bytes, got {got}")]
    Misaligned {
        /// Which tensor.
        what: &'static str,
        /// The alignment.
        expected: u64,
        /// An address, or a number of bytes.
        got: u64,
    },
    /// Two tensors that must share a dtype do not.
    #[error("{what}: expected dtype {expected}, got {got}")]
    Dtype {
        /// Which tensor.
        what: &'static str,
        /// Expected.
        expected: Dtype,
        /// Given.
        got: Dtype,
    },
    /// The method needs an observation that the layer does not carry.
    #[error("{method} needs {what}, which the observation does not hold")]
    Missing {
        /// The method that asked.
        method: &'static str,
        /// What it needs.
        what: &'static str,
    },
    /// The observation holds fewer query rows than the method's window.
    #[error("{method} needs the queries of the last {needed} tokens, the observation holds {got}")]
    TooFewQueries {
        /// The method that asked.
        method: &'static str,
        /// Rows needed.
        needed: u64,
        /// Rows given.
        got: u64,
    },
    /// A parameter outside its range.
    #[error("{name} = {got}: expected {expected}")]
    Parameter {
        /// The parameter's name.
        name: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// A name that nothing answers to.
    #[error("unknown {what} {got:?}; known: {known}")]
    UnknownName {
        /// Of what kind.
        what: &'static str,
        /// What came.
        got: String,
        /// The names there are.
        known: String,
    },
    /// A budget that cannot be read or resolved.
    #[error("budget {got:?}: {expected}")]
    Budget {
        /// What came.
        got: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// Floors or caps that no apportionment can meet.
    #[error("cannot apportion {total} slots: floors sum to {floors}, caps to {caps}")]
    Apportion {
        /// What was to be shared out.
        total: u64,
        /// Sum of the lower bounds.
        floors: u64,
        /// Sum of the upper bounds.
        caps: u64,
    },
    /// Offsets of a ragged container that do not ascend from zero to the length of its data.
    #[error("ragged offsets must ascend from 0 to {len}: offset {index} is {got}")]
    RaggedOffsets {
        /// Which offset.
        index: usize,
        /// Its value.
        got: u64,
        /// Length of the data.
        len: u64,
    },
    /// NaN scores where the policy does not rank them.
    #[error(
        "layer {layer}: {count} scores are NaN (non-finite keys, values, queries or weights); \
         set `allow_nan` to rank them below everything"
    )]
    NanScores {
        /// The layer.
        layer: LayerId,
        /// How many.
        count: u64,
    },
    /// Logical positions of a head that do not strictly ascend below the token count.
    #[error(
        "layer {layer}, head {head}: positions must strictly ascend below {tokens}; entry {index} is {got}"
    )]
    Positions {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
        /// Which entry.
        index: usize,
        /// Its value.
        got: u64,
        /// Tokens seen by the sequence.
        tokens: u64,
    },
    /// Layers pushed to a planner out of order or in the wrong number.
    #[error("expected layer {expected} of {layers}, got {got}")]
    LayerOrder {
        /// The layer the planner waits for.
        expected: usize,
        /// What came.
        got: usize,
        /// Layers of the geometry.
        layers: usize,
    },
    /// An append that finds no reserved room.
    #[error(
        "layer cache full: head {head} holds {len} of {capacity} slots, {new} more were appended"
    )]
    CacheFull {
        /// The head without room.
        head: KvHead,
        /// Slots in use.
        len: u64,
        /// Slots reserved.
        capacity: u64,
        /// Slots that were to be added.
        new: u64,
    },
    /// The page pool has no free page left.
    #[error("page pool exhausted: {needed} pages needed, {free} free")]
    OutOfPages {
        /// Pages the operation needs.
        needed: u64,
        /// Pages that are free.
        free: u64,
    },
    /// A page that is not an engine's to give: beyond the pool, free already, in a cache, or named twice.
    #[error(
        "page {page} of {pages} is not the engine's: beyond the pool, free, in a cache, or named twice"
    )]
    NotTheEngines {
        /// The page.
        page: u32,
        /// Pages of the pool.
        pages: u32,
    },
    /// Memory that is written while it is used otherwise.
    #[error("{what} share memory with {with}")]
    Overlap {
        /// What is written.
        what: &'static str,
        /// What else lies there.
        with: &'static str,
    },
    /// A plan that breaks one of its promises (see [`crate::plan::check`]).
    #[error("plan check: {0}")]
    Check(#[from] crate::plan::CheckError),
    /// A combination of parts that has no defined result.
    #[error("{what}: {why}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be.
        why: &'static str,
    },
}
