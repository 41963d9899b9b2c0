//! Operations of several lanes: when the lanes they name are there, and what they compute.

use super::block::Surroundings;
use super::grid::Grid;
use super::taint::Width;
use super::warp::{Arrival, Warp};
use crate::Class;
use crate::decode::op::{BarrierKind, Inst, NONE, Op, Predicate, Rmw, Shuffle, Vote};
use crate::memory::Fault;

/// Whether an instruction can execute now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readiness {
    /// For these of its lanes; the others pass or wait.
    Go(u32),
    Wait,
}

impl Warp {
    /// For which lanes of `mask` an instruction can execute. What needs no others always can.
    pub fn readiness(&self, inst: &Inst, mask: u32) -> Result<Readiness, Fault> {
        if !inst.synchronises() {
            return Ok(Readiness::Go(mask));
        }
        let guard = match inst.guard {
            NONE => u32::MAX,
            slot => self.predicate(Predicate { slot, negate: inst.negate }),
        };
        let (callers, others) = (mask & guard, mask & !guard);
        let Some(slot) = inst.member_mask() else {
            // `.aligned`: every live lane of the warp.
            return Ok(match () {
                () if callers == self.live => Readiness::Go(callers),
                () if others != 0 => Readiness::Go(0),
                () => Readiness::Wait,
            });
        };
        self.expect_defined(slot, Width::Narrow, callers, "the member mask")?;
        let masks = &self.registers.rows[slot as usize].0;
        let mut go = 0;
        let mut left = callers;
        while left != 0 {
            let lane = left.trailing_zeros();
            let named = masks[lane as usize];
            let bad = |message: String| Err(Fault::new(Class::BadMask, Some(lane), message));
            if named >> lane & 1 == 0 {
                return bad(format!("mask {named:#010x} lacks its own lane {lane}"));
            }
            let exited = named & self.born & !self.live;
            if exited != 0 {
                return bad(format!(
                    "mask {named:#010x} names lanes {exited:#010x}, which have exited"
                ));
            }
            // Lanes that the launch did not fill are no one's fault: a full mask in the last warp is usual.
            let named = named & self.born;
            let here = named & callers;
            for other in (0..32).filter(|l| here >> l & 1 == 1) {
                if masks[other] & self.born != named {
                    let theirs = masks[other];
                    return bad(format!(
                        "lane {lane} names {named:#010x}, lane {other} names {theirs:#010x}"
                    ));
                }
            }
            if here == named {
                go |= here;
            }
            left &= !here;
        }
        Ok(if go == 0 && others == 0 { Readiness::Wait } else { Readiness::Go(go) })
    }

    /// A warp's arrival at a block barrier.
    pub fn arrival(&self, inst: &Inst, pc: u32, go: u32) -> Result<Arrival, Fault> {
        let Op::Barrier { kind, id, count } = inst.op else { unreachable!("only barriers arrive") };
        let lane = go.trailing_zeros();
        let uniform = |slot, what: &str| {
            self.expect_defined(slot, Width::Narrow, go, what)?;
            let row = &self.registers.rows[slot as usize].0;
            let value = row[lane as usize];
            match (0..32).find(|&l| go >> l & 1 == 1 && row[l] != value) {
                None => Ok(value),
                Some(other) => Err(Fault::new(
                    Class::DivergentBarrier,
                    Some(other as u32),
                    format!("{what} {} in lane {other}, {value} in lane {lane}", row[other]),
                )),
            }
        };
        let id = uniform(id, "the barrier's number")?;
        let count = if count == NONE { None } else { Some(uniform(count, "the thread count")?) };
        if count.is_none() && self.live != self.born {
            let exited = self.born & !self.live;
            let message = format!(
                "a barrier of all threads, but lanes {exited:#010x} of this warp have exited"
            );
            return Err(Fault::new(Class::DivergentBarrier, Some(lane), message));
        }
        let truths = match kind {
            BarrierKind::Popc(_, p) | BarrierKind::Reduce(_, _, p) => {
                (self.predicate(p) & go).count_ones()
            }
            _ => 0,
        };
        Ok(Arrival { pc, id, count, kind, truths, voters: go.count_ones() })
    }

    /// Executes for lanes that are all there; each group of lanes with one mask by itself.
    pub fn synchronise(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        inst: &Inst,
        pc: u32,
        go: u32,
    ) -> Result<(), Fault> {
        let Some(slot) = inst.member_mask() else {
            return self.matrix(grid, around, inst, pc, go);
        };
        let masks = self.registers.rows[slot as usize].0;
        let mut left = go;
        while left != 0 {
            let group = masks[left.trailing_zeros() as usize] & go;
            self.group(grid, inst, group)?;
            left &= !group;
        }
        Ok(())
    }

