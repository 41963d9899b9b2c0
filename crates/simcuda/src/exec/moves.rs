//! Instructions of one lane that are no table entry: comparisons that combine, vectors packed and unpacked, address
//! conversions, clocks, fences.

use super::block::Surroundings;
use super::grid::Grid;
use super::registers::Slot;
use super::taint::Width;
use super::warp::Warp;
use crate::Class;
use crate::decode::op::{Inst, Logic, NONE, Op, Space};
use crate::memory::Fault;

impl Warp {
    /// What needs no other lane.
    pub(super) fn execute(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        active: u32,
    ) -> Result<(), Fault> {
        match inst.op {
            Op::Compare { alu, src, dst, inverse, combine } => {
                let scratch = self.registers.predicates.len() as Slot;
                self.registers.predicates.push(0);
                alu.run(&mut self.registers, active, scratch, src, &grid.env);
                let plain = self.registers.predicates.pop().unwrap_or(0);
                let mut defined = active & self.defined_sources(alu, &src);
                let (mut yes, mut no) = (plain, !plain);
                if let Some((logic, p)) = combine {
                    let c = self.predicate(p);
                    defined &= self.defined_predicates[p.slot as usize];
                    let apply = |x: u32| match logic {
                        Logic::And => x & c,
                        Logic::Or => x | c,
                        Logic::Xor => x ^ c,
                    };
                    (yes, no) = (apply(yes), apply(no));
                }
                for (slot, value) in [(dst, yes), (inverse, no)] {
                    if slot != NONE {
                        let p = &mut self.registers.predicates[slot as usize];
                        *p = *p & !active | value & active;
                        self.define(slot, Width::Predicate, active, defined);
                    }
                }
                Ok(())
            }
            Op::Pack { dst, parts, count, bytes } => {
                let bits = 8 * u32::from(bytes);
                let mut value = [0u64; 32];
                let mut defined = [active; 2];
                for (i, &part) in parts[..count as usize].iter().enumerate() {
                    let shift = bits * i as u32;
                    defined[shift as usize / 32] &= self.defined[part as usize];
                    for (lane, v) in value.iter_mut().enumerate() {
                        let part = u64::from(self.registers.rows[part as usize].0[lane]);
                        *v |= (part & u64::MAX >> (64 - bits)) << shift;
                    }
                }
                let wide = bits * u32::from(count) == 64;
                self.write_bits(dst, wide, active, &value);
                self.define(dst, Width::Narrow, active, defined[0]);
                if wide {
                    self.define(dst + 1, Width::Narrow, active, defined[1]);
                }
                Ok(())
            }
            Op::Unpack { src, parts, count, bytes } => {
                let bits = 8 * u32::from(bytes);
                let value = self.bits(src, bits * u32::from(count) == 64);
                for (i, &part) in parts[..count as usize].iter().enumerate() {
                    if part != NONE {
                        let shift = bits * i as u32;
                        let defined = self.defined[(src + shift / 32) as usize] & active;
                        let limit = u64::MAX >> (64 - bits);
                        self.write_bits(part, false, active, &value.map(|v| v >> shift & limit));
                        self.define(part, Width::Narrow, active, defined);
                    }
                }
                Ok(())
            }
            Op::Convert { dst, src, space, to, wide } => {
                let window = match space {
                    Space::Shared => super::SHARED_WINDOW,
                    Space::Local => super::LOCAL_WINDOW,
                    Space::Param => super::PARAM_WINDOW,
                    _ => 0,
                };
                // Local memory is private: the lane is part of its generic address only through who uses it.
                let value = self.bits(src, wide);
                let value =
                    value.map(|v| if to { v.wrapping_sub(window) } else { v.wrapping_add(window) });
                let width = Width::wide(wide);
                let defined = self.defined_in(src, width) & active;
                self.write_bits(dst, wide, active, &value);
                self.define(dst, width, active, defined);
                Ok(())
            }
            Op::IsSpace { dst, src, space } => {
                let value = self.bits(src, true);
                let mut truth = 0;
                for (lane, &v) in value.iter().enumerate() {
                    truth |= u32::from(super::access::generic(v).0 == space) << lane;
                }
                let p = &mut self.registers.predicates[dst as usize];
                *p = *p & !active | truth & active;
                self.define(
                    dst,
                    Width::Predicate,
                    active,
                    self.defined_in(src, Width::Wide) & active,
                );
                Ok(())
            }
            Op::Clock { dst, wide } => {
                self.write_bits(dst, wide, active, &[grid.instructions; 32]);
                self.define(dst, Width::wide(wide), active, active);
                Ok(())
            }
            Op::ActiveMask { dst } => {
                self.write(dst, active, &[active; 32]);
                Ok(())
            }
            Op::Trap => {
                Err(Fault::new(Class::Trap, Some(active.trailing_zeros()), "trap".to_owned()))
            }
            Op::Fence(scope) => {
                grid.clocks.fence(self.global, scope);
                Ok(())
            }
            Op::Nop => Ok(()),
            _ => self.access(grid, around, inst, pc, active),
        }
    }
}
