//! A warp: 32 lanes, where they stand, and the instruction loop.
//!
//! Lanes that part are *splits*, each with its own pc. The lowest pc that can run runs first, which brings lanes
//! together again at the ends of branches and loops; splits that meet merge. That rule alone is wrong: a compiler may
//! put the join, with a barrier in it, before code that others still have to run. So a split at a `.sync` operation
//! waits until the lanes the operation names are there, and others run meanwhile. A lane may also spin on another lane
//! of its warp: after many backward branches in a row, others get a turn.

use super::async_copy::Copies;
use super::block::Surroundings;
use super::grid::Grid;
use super::registers::{Registers, Row};
use super::sync::Readiness;
use super::taint::{Width, undefined};
use crate::Class;
use crate::Report;
use crate::decode::Special;
use crate::decode::op::{BarrierKind, Op};
use crate::memory::{Fault, Region};

/// Backward branches in a row after which other splits of the warp get a turn.
const SPINS: u32 = 64;

/// Lanes that stand at the same instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    pub pc: u32,
    pub mask: u32,
}

/// A warp's arrival at a block barrier.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    pub pc: u32,
    pub id: u32,
    /// Threads that the barrier takes; None: all of the block.
    pub count: Option<u32>,
    pub kind: BarrierKind,
    pub truths: u32,
    pub voters: u32,
}

/// Why a warp's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Quantum,
    Barrier,
    Done,
}

/// A warp while its block runs.
pub(super) struct Warp {
    pub registers: Registers,
    /// Lanes in which a row (a predicate) holds something that was written: the others are tainted.
    pub defined: Vec<u32>,
    pub defined_predicates: Vec<u32>,
    pub splits: Vec<Split>,
    /// Lanes that the launch gave it, and those of them that have not exited.
    pub born: u32,
    pub live: u32,
    pub local: Region,
    pub copies: Copies,
    /// Set when the warp stops at a barrier, taken by the block.
    pub arrival: Option<Arrival>,
    waiting: Option<Arrival>,
    /// In its block, and in the launch.
    pub index: u32,
    pub global: u32,
    /// The pc of a split that spins: others go first once.
    spinning: Option<u32>,
}

impl Warp {
    pub fn new(grid: &Grid<'_>, block: u32, id: [u32; 3], index: u32) -> Self {
        let code = grid.code;
        let mut warp = Self {
            registers: Registers {
                rows: vec![Row([0; 32]); code.rows as usize],
                predicates: vec![0; code.predicates as usize],
            },
            defined: vec![0; code.rows as usize],
            defined_predicates: vec![0; code.predicates as usize],
            splits: Vec::new(),
            born: 0,
            live: 0,
            local: Region::local(code.local_bytes),
            copies: Copies::default(),
            arrival: None,
            waiting: None,
            index,
            global: 0,
            spinning: None,
        };
        for c in &code.constants {
            let slot = c.slot as usize;
            if c.wide {
                warp.registers.wide_mut(c.slot).fill(c.bits);
            } else {
                warp.registers.rows[slot].0.fill(c.bits as u32);
            }
        }
        warp.restart(grid, block, id, index);
        warp
    }

    /// Ready for another block. Constants stay; everything else is undefined again.
    pub fn restart(&mut self, grid: &Grid<'_>, block: u32, id: [u32; 3], index: u32) {
        let code = grid.code;
        let threads = grid.launch.block.iter().product::<u32>();
        let lanes = (threads - index * 32).min(32);
        self.born = u32::MAX >> (32 - lanes);
        self.live = self.born;
        self.splits.clear();
        self.splits.push(Split { pc: 0, mask: self.born });
        self.local.reset();
        self.copies = Copies::default();
        (self.arrival, self.waiting, self.spinning) = (None, None, None);
        self.index = index;
        self.global = block * grid.warps_per_block + index;
        self.defined.fill(if grid.policy.checks.init { 0 } else { u32::MAX });
        self.defined_predicates.fill(if grid.policy.checks.init { 0 } else { u32::MAX });
        for c in &code.constants {
            self.define(c.slot, Width::wide(c.wide), u32::MAX, u32::MAX);
        }
        if let Some(truth) = code.truth {
            self.registers.predicates[truth as usize] = u32::MAX;
            self.defined_predicates[truth as usize] = u32::MAX;
        }
        let size = grid.launch.block;
        for &(special, slot) in &code.specials {
            self.defined[slot as usize] = u32::MAX;
            for lane in 0..32 {
                let t = index * 32 + lane;
                let value = match special {
                    Special::Tid(axis) => {
                        [t % size[0], t / size[0] % size[1], t / size[0] / size[1]][axis as usize]
                    }
                    Special::Ntid(axis) => size[axis as usize],
                    Special::Ctaid(axis) => id[axis as usize],
                    Special::Nctaid(axis) => grid.launch.grid[axis as usize],
                    Special::LaneId => lane,
                    Special::WarpId => index,
                    Special::NumWarps => grid.warps_per_block,
                    Special::LaneMask(which) => {
                        let below = (1u32 << lane) - 1;
                        [1 << lane, below | 1 << lane, below, !below, !(below | 1 << lane)]
                            [which as usize]
                    }
                    Special::SmId => block % 132,
                    Special::NumSms => 132,
                    Special::GridId => 0,
                    Special::DynamicShared => grid.launch.dynamic_shared,
                    Special::TotalShared => {
                        grid.launch.kernel.shared_bytes + grid.launch.dynamic_shared
                    }
                };
                self.registers.rows[slot as usize].0[lane as usize] = value;
            }
        }
    }

