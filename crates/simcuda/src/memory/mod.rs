//! Device memory with checks: allocations at addresses the host cannot touch, bounds, lifetime, initialisation, and
//! the race shadow.
//!
//! INTERFACE (to be implemented; names and signatures are what `exec` and `driver` are written against).

/// A finding of a check before the executor adds kernel, instruction and source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub class: crate::Class,
    /// The lane to blame, for a warp's access.
    pub lane: Option<u32>,
    pub message: String,
}

/// How far a strong operation reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Block,
    Device,
}

/// What an access means to the race check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A plain access: must be ordered after every conflicting one.
    Weak,
    /// `.volatile`, `.relaxed`, atomics: may meet other strong accesses whose scope covers both.
    Strong(Scope),
}

/// One warp's access to memory: all lanes at once.
pub struct Request<'a> {
    pub mask: u32,
    /// Of the lanes in `mask`: generic (global) addresses, or offsets for a shared or local region.
    pub addresses: &'a [u64; 32],
    /// Bytes per lane: 1, 2, 4, 8 or 16; addresses must be multiples.
    pub width: u32,
    pub order: Order,
    /// Index of the warp in the launch: `block * warps_per_block + warp`.
    pub warp: u32,
    /// Index of the instruction in the kernel, for the other party's line in a race report.
    pub inst: u32,
    /// A `.nc` load: what this launch wrote must not be read through it (class ReadOnly).
    pub non_coherent: bool,
}

/// Bytes of each lane; the first `width` count.
pub type Lanes = [[u8; 16]; 32];

mod clocks;
mod device;
mod region;
mod shadow;

pub use clocks::Clocks;
pub use device::{Memory, OpOrder};
pub use region::Region;
