//! A warp's registers by slot, and which of their lanes hold something that was written.
//!
//! What comes of an undefined value is undefined; it is reported where it decides something: an address, a predicate, a
//! mask, a stored value.

use super::alu::{Alu, Ty};
use super::registers::Slot;
use super::warp::Warp;
use crate::Class;
use crate::decode::op::{Inst, NONE, Predicate};
use crate::memory::Fault;

/// What a slot is. The halves of a 64-bit register are tainted apart: compilers pack a value with garbage and take
/// the value out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Predicate,
    Narrow,
    Wide,
}

impl Width {
    pub fn wide(wide: bool) -> Self {
        if wide { Self::Wide } else { Self::Narrow }
    }

    pub fn of(ty: Ty) -> Self {
        match ty.bits() {
            1 => Self::Predicate,
            64 => Self::Wide,
            _ => Self::Narrow,
        }
    }
}

impl Warp {
    pub(super) fn guard(&self, inst: &Inst) -> u32 {
        match inst.guard {
            NONE => u32::MAX,
            slot => self.predicate(Predicate { slot, negate: inst.negate }),
        }
    }

    pub(super) fn defined_guard(&self, inst: &Inst) -> u32 {
        if inst.guard == NONE { u32::MAX } else { self.defined_predicates[inst.guard as usize] }
    }

    pub(super) fn predicate(&self, p: Predicate) -> u32 {
        let value = self.registers.predicates[p.slot as usize];
        if p.negate { !value } else { value }
    }

    pub(super) fn defined_in(&self, slot: Slot, width: Width) -> u32 {
        let slot = slot as usize;
        match width {
            Width::Predicate => self.defined_predicates[slot],
            Width::Narrow => self.defined[slot],
            Width::Wide => self.defined[slot] & self.defined[slot + 1],
        }
    }

    /// Lanes in which all sources are defined. What narrows 64 bits needs the low half only.
    pub(super) fn defined_sources(&self, alu: Alu, src: &[Slot; 4]) -> u32 {
        let signature = alu.signature();
        let narrows =
            matches!(signature.destination.bits(), 8..=32) && signature.sources.len() == 1;
        let mut defined = u32::MAX;
        for (&ty, &slot) in signature.sources.iter().zip(src) {
            let width = Width::of(ty);
            let low = narrows && width == Width::Wide && !ty.is_float();
            defined &= self.defined_in(slot, if low { Width::Narrow } else { width });
        }
        defined
    }

    /// Lanes `active` of a slot were written, of which only `defined` come from defined values.
    pub(super) fn define(&mut self, slot: Slot, width: Width, active: u32, defined: u32) {
        let slot = slot as usize;
        let set = |row: &mut u32| *row = *row & !active | defined;
        match width {
            Width::Predicate => set(&mut self.defined_predicates[slot]),
            Width::Narrow => set(&mut self.defined[slot]),
            Width::Wide => self.defined[slot..slot + 2].iter_mut().for_each(set),
        }
    }

    /// A fault if a slot is undefined in one of the lanes.
    pub(super) fn expect_defined(
        &self,
        slot: Slot,
        width: Width,
        mask: u32,
        what: &str,
    ) -> Result<(), Fault> {
        let undefined_lanes = mask & !self.defined_in(slot, width);
        if undefined_lanes == 0 {
            return Ok(());
        }
        Err(Fault { lane: Some(undefined_lanes.trailing_zeros()), ..undefined(what) })
    }

    /// A register's bits, 32 or 64 of them.
    pub(super) fn bits(&self, slot: Slot, wide: bool) -> [u64; 32] {
        if wide {
            *self.registers.wide(slot)
        } else {
            self.registers.rows[slot as usize].0.map(u64::from)
        }
    }

    pub(super) fn write_bits(&mut self, slot: Slot, wide: bool, mask: u32, value: &[u64; 32]) {
        if wide {
            for (lane, v) in self.registers.wide_mut(slot).iter_mut().enumerate() {
                *v = if mask >> lane & 1 == 1 { value[lane] } else { *v };
            }
        } else {
            for (lane, v) in self.registers.rows[slot as usize].0.iter_mut().enumerate() {
                *v = if mask >> lane & 1 == 1 { value[lane] as u32 } else { *v };
            }
        }
    }

    /// Writes a 32-bit row with defined values; nothing for a sink.
    pub(super) fn write(&mut self, slot: Slot, mask: u32, value: &[u32; 32]) {
        if slot == NONE {
            return;
        }
        for (lane, v) in self.registers.rows[slot as usize].0.iter_mut().enumerate() {
            *v = if mask >> lane & 1 == 1 { value[lane] } else { *v };
        }
        self.define(slot, Width::Narrow, mask, mask);
    }

    pub(super) fn write_predicate(&mut self, slot: Slot, mask: u32, value: u32) {
        if slot == NONE {
            return;
        }
        let p = &mut self.registers.predicates[slot as usize];
        *p = *p & !mask | value & mask;
        self.define(slot, Width::Predicate, mask, mask);
    }
}

pub(super) fn undefined(what: &str) -> Fault {
    Fault::new(Class::Uninitialised, None, format!("{what} was never written"))
}
