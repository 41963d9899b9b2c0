//! `cp.async` and the matrix operations.
//!
//! A copy's data is taken from global memory at issue and becomes visible in shared memory at the wait that covers
//! it; until then the bytes are pending. Hardware may write them at any moment between, so a reader in between is
//! wrong whatever it sees. Groups are counted per thread.

use super::access::request;
use super::block::Surroundings;
use super::grid::Grid;
use super::taint::Width;
use super::warp::Warp;
use crate::Class;
use crate::CpAsync;
use crate::decode::op::{Inst, NONE, Op, Semantics, Space};
use crate::memory::{Fault, Lanes};
use crate::num::{matrix, mma};

/// A warp's copies under way.
#[derive(Default)]
pub(super) struct Copies {
    pending: Vec<Copy>,
    /// Groups that each lane has committed.
    committed: [u32; 32],
}

struct Copy {
    /// Lanes still waiting for it.
    mask: u32,
    /// Each lane's group.
    group: [u32; 32],
    at: [u64; 32],
    width: u32,
    data: Box<Lanes>,
    inst: u32,
}

impl Warp {
    pub(super) fn async_copy(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        active: u32,
    ) -> Result<(), Fault> {
        match inst.op {
            Op::CpAsync { dst, src, bytes, size } => {
                let (to, from) = (self.addresses(dst, active)?, self.addresses(src, active)?);
                let to = to.map(|a| a & (super::SHARED_WINDOW - 1));
                let mut data: Box<Lanes> = Box::new([[0; 16]; 32]);
                let mut reads = active;
                let width = u32::from(bytes);
                if size != NONE {
                    self.expect_defined(size, Width::Narrow, active, "the source size")?;
                    let sizes = self.registers.rows[size as usize].0;
                    for lane in (0..32).filter(|l| active >> l & 1 == 1) {
                        // Zero bytes read nothing; what is not read is zero.
                        reads &= !(u32::from(sizes[lane] == 0) << lane);
                        if sizes[lane] > width {
                            let message = format!(
                                "expected a source size up to {width}, got {}",
                                sizes[lane]
                            );
                            return Err(Fault::new(Class::OutOfBounds, Some(lane as u32), message));
                        }
                    }
                    self.partial(grid, reads, &from, &sizes, pc, width, &mut data)?;
                } else {
                    let r = request(self, reads, &from, width, Semantics::WEAK, pc);
                    grid.memory.load(&r, &mut grid.clocks, grid.policy.checks, &mut data)?;
                }
                grid.meter.cp_async(active, reads, &from, &to, width);
                let r = request(self, active, &to, width, Semantics::WEAK, pc);
                let checks = grid.policy.checks;
                if grid.policy.cp_async == CpAsync::Early {
                    return around.shared.finish_async(&r, &mut grid.clocks, checks, &data);
                }
                around.shared.begin_async(&r, &mut grid.clocks, checks)?;
                let group = self.copies.committed;
                self.copies.pending.push(Copy {
                    mask: active,
                    group,
                    at: to,
                    width,
                    data,
                    inst: pc,
                });
                Ok(())
            }
            Op::CpCommit => {
                for lane in (0..32).filter(|l| active >> l & 1 == 1) {
                    self.copies.committed[lane] += 1;
                }
                Ok(())
            }
            Op::CpWait(left) => self.wait_copies(grid, around, left, active),
            _ => unreachable!("called for cp.async"),
        }
    }