    pub fn done(&self) -> bool {
        self.splits.is_empty()
    }

    pub fn can_run(&self) -> bool {
        !self.done() && self.waiting.is_none()
    }

    pub fn waiting(&self) -> Option<Arrival> {
        self.waiting
    }

    pub fn waits_as(&self) -> Option<BarrierKind> {
        self.waiting.map(|a| a.kind)
    }

    pub fn wait(&mut self, arrival: Arrival) {
        self.waiting = Some(arrival);
    }

    /// Where it stands; the end of the code if nowhere.
    pub fn pc(&self) -> u32 {
        self.splits.first().map_or(0, |s| s.pc)
    }

    /// Goes past a barrier, with the result of its reduction.
    pub fn resume(&mut self, result: Option<u32>) {
        let kind = self.waiting.take().map(|a| a.kind);
        let mask = self.splits[0].mask;
        match (kind, result) {
            (Some(BarrierKind::Popc(dst, _)), Some(count)) => self.write(dst, mask, &[count; 32]),
            (Some(BarrierKind::Reduce(_, dst, _)), Some(truth)) => {
                self.write_predicate(dst, mask, if truth == 1 { mask } else { 0 });
            }
            _ => {}
        }
        self.splits[0].pc += 1;
    }

    /// Runs up to `quantum` instructions.
    pub fn run(
        &mut self,
        grid: &mut Grid<'_>,
        mut around: Surroundings<'_>,
        quantum: u64,
    ) -> Result<Stop, Box<Report>> {
        let end = grid.instructions + quantum;
        loop {
            if self.splits.is_empty() {
                return Ok(Stop::Done);
            }
            let chosen = if self.splits.len() == 1 { Ok((0, u32::MAX)) } else { self.choose(grid) };
            let (at, limit) = match chosen {
                Ok(choice) => choice,
                Err((pc, fault)) => return Err(grid.report(fault, pc, around.id, self.index)),
            };
            let last = self.splits.len() - 1;
            self.splits.swap(at, last);
            match self.advance(grid, &mut around, limit, end) {
                Ok(None) => {}
                Ok(Some(stop)) => return Ok(stop),
                Err((pc, fault)) => return Err(grid.report(fault, pc, around.id, self.index)),
            }
        }
    }

    /// The split to run next, and the pc at which another one should go on instead. Merges those that met.
    fn choose(&mut self, grid: &Grid<'_>) -> Result<(usize, u32), (u32, Fault)> {
        self.splits.sort_unstable_by_key(|s| s.pc);
        self.splits.dedup_by(|b, a| {
            let met = a.pc == b.pc;
            a.mask |= if met { b.mask } else { 0 };
            met
        });
        let mut runnable = Vec::with_capacity(self.splits.len());
        for (i, split) in self.splits.iter().enumerate() {
            let inst = &grid.code.insts[split.pc as usize];
            match self.readiness(inst, split.mask) {
                Ok(Readiness::Go(_)) => runnable.push(i),
                Ok(Readiness::Wait) => {}
                Err(fault) => return Err((split.pc, fault)),
            }
        }
        // A spinner goes last, once.
        if let Some(pc) = self.spinning.take()
            && runnable.len() > 1
            && let Some(i) = runnable.iter().position(|&i| self.splits[i].pc == pc)
        {
            let next = runnable[(i + 1) % runnable.len()];
            return Ok((next, u32::MAX));
        }
        match runnable[..] {
            [] => Err(self.parted(grid)),
            [only] => Ok((only, u32::MAX)),
            [first, second, ..] => Ok((first, self.splits[second].pc)),
        }
    }

