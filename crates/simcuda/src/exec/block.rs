//! A thread block: its warps, its shared memory, its sixteen barriers.

use super::grid::Grid;
use super::warp::{Stop, Warp};
use crate::decode::op::{BarrierKind, Logic};
use crate::memory::{Fault, Region};
use crate::{Class, Report};

/// Barrier resources of a block.
pub(super) const BARRIERS: usize = 16;

/// Who has come to a barrier.
#[derive(Debug, Clone, Default)]
pub(super) struct Barrier {
    /// Warps that wait.
    waiting: u32,
    /// Warps that arrived, waiting or not.
    arrived: u32,
    /// Threads it takes, from the first to arrive.
    expected: Option<u32>,
    /// Threads with a true predicate, of `bar.red`.
    truths: u32,
    /// Threads that gave a predicate.
    voters: u32,
}

/// A block while it runs.
pub(super) struct Block {
    /// In launch order.
    pub index: u32,
    pub id: [u32; 3],
    pub warps: Vec<Warp>,
    pub shared: Region,
    barriers: [Barrier; BARRIERS],
    next: usize,
}

/// What a turn of a block came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Done,
    /// Warps can still go on.
    Running,
}

/// The state of a block besides its warps, which a running warp may change.
pub(super) struct Surroundings<'a> {
    pub id: [u32; 3],
    pub shared: &'a mut Region,
}

impl Block {
    pub fn new(grid: &Grid<'_>, index: u32) -> Self {
        let g = grid.launch.grid;
        let id = [index % g[0], index / g[0] % g[1], index / g[0] / g[1]];
        Self {
            index,
            id,
            warps: (0..grid.warps_per_block).map(|w| Warp::new(grid, index, id, w)).collect(),
            shared: grid.shared_region(),
            barriers: Default::default(),
            next: 0,
        }
    }

    /// Reuses the memory of a finished block.
    pub fn restart(&mut self, grid: &Grid<'_>, index: u32) {
        let g = grid.launch.grid;
        self.index = index;
        self.id = [index % g[0], index / g[0] % g[1], index / g[0] / g[1]];
        for (w, warp) in self.warps.iter_mut().enumerate() {
            warp.restart(grid, index, self.id, w as u32);
        }
        self.shared.reset();
        self.barriers = Default::default();
        self.next = 0;
    }

    /// Runs each warp that can for up to `quantum` instructions.
    pub fn turn(&mut self, grid: &mut Grid<'_>, quantum: u64) -> Result<Turn, Box<Report>> {
        let count = self.warps.len();
        let first = grid.first_warp(self.next, count);
        let mut ran = false;
        for i in 0..count {
            let w = (first + i) % count;
            if !self.warps[w].can_run() {
                continue;
            }
            ran = true;
            let around = Surroundings { id: self.id, shared: &mut self.shared };
            match self.warps[w].run(grid, around, quantum)? {
                Stop::Quantum => {}
                Stop::Done => grid.progress(),
                Stop::Barrier => self.arrive(grid, w)?,
            }
        }
        self.next = (first + 1) % count;
        if self.warps.iter().all(Warp::done) {
            return Ok(Turn::Done);
        }
        if !ran && !self.warps.iter().any(Warp::can_run) {
            return Err(self.stuck(grid));
        }
        Ok(Turn::Running)
    }

    /// A warp came to a barrier; the last one releases the others.
    fn arrive(&mut self, grid: &mut Grid<'_>, w: usize) -> Result<(), Box<Report>> {
        grid.progress();
        let arrival =
            self.warps[w].arrival.take().expect("a warp that stopped at a barrier says which");
        let block_threads = grid.warps_per_block * 32;
        let fail = |grid: &Grid<'_>, block: &Self, message: String| {
            let fault = Fault::new(Class::DivergentBarrier, None, message);
            Err(grid.report(fault, arrival.pc, block.id, w as u32))
        };
        let id = arrival.id as usize;
        if id >= BARRIERS {
            return fail(grid, self, format!("expected a barrier below {BARRIERS}, got {id}"));
        }
        let expected = arrival.count.unwrap_or(block_threads);
        if !expected.is_multiple_of(32) || expected == 0 || expected > block_threads {
            let limit = "a multiple of 32 up to the block's";
            return fail(
                grid,
                self,
                format!("expected {limit} {block_threads} threads, got {expected}"),
            );
        }
        let barrier = &mut self.barriers[id];
        let first = *barrier.expected.get_or_insert(expected);
        if first != expected {
            let message =
                format!("barrier {id} waits for {first} threads, this warp says {expected}");
            return fail(grid, self, message);
        }
        barrier.arrived |= 1 << w;
        barrier.truths += arrival.truths;
        barrier.voters += arrival.voters;
        if matches!(arrival.kind, BarrierKind::Arrive) {
            grid.clocks.arrive(self.warps[w].global, arrival.id);
            self.warps[w].resume(None);
        } else {
            barrier.waiting |= 1 << w;
            self.warps[w].wait(arrival);
        }
        if barrier.arrived.count_ones() * 32 < expected {
            return Ok(());
        }
        let barrier = std::mem::take(barrier);
        grid.clocks.barrier(self.index, arrival.id, barrier.waiting.into());
        for w in (0..self.warps.len()).filter(|w| barrier.waiting >> w & 1 == 1) {
            let result = match self.warps[w].waits_as() {
                Some(BarrierKind::Popc(..)) => Some(barrier.truths),
                Some(BarrierKind::Reduce(Logic::And, ..)) => {
                    Some((barrier.truths == barrier.voters).into())
                }
                Some(BarrierKind::Reduce(..)) => Some((barrier.truths > 0).into()),
                _ => None,
            };
            self.warps[w].resume(result);
        }
        Ok(())
    }

    /// Every warp waits or is done: say at which barrier and who is missing.
    fn stuck(&self, grid: &Grid<'_>) -> Box<Report> {
        let (w, waiting) = self
            .warps
            .iter()
            .enumerate()
            .find_map(|(w, warp)| warp.waiting().map(|a| (w, a)))
            .expect("a warp that neither runs nor is done waits");
        let places: Vec<String> = self
            .warps
            .iter()
            .enumerate()
            .map(|(w, warp)| match warp.waiting() {
                Some(a) => format!("warp {w} at barrier {} ({})", a.id, grid.source(a.pc)),
                None => format!("warp {w} exited"),
            })
            .collect();
        let message = format!("a barrier that never completes: {}", places.join(", "));
        let fault = Fault::new(Class::DivergentBarrier, None, message);
        grid.report(fault, waiting.pc, self.id, w as u32)
    }
}
