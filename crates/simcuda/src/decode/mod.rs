//! From parsed PTX to kernels: shared and local memory laid out, registers given slots, calls inlined, every operand
//! checked against its instruction's type.
//!
//! The type check is not pedantry: compilers differ in the width of shared addresses, and an interpreter that reads
//! the wrong half of a register computes something, silently.

pub mod op;

mod body;
mod memory;
mod operands;
mod registers;
mod warp;

use std::collections::HashMap;

use crate::exec::registers::Slot;
use crate::ptx::LoadError;
use crate::ptx::ast::{self, Place};
use op::Inst;

/// A decode error at a line.
pub type Result<T> = std::result::Result<T, LoadError>;

/// Space between shared variables, so that running over the end of one is no access to the next. A multiple of the
/// 128 bytes that decide bank conflicts.
const RED_ZONE: u32 = 256;

/// A named range of shared or local memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    pub name: String,
    pub offset: u32,
    pub bytes: u32,
}

/// A constant row: an immediate, or the address of a module variable once it has one.
#[derive(Debug, Clone, Copy)]
pub struct Constant {
    pub slot: Slot,
    pub wide: bool,
    pub bits: u64,
    /// Index of the module variable whose address is added.
    pub variable: Option<usize>,
}

/// Special registers that a kernel reads, as rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NumWarps,
    /// `lanemask_eq`, `_le`, `_lt`, `_ge`, `_gt`.
    LaneMask(u8),
    SmId,
    NumSms,
    GridId,
    /// Dynamic shared memory in bytes, and all of it.
    DynamicShared,
    TotalShared,
}

/// What a kernel needs in order to run.
#[derive(Debug)]
pub struct Code {
    pub insts: Vec<Inst>,
    pub places: Vec<Place>,
    /// Instruction texts, for reports.
    pub texts: Vec<String>,
    pub rows: u32,
    pub predicates: u32,
    /// A predicate that is always true, if one is needed.
    pub truth: Option<Slot>,
    pub constants: Vec<Constant>,
    pub specials: Vec<(Special, Slot)>,
    /// Static shared variables at their places in the simulated layout; dynamic shared memory follows `shared_end`.
    pub shared: Vec<Range>,
    pub shared_end: u32,
    pub local_bytes: u32,
    pub sources: HashMap<u32, String>,
}

/// What `.shared` variables a kernel can name, with real and simulated sizes.
pub struct Shared {
    pub ranges: Vec<Range>,
    pub simulated_end: u32,
    pub real_bytes: u32,
}

impl Shared {
    fn new() -> Self {
        Self { ranges: Vec::new(), simulated_end: 0, real_bytes: 0 }
    }

    /// Gives a variable its place, and returns the simulated offset.
    fn place(&mut self, v: &ast::Variable) -> u32 {
        self.real_bytes = self.real_bytes.next_multiple_of(v.align) + v.bytes;
        let offset = self.real_bytes - v.bytes;
        // The same offset modulo 128 as on the device: bank conflicts must not change.
        let gap = if self.ranges.is_empty() { 0 } else { RED_ZONE };
        let simulated = (self.simulated_end + gap).next_multiple_of(128) + offset % 128;
        self.ranges.push(Range { name: v.name.clone(), offset: simulated, bytes: v.bytes });
        self.simulated_end = simulated + v.bytes;
        simulated
    }
}

/// Where dynamic shared memory starts in the simulated layout: after a red zone, with the device's offset modulo 128.
fn dynamic_start(shared: &Shared) -> u32 {
    let real = shared.real_bytes.next_multiple_of(16);
    let gap = if shared.ranges.is_empty() { 0 } else { RED_ZONE };
    (shared.simulated_end + gap).next_multiple_of(128) + real % 128
}

pub use body::decode;

#[cfg(test)]
mod tests;