    fn group(&mut self, grid: &mut Grid<'_>, inst: &Inst, group: u32) -> Result<(), Fault> {
        match inst.op {
            Op::WarpBarrier { .. } => grid.clocks.warp_sync(self.global),
            Op::Shuffle { mode, dst, valid, src, lane, clamp, .. } => {
                self.expect_defined(lane, Width::Narrow, group, "the lane operand")?;
                self.expect_defined(clamp, Width::Narrow, group, "the clamp operand")?;
                let rows = &self.registers.rows;
                let (from, b, c) =
                    (rows[src as usize].0, rows[lane as usize].0, rows[clamp as usize].0);
                let mut out = from;
                let (mut truth, mut defined) = (0, 0);
                for l in (0..32u32).filter(|l| group >> l & 1 == 1) {
                    let i = l as usize;
                    let source = shuffle_source(mode, l, b[i], c[i]);
                    let read = source.unwrap_or(l);
                    if group >> read & 1 == 0 {
                        let message = format!(
                            "lane {l} reads lane {read}, which is not in mask {group:#010x}"
                        );
                        return Err(Fault::new(Class::BadMask, Some(l), message));
                    }
                    out[i] = from[read as usize];
                    truth |= u32::from(source.is_some()) << l;
                    defined |= (self.defined[src as usize] >> read & 1) << l;
                }
                self.write(dst, group, &out);
                if dst != NONE {
                    self.define(dst, Width::Narrow, group, defined);
                }
                self.write_predicate(valid, group, truth);
            }
            Op::Vote { vote, dst, src, .. } => {
                let undefined = group & !self.defined_predicates[src.slot as usize];
                if undefined != 0 {
                    let lane = Some(undefined.trailing_zeros());
                    return Err(Fault::new(
                        Class::Uninitialised,
                        lane,
                        "the predicate was never written".to_owned(),
                    ));
                }
                let votes = self.predicate(src) & group;
                let truth = match vote {
                    Vote::All => votes == group,
                    Vote::Any => votes != 0,
                    Vote::Uni => votes == group || votes == 0,
                    Vote::Ballot => {
                        self.write(dst, group, &[votes; 32]);
                        return Ok(());
                    }
                };
                self.write_predicate(dst, group, if truth { group } else { 0 });
            }
            Op::Match { all, dst, valid, src, wide, .. } => {
                self.expect_defined(src, Width::wide(wide), group, "the value to match")?;
                let values = self.bits(src, wide);
                let equal = |a: u32| {
                    (0..32u32)
                        .filter(|b| {
                            group >> b & 1 == 1 && values[a as usize] == values[*b as usize]
                        })
                        .fold(0, |m, b| m | 1 << b)
                };
                let mut out = [0; 32];
                for l in (0..32u32).filter(|l| group >> l & 1 == 1) {
                    out[l as usize] = equal(l);
                }
                if all {
                    let truth = out[group.trailing_zeros() as usize] == group;
                    out = [if truth { group } else { 0 }; 32];
                    self.write_predicate(valid, group, if truth { group } else { 0 });
                }
                self.write(dst, group, &out);
            }
            Op::Redux { rmw, signed, dst, src, .. } => {
                self.expect_defined(src, Width::Narrow, group, "the value to reduce")?;
                let row = self.registers.rows[src as usize].0;
                let values = (0..32).filter(|l| group >> l & 1 == 1).map(|l: usize| row[l]);
                let result = values.reduce(|a, b| match (rmw, signed) {
                    (Rmw::Add, _) => a.wrapping_add(b),
                    (Rmw::Min, false) => a.min(b),
                    (Rmw::Max, false) => a.max(b),
                    (Rmw::Min, true) => (a as i32).min(b as i32) as u32,
                    (Rmw::Max, true) => (a as i32).max(b as i32) as u32,
                    (Rmw::And, _) => a & b,
                    (Rmw::Or, _) => a | b,
                    _ => a ^ b,
                });
                self.write(dst, group, &[result.unwrap_or(0); 32]);
            }
            _ => unreachable!("no other operation has a member mask"),
        }
        Ok(())
    }
}

/// The lane that `shfl` reads, or None where it is out of range and the lane's own value is copied (PTX ISA, `shfl`:
/// the third operand holds a clamp value in bits 0 to 4 and a segment mask in bits 8 to 12).
fn shuffle_source(mode: Shuffle, lane: u32, b: u32, c: u32) -> Option<u32> {
    let (b, clamp, segments) = (b & 31, c & 31, c >> 8 & 31);
    let highest = (lane & segments) | (clamp & !segments);
    let lowest = lane & segments;
    let (source, inside) = match mode {
        Shuffle::Up => {
            let source = lane as i32 - b as i32;
            (source, source >= highest as i32)
        }
        Shuffle::Down => ((lane + b) as i32, lane + b <= highest),
        Shuffle::Bfly => ((lane ^ b) as i32, lane ^ b <= highest),
        Shuffle::Idx => {
            let source = lowest | (b & !segments);
            (source as i32, source <= highest)
        }
    };
    inside.then_some(source as u32)
}