    /// Every split waits for lanes that are elsewhere.
    fn parted(&self, grid: &Grid<'_>) -> (u32, Fault) {
        let mut barrier = true;
        let places: Vec<String> = self
            .splits
            .iter()
            .map(|s| {
                let op = &grid.code.insts[s.pc as usize].op;
                barrier &= matches!(op, Op::Barrier { .. } | Op::LdMatrix { .. } | Op::Mma { .. });
                let text = &grid.code.texts[s.pc as usize];
                format!("lanes {:#010x} at `{text}` ({})", s.mask, grid.source(s.pc))
            })
            .collect();
        let class = if barrier { Class::DivergentBarrier } else { Class::BadMask };
        let message = format!("lanes of one warp wait for each other: {}", places.join("; "));
        let first = self.splits[0];
        (first.pc, Fault::new(class, Some(first.mask.trailing_zeros()), message))
    }

    /// Runs the last split until it meets, passes or needs another, or the turn ends.
    fn advance(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        limit: u32,
        end: u64,
    ) -> Result<Option<Stop>, (u32, Fault)> {
        let code = grid.code;
        let mut spins = 0;
        let Some(mut split) = self.splits.pop() else { return Ok(Some(Stop::Done)) };
        loop {
            if grid.instructions >= end {
                self.splits.push(split);
                return Ok(Some(Stop::Quantum));
            }
            let pc = split.pc;
            let inst = &code.insts[pc as usize];
            let active = split.mask & self.guard(inst);
            if self.defined_guard(inst) & split.mask != split.mask {
                return Err((pc, undefined("its predicate")));
            }
            let Readiness::Go(executing) = self.readiness(inst, split.mask).map_err(|f| (pc, f))?
            else {
                self.splits.push(split);
                return if self.splits.len() == 1 { Err(self.parted(grid)) } else { Ok(None) };
            };
            grid.instructions += 1;
            grid.meter.instruction(inst.kind, executing & active);
            match inst.op {
                Op::Alu { alu, dst, src } => {
                    let defined = active & self.defined_sources(alu, &src);
                    alu.run(&mut self.registers, active, dst, src, &grid.env);
                    self.define(dst, Width::of(alu.signature().destination), active, defined);
                }
                Op::Bra { target } => {
                    let stay = split.mask & !active;
                    if active != 0 && stay != 0 {
                        grid.meter.divergence();
                        self.splits.push(Split { pc: pc + 1, mask: stay });
                        split.mask = active;
                    }
                    split.pc = if active == 0 { pc + 1 } else { target };
                    if active != 0 && target <= pc && !self.splits.is_empty() {
                        spins += 1;
                        if spins > SPINS {
                            self.spinning = Some(target);
                            self.splits.push(split);
                            return Ok(None);
                        }
                    }
                    if active != 0 && stay != 0 {
                        self.splits.push(split);
                        return Ok(None);
                    }
                    if self.meets(split.pc, limit) {
                        self.splits.push(split);
                        return Ok(None);
                    }
                    continue;
                }
                Op::Exit => {
                    self.live &= !active;
                    split.mask &= !active;
                    if split.mask == 0 {
                        return Ok(None);
                    }
                }
                _ if inst.synchronises() => {
                    let go = executing;
                    let skip = split.mask & !active;
                    let wait = split.mask & !(go | skip);
                    if wait != 0 {
                        self.splits.push(Split { pc, mask: wait });
                        split.mask = go | skip;
                    }
                    if go != 0 {
                        if let Op::Barrier { .. } = inst.op {
                            let arrival = self.arrival(inst, pc, go).map_err(|f| (pc, f))?;
                            grid.meter.barrier();
                            self.arrival = Some(arrival);
                            self.splits.push(split);
                            return Ok(Some(Stop::Barrier));
                        }
                        self.synchronise(grid, around, inst, pc, go).map_err(|f| (pc, f))?;
                    }
                    if wait != 0 {
                        split.pc += 1;
                        self.splits.push(split);
                        return Ok(None);
                    }
                }
                _ if active != 0 => {
                    self.execute(grid, around, inst, pc, active).map_err(|f| (pc, f))?
                }
                _ => {}
            }
            split.pc = pc + 1;
            if self.meets(split.pc, limit) {
                self.splits.push(split);
                return Ok(None);
            }
        }
    }

    /// Whether another split is at this pc, or should run before it.
    fn meets(&self, pc: u32, limit: u32) -> bool {
        !self.splits.is_empty() && (pc >= limit || self.splits.iter().any(|s| s.pc == pc))
    }
}