    /// Copies of fewer bytes than their width: read byte by byte, the rest is zero.
    #[expect(clippy::too_many_arguments, reason = "one access with a size per lane")]
    fn partial(
        &mut self,
        grid: &mut Grid<'_>,
        reads: u32,
        from: &[u64; 32],
        sizes: &[u32; 32],
        pc: u32,
        width: u32,
        data: &mut Lanes,
    ) -> Result<(), Fault> {
        let full = (0..32)
            .filter(|&l| reads >> l & 1 == 1 && sizes[l] == width)
            .fold(0, |m, l| m | 1 << l);
        if full != 0 {
            let r = request(self, full, from, width, Semantics::WEAK, pc);
            grid.memory.load(&r, &mut grid.clocks, grid.policy.checks, data)?;
        }
        for lane in (0..32).filter(|l| (reads & !full) >> l & 1 == 1) {
            if !from[lane].is_multiple_of(width.into()) {
                let message = format!("{:#x} is not a multiple of {width}", from[lane]);
                return Err(Fault::new(Class::Misaligned, Some(lane as u32), message));
            }
            for byte in 0..sizes[lane] {
                let at = [from[lane] + u64::from(byte); 32];
                let r = request(self, 1 << lane, &at, 1, Semantics::WEAK, pc);
                let mut one: Lanes = [[0; 16]; 32];
                grid.memory.load(&r, &mut grid.clocks, grid.policy.checks, &mut one)?;
                data[lane][byte as usize] = one[lane][0];
            }
        }
        Ok(())
    }

    /// Completes all but each lane's latest `left` groups.
    fn wait_copies(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        left: Option<u32>,
        active: u32,
    ) -> Result<(), Fault> {
        let committed = self.copies.committed;
        let mut pending = std::mem::take(&mut self.copies.pending);
        for copy in &mut pending {
            let mut done = 0;
            for lane in (0..32).filter(|l| (copy.mask & active) >> l & 1 == 1) {
                let complete = left.is_none_or(|n| copy.group[lane] + n < committed[lane]);
                done |= u32::from(complete) << lane;
            }
            if done != 0 {
                copy.mask &= !done;
                let r = request(self, done, &copy.at, copy.width, Semantics::WEAK, copy.inst);
                around.shared.finish_async(&r, &mut grid.clocks, grid.policy.checks, &copy.data)?;
                grid.progress();
            }
        }
        pending.retain(|c| c.mask != 0);
        self.copies.pending = pending;
        Ok(())
    }

    /// `ldmatrix` and `mma`, which take the whole warp.
    pub(super) fn matrix(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        go: u32,
    ) -> Result<(), Fault> {
        if go != u32::MAX {
            let message = format!("expected all 32 lanes, got {go:#010x}");
            return Err(Fault::new(Class::BadMask, Some(go.trailing_zeros()), message));
        }
        match inst.op {
            Op::LdMatrix { dst, count, transposed, address, space } => {
                // Lanes 0 to 7 give the rows of the first matrix, 8 to 15 of the second, and so on.
                let givers = u32::MAX >> (32 - 8 * u32::from(count));
                let mut at = self.addresses(address, givers)?;
                if space == Space::Generic {
                    at = at.map(|a| a & (super::SHARED_WINDOW - 1));
                }
                let mut data: Lanes = [[0; 16]; 32];
                let r = request(self, givers, &at, 16, Semantics::WEAK, pc);
                // Each row reaches four lanes; for the race check the giver reads it.
                around.shared.load(&r, &mut grid.clocks, grid.policy.checks, &mut data)?;
                grid.meter.ldmatrix(&at[..8 * usize::from(count)]);
                for (m, &slot) in dst[..usize::from(count)].iter().enumerate() {
                    let rows: [[u16; 8]; 8] = std::array::from_fn(|row| {
                        let bytes = &data[8 * m + row];
                        std::array::from_fn(|i| {
                            u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
                        })
                    });
                    self.write(slot, go, &matrix::ldmatrix(&rows, transposed));
                }
            }
            Op::Mma { kind, d, a, b, c } => {
                let mut defined = u32::MAX;
                for slots in [&a[..], &b, &c] {
                    for &slot in slots {
                        defined &= self.defined[slot as usize];
                    }
                }
                if defined != u32::MAX {
                    let lane = Some((!defined).trailing_zeros());
                    let message = "a fragment was never written".to_owned();
                    return Err(Fault::new(Class::Uninitialised, lane, message));
                }
                let row = |slot: u32| &self.registers.rows[slot as usize].0;
                let result =
                    mma::m16n8k16(kind, grid.policy.mma, a.map(row), b.map(row), c.map(row));
                grid.meter.mma(2 * 16 * 8 * 16);
                for (slot, value) in d.iter().zip(&result) {
                    self.write(*slot, go, value);
                }
            }
            _ => unreachable!("the other operations name their lanes"),
        }
        Ok(())
    }
}
