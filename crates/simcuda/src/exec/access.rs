//! Loads and stores: addresses to state spaces, bytes to registers.

use super::block::Surroundings;
use super::grid::Grid;
use super::taint::Width;
use super::warp::Warp;
use super::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::Class;
use crate::decode::op::{Address, Elements, Inst, NONE, Op, Semantics, Space};
use crate::memory::{Fault, Lanes, Order, Request};

/// State space and offset of a generic address.
pub(super) fn generic(address: u64) -> (Space, u64) {
    let offset = address & (SHARED_WINDOW - 1);
    match address & !(SHARED_WINDOW - 1) {
        SHARED_WINDOW => (Space::Shared, offset),
        LOCAL_WINDOW => (Space::Local, offset),
        PARAM_WINDOW => (Space::Param, offset),
        _ => (Space::Global, address),
    }
}

/// What the memory checks need to know.
pub(super) fn request<'a>(
    warp: &Warp,
    mask: u32,
    addresses: &'a [u64; 32],
    width: u32,
    semantics: Semantics,
    inst: u32,
) -> Request<'a> {
    Request {
        mask,
        addresses,
        width,
        order: semantics.scope.map_or(Order::Weak, Order::Strong),
        acquire: semantics.acquire,
        release: semantics.release,
        warp: warp.global,
        inst,
        non_coherent: false,
    }
}

impl Warp {
    /// Effective addresses; a fault where the base was never written.
    pub(super) fn addresses(&self, a: Address, mask: u32) -> Result<[u64; 32], Fault> {
        if a.base == NONE {
            return Ok([a.offset as u64; 32]);
        }
        self.expect_defined(a.base, Width::wide(a.wide), mask, "the address")?;
        let offset = a.offset as u64;
        if a.wide {
            let base = self.registers.wide(a.base);
            Ok(std::array::from_fn(|l| base[l].wrapping_add(offset)))
        } else {
            // A 32-bit address is one of shared memory, where sums wrap at 32 bits.
            let base = &self.registers.rows[a.base as usize].0;
            Ok(std::array::from_fn(|l| u64::from(base[l].wrapping_add(offset as u32))))
        }
    }

