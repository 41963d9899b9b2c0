//! A warp's registers: rows of 32 lanes. A 64-bit register takes two rows, read as one `[u64; 32]`; 8- and 16-bit
//! registers take a row each, in the low bits. Predicates are lane masks. Immediates are rows filled beforehand,
//! so that every operand is a row.

/// 32 lanes of 32 bits.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Row(pub [u32; 32]);

/// Index of a row (of the first of two, for 64 bits), or of a predicate.
pub type Slot = u32;

/// Registers of one warp.
#[derive(Debug, Clone)]
pub struct Registers {
    pub rows: Vec<Row>,
    pub predicates: Vec<u32>,
}

impl Registers {
    /// A 64-bit register.
    pub fn wide(&self, slot: Slot) -> &[u64; 32] {
        super::alu::wide(self, slot)
    }

    /// A 64-bit register, to write.
    pub fn wide_mut(&mut self, slot: Slot) -> &mut [u64; 32] {
        super::alu::wide_mut(self, slot)
    }
}
