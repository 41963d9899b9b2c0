//! `atom` and `red`: lanes in ascending order, each reading what the one before it wrote.

use half::{bf16, f16};

use super::access::request;
use super::block::Surroundings;
use super::grid::Grid;
use super::taint::Width;
use super::warp::Warp;
use crate::Class;
use crate::decode::op::{Inst, NONE, Op, Rmw, Space, Word};
use crate::memory::Fault;
use crate::num::round;

impl Warp {
    pub(super) fn atomic(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        active: u32,
    ) -> Result<(), Fault> {
        let Op::Atomic { space, rmw, word, dst, address, b, c, semantics } = inst.op else {
            unreachable!("called for atomics")
        };
        let wide = word.bytes() == 8;
        let addresses = self.addresses(address, active)?;
        self.expect_defined(b, Width::wide(wide), active, "the operand")?;
        let operand = self.bits(b, wide);
        let new = match c {
            NONE => [0; 32],
            _ => {
                self.expect_defined(c, Width::wide(wide), active, "the new value")?;
                self.bits(c, wide)
            }
        };
        let mut changed = false;
        let mut result = [0; 32];
        Self::spaces(space, active, &addresses, |space, mask, at| {
            let r = request(self, mask, at, word.bytes().into(), semantics, pc);
            let mut apply = |lane: usize, old: u64| {
                let value = modify(rmw, word, space, old, operand[lane], new[lane]);
                changed |= value != old;
                value
            };
            let checks = grid.policy.checks;
            let old = match space {
                Space::Shared => around.shared.atomic(&r, &mut grid.clocks, checks, &mut apply)?,
                Space::Global => grid.memory.atomic(&r, &mut grid.clocks, checks, &mut apply)?,
                _ => {
                    let lane = Some(mask.trailing_zeros());
                    let message = "an atomic outside global and shared memory".to_owned();
                    return Err(Fault::new(Class::Unsupported, lane, message));
                }
            };
            grid.meter.atomic(space == Space::Global, mask, at, word.bytes().into());
            for lane in (0..32).filter(|l| mask >> l & 1 == 1) {
                result[lane] = old[lane];
            }
            Ok(())
        })?;
        if changed {
            grid.progress();
        }
        if dst != NONE {
            self.write_bits(dst, wide, active, &result);
            self.define(dst, Width::wide(wide), active, active);
        }
        Ok(())
    }
}

/// The new value. Float additions round to nearest, once. In global memory `add.f32` flushes subnormals, in shared
/// memory it keeps them (PTX ISA, `atom`).
fn modify(rmw: Rmw, word: Word, space: Space, old: u64, b: u64, c: u64) -> u64 {
    let (old32, b32) = (old as u32, b as u32);
    match (rmw, word) {
        (Rmw::Add, Word::F32) => {
            let keep = |x: f32| if space == Space::Global { round::flush(x) } else { x };
            let sum = keep(keep(f32::from_bits(old32)) + keep(f32::from_bits(b32)));
            u64::from(if sum.is_nan() { 0x7fff_ffff } else { sum.to_bits() })
        }
        (Rmw::Add, Word::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (Rmw::Add, Word::F16x2) => halves(old32, b32, |x, y| {
            let sum = f16::from_f32(f16::from_bits(x).to_f32() + f16::from_bits(y).to_f32());
            if sum.is_nan() { 0x7fff } else { sum.to_bits() }
        }),
        (Rmw::Add, Word::Bf16x2) => halves(old32, b32, |x, y| {
            let sum = bf16::from_f32(bf16::from_bits(x).to_f32() + bf16::from_bits(y).to_f32());
            if sum.is_nan() { 0x7fff } else { sum.to_bits() }
        }),
        (Rmw::Add, Word::U32 | Word::S32) => u64::from(old32.wrapping_add(b32)),
        (Rmw::Add, _) => old.wrapping_add(b),
        (Rmw::Min, Word::S32) => u64::from((old32 as i32).min(b32 as i32) as u32),
        (Rmw::Max, Word::S32) => u64::from((old32 as i32).max(b32 as i32) as u32),
        (Rmw::Min, Word::S64) => (old as i64).min(b as i64) as u64,
        (Rmw::Max, Word::S64) => (old as i64).max(b as i64) as u64,
        (Rmw::Min, _) => old.min(b),
        (Rmw::Max, _) => old.max(b),
        (Rmw::And, _) => old & b,
        (Rmw::Or, _) => old | b,
        (Rmw::Xor, _) => old ^ b,
        (Rmw::Exch, _) => b,
        (Rmw::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (Rmw::Inc, _) => {
            if old32 >= b32 {
                0
            } else {
                old + 1
            }
        }
        (Rmw::Dec, _) => {
            if old32 == 0 || old32 > b32 {
                b
            } else {
                old - 1
            }
        }
    }
}

/// The sum of two f16 or bf16 is exact in f32 but for rounding that a second rounding does not change: f32 has more
/// than twice their digits.
fn halves(a: u32, b: u32, add: impl Fn(u16, u16) -> u16) -> u64 {
    let low = add(a as u16, b as u16);
    let high = add((a >> 16) as u16, (b >> 16) as u16);
    u64::from(u32::from(low) | u32::from(high) << 16)
}