    /// Acts on the lanes of each state space that an access reaches, with their offsets there.
    pub(super) fn spaces(
        space: Space,
        mask: u32,
        addresses: &[u64; 32],
        mut act: impl FnMut(Space, u32, &[u64; 32]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        if space != Space::Generic {
            return act(space, mask, addresses);
        }
        let mut left = mask;
        while left != 0 {
            let space = generic(addresses[left.trailing_zeros() as usize]).0;
            let (mut of, mut at) = (0, [0; 32]);
            for lane in (0..32).filter(|l| left >> l & 1 == 1) {
                let (its, offset) = generic(addresses[lane]);
                if its == space {
                    of |= 1 << lane;
                    at[lane] = offset;
                }
            }
            act(space, of, &at)?;
            left &= !of;
        }
        Ok(())
    }

    pub(super) fn access(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        active: u32,
    ) -> Result<(), Fault> {
        match inst.op {
            Op::Load { space, address, to, semantics, non_coherent } => {
                let addresses = self.addresses(address, active)?;
                let width = u32::from(to.bytes) * u32::from(to.count);
                let mut data: Lanes = [[0; 16]; 32];
                Self::spaces(space, active, &addresses, |space, mask, at| {
                    let mut r = request(self, mask, at, width, semantics, pc);
                    r.non_coherent = non_coherent;
                    self.load(grid, around, space, &r, &mut data)
                })?;
                self.scatter(&to, active, &data);
                Ok(())
            }
            Op::Store { space, address, from, semantics } => {
                let addresses = self.addresses(address, active)?;
                let width = u32::from(from.bytes) * u32::from(from.count);
                let data = self.gather(&from, active)?;
                Self::spaces(space, active, &addresses, |space, mask, at| {
                    let r = request(self, mask, at, width, semantics, pc);
                    self.store(grid, around, space, &r, &data)
                })?;
                grid.progress();
                Ok(())
            }
            Op::Atomic { .. } => self.atomic(grid, around, inst, pc, active),
            Op::CpAsync { .. } | Op::CpCommit | Op::CpWait(_) => {
                self.async_copy(grid, around, inst, pc, active)
            }
            Op::Call { builtin, result, params } => {
                self.call(grid, around, builtin, result, params, pc, active)
            }
            _ => unreachable!("the instruction loop handles all others"),
        }
    }

    pub(super) fn load(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        space: Space,
        r: &Request<'_>,
        data: &mut Lanes,
    ) -> Result<(), Fault> {
        let checks = grid.policy.checks;
        match space {
            Space::Shared => {
                grid.meter.shared(false, r.mask, r.addresses, r.width);
                around.shared.load(r, &mut grid.clocks, checks, data)
            }
            Space::Local => self.local.load(r, &mut grid.clocks, checks, data),
            Space::Param => params(grid, r, data),
            _ => {
                grid.memory.load(r, &mut grid.clocks, checks, data)?;
                grid.meter.global(false, r.mask, r.addresses, r.width);
                Ok(())
            }
        }
    }

    pub(super) fn store(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        space: Space,
        r: &Request<'_>,
        data: &Lanes,
    ) -> Result<(), Fault> {
        let checks = grid.policy.checks;
        match space {
            Space::Shared => {
                around.shared.store(r, &mut grid.clocks, checks, data)?;
                grid.meter.shared(true, r.mask, r.addresses, r.width);
                Ok(())
            }
            Space::Local => self.local.store(r, &mut grid.clocks, checks, data),
            Space::Const | Space::Param => {
                let lane = Some(r.mask.trailing_zeros());
                Err(Fault::new(Class::ReadOnly, lane, "a store to parameter memory".to_owned()))
            }
            _ => {
                grid.memory.store(r, &mut grid.clocks, checks, data)?;
                grid.meter.global(true, r.mask, r.addresses, r.width);
                Ok(())
            }
        }
    }

    /// Bytes to registers, extended to their width.
    fn scatter(&mut self, to: &Elements, active: u32, data: &Lanes) {
        let bytes = usize::from(to.bytes);
        for (i, &slot) in to.slots[..usize::from(to.count)].iter().enumerate() {
            if slot == NONE {
                continue;
            }
            if bytes == 4 && !to.wide {
                let row = &mut self.registers.rows[slot as usize].0;
                for (lane, value) in row.iter_mut().enumerate() {
                    let at = &data[lane][4 * i..4 * i + 4];
                    let new = u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
                    *value = if active >> lane & 1 == 1 { new } else { *value };
                }
            } else {
                let shift = 64 - 8 * bytes as u32;
                let value = std::array::from_fn(|lane| {
                    let mut word = [0; 8];
                    word[..bytes].copy_from_slice(&data[lane][bytes * i..bytes * (i + 1)]);
                    let raw = u64::from_le_bytes(word);
                    if to.signed { ((raw << shift) as i64 >> shift) as u64 } else { raw }
                });
                self.write_bits(slot, to.wide, active, &value);
            }
            self.define(slot, Width::wide(to.wide), active, active);
        }
    }

    /// Registers to bytes; a fault where one was never written.
    fn gather(&self, from: &Elements, active: u32) -> Result<Lanes, Fault> {
        let mut data: Lanes = [[0; 16]; 32];
        let bytes = usize::from(from.bytes);
        for (i, &slot) in from.slots[..usize::from(from.count)].iter().enumerate() {
            self.expect_defined(
                slot,
                Width::wide(from.wide && from.bytes == 8),
                active,
                "the value to store",
            )?;
            let value = self.bits(slot, from.wide);
            for (lane, out) in data.iter_mut().enumerate() {
                out[bytes * i..bytes * (i + 1)]
                    .copy_from_slice(&value[lane].to_le_bytes()[..bytes]);
            }
        }
        Ok(data)
    }
}

fn params(grid: &Grid<'_>, r: &Request<'_>, data: &mut Lanes) -> Result<(), Fault> {
    let params = grid.launch.params;
    let width = r.width as usize;
    for lane in (0..32).filter(|l| r.mask >> l & 1 == 1) {
        let at = r.addresses[lane];
        let bytes = usize::try_from(at).ok().and_then(|at| params.get(at..at.checked_add(width)?));
        let Some(bytes) = bytes else {
            let message = format!("{width} bytes at {at} of {} bytes of parameters", params.len());
            return Err(Fault::new(Class::OutOfBounds, Some(lane as u32), message));
        };
        if !at.is_multiple_of(r.width.into()) {
            let message = format!("parameter offset {at} is not a multiple of {width}");
            return Err(Fault::new(Class::Misaligned, Some(lane as u32), message));
        }
        data[lane][..width].copy_from_slice(bytes);
    }
    Ok(())
}
