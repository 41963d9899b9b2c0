//! Units: chunks and pages that are kept or freed whole.
//!
//! Unit `u` of size `P` holds positions `u·P .. (u+1)·P`. A head's units are the slots it holds of each. Its
//! score is the mean over those slots; a unit with a protected slot is protected whole; the last, partly filled unit
//! counts as a whole one, as its page does in memory. Budgets become units by rounding down, so less than a
//! unit, and what partly filled units lack, stays unused; the report says how much.

use std::ops::Range;

use crate::ids::Position;

/// Granularity of what is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Align {
    /// Positions per unit; 1 for single tokens.
    pub unit: u32,
    /// Every head of a layer keeps the same slots, by the sum of the heads' scores (ChunkKV).
    pub share_heads: bool,
}

impl Default for Align {
    fn default() -> Self {
        Self { unit: 1, share_heads: false }
    }
}

/// Slot ranges of a head's units, ascending. Without positions, slot and position are the same.
pub(crate) fn units(len: u32, positions: Option<&[Position]>, unit: u32) -> Vec<Range<u32>> {
    let unit_of = |slot: u32| match positions {
        Some(p) => p[slot as usize].0 / unit,
        None => slot / unit,
    };
    let mut out: Vec<Range<u32>> = Vec::new();
    for slot in 0..len {
        match out.last_mut() {
            Some(last) if unit_of(last.start) == unit_of(slot) => last.end = slot + 1,
            _ => out.push(slot..slot + 1),
        }
    }
    out
}
