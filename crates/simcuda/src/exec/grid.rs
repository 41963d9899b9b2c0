//! The grid: which block runs when, what all blocks share, and reports with their place in the source.

use super::alu::Env;
use super::block::{Block, Turn};
use super::{Launch, Outcome};
use crate::counters::Meter;
use crate::decode::Code;
use crate::driver::occupancy::device_blocks;
use crate::memory::{Clocks, Fault, Memory, Region};
use crate::{Class, Policy, Report, Schedule};

/// Warp instructions of all resident warps without any effect after which they count as stuck: longer than any
/// computation between two stores, a second or so.
const PATIENCE: u64 = 20_000_000;

/// Instructions that a warp runs in its turn where the schedule does not say. Long, because blocks in order is the
/// common case; finite, because a warp may spin until another has run.
const LONG_TURN: u64 = 100_000;

/// A launch while it runs.
pub(super) struct Grid<'a> {
    pub launch: &'a Launch<'a>,
    pub code: &'a Code,
    pub memory: &'a mut Memory,
    pub policy: &'a Policy,
    pub clocks: Clocks,
    pub meter: Meter,
    pub env: Env,
    pub printed: String,
    pub warps_per_block: u32,
    /// Warp instructions so far.
    pub instructions: u64,
    /// `instructions` when something last happened that others can see.
    progress_at: u64,
    random: u64,
}

/// Runs a launch to its end or to its first fault. Deterministic: the same launch, memory and policy give the same.
pub fn run(launch: &Launch<'_>, memory: &mut Memory, policy: &Policy) -> Outcome {
    let threads = launch.block.iter().product::<u32>();
    let blocks = launch.grid.iter().product::<u32>();
    let warps_per_block = threads.div_ceil(32);
    let mut meter = Meter::default();
    let shared = launch.kernel.shared_bytes + launch.dynamic_shared;
    meter.launch(blocks.into(), threads.into(), shared.into());
    let mut grid = Grid {
        launch,
        code: &launch.kernel.code,
        memory,
        policy,
        clocks: Clocks::new(&launch.op, blocks, warps_per_block),
        meter,
        env: Env { perturb: policy.perturb.then_some(policy.seed) },
        printed: String::new(),
        warps_per_block,
        instructions: 0,
        progress_at: 0,
        random: policy.seed,
    };
    let report = grid.blocks(blocks).err().map(|report| *report);
    Outcome { counters: grid.meter.finish(), report, printed: grid.printed }
}

impl Grid<'_> {
    fn blocks(&mut self, blocks: u32) -> Result<(), Box<Report>> {
        // Blocks may wait for each other as far as an H100 holds them at once, and no further.
        let threads = self.launch.block.iter().product();
        let resident = device_blocks(self.launch.kernel, threads, self.launch.dynamic_shared);
        let resident = resident.max(1) as usize;
        let (resident, quantum, in_order) = match self.policy.schedule {
            Schedule::InOrder => (resident, LONG_TURN, true),
            Schedule::Quantum(n) => (resident, n.max(1).into(), false),
            Schedule::OneBlock => (1, LONG_TURN, true),
            Schedule::Random => (resident, 0, false),
        };
        let random = self.policy.schedule == Schedule::Random;
        let mut order: Vec<u32> = (0..blocks).rev().collect();
        if self.policy.schedule == Schedule::OneBlock {
            order.reverse();
        }
        if random {
            for i in (1..order.len()).rev() {
                order.swap(i, self.random(i as u64 + 1) as usize);
            }
        }
        let mut running: Vec<Block> = Vec::new();
        let mut spare: Vec<Block> = Vec::new();
        let mut at = 0;
        while !(running.is_empty() && order.is_empty()) {
            // In order, the next block starts when those before it are done or have had a long turn.
            let room = running.len() < resident && (!in_order || at >= running.len());
            if room && let Some(index) = order.pop() {
                let block = match spare.pop() {
                    Some(mut block) => {
                        block.restart(self, index);
                        block
                    }
                    None => Block::new(self, index),
                };
                running.push(block);
                if !in_order {
                    continue;
                }
            }
            at %= running.len();
            let mut block = running.swap_remove(at);
            let turn = if random { 1 + self.random(200) } else { quantum };
            match block.turn(self, turn)? {
                Turn::Done => {
                    self.clocks.retire(block.index);
                    spare.push(block);
                }
                Turn::Running => {
                    running.push(block);
                    let last = running.len() - 1;
                    running.swap(at, last);
                    at = if random { self.random(running.len() as u64) as usize } else { at + 1 };
                }
            }
            if self.instructions - self.progress_at > PATIENCE
                && let Some(block) = running.first()
            {
                return Err(self.stuck(block));
            }
        }
        Ok(())
    }

    fn stuck(&self, block: &Block) -> Box<Report> {
        let idle = self.instructions - self.progress_at;
        let message = format!(
            "{idle} warp instructions without a store that changed anything: a wait that nobody ends \
             (schedule {:?})",
            self.policy.schedule
        );
        let warp = block.warps.iter().position(|w| !w.done()).unwrap_or(0);
        let pc = block.warps[warp].pc();
        self.report(Fault::new(Class::Deadlock, None, message), pc, block.id, warp as u32)
    }

    /// Something happened that others can see.
    pub fn progress(&mut self) {
        self.progress_at = self.instructions;
    }

    /// Which warp of a block goes first.
    pub fn first_warp(&mut self, next: usize, count: usize) -> usize {
        if self.policy.schedule == Schedule::Random {
            self.random(count as u64) as usize
        } else {
            next
        }
    }

    /// The next number below `n`, of the seed (splitmix64).
    fn random(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % n
    }

    pub fn shared_region(&self) -> Region {
        let mut variables: Vec<(String, u32, u32)> =
            self.code.shared.iter().map(|r| (r.name.clone(), r.offset, r.bytes)).collect();
        let dynamic = self.launch.dynamic_shared;
        if dynamic > 0 {
            variables.push(("dynamic shared memory".to_owned(), self.code.shared_end, dynamic));
        }
        Region::shared(&variables, self.code.shared_end + dynamic)
    }

    /// `file:line` of an instruction.
    pub fn source(&self, pc: u32) -> String {
        let place = self.code.places[pc as usize];
        match self.code.sources.get(&place.source.0) {
            Some(file) => format!("{file}:{}", place.source.1),
            None => format!("PTX line {}", place.line),
        }
    }

    /// A finding with its place.
    pub fn report(&self, fault: Fault, pc: u32, block: [u32; 3], warp: u32) -> Box<Report> {
        let mut message = fault.message;
        if let Some(other) = fault.other_inst
            && let Some(text) = self.code.texts.get(other as usize)
        {
            let place = format!("`{text}` at {}", self.source(other));
            message = message.replace(&format!("inst #{other}"), &place);
        }
        let size = self.launch.block;
        let thread = fault.lane.map(|lane| {
            let t = warp * 32 + lane;
            (block, [t % size[0], t / size[0] % size[1], t / size[0] / size[1]])
        });
        Box::new(Report {
            class: fault.class,
            message,
            kernel: self.launch.kernel.name.clone(),
            source: Some(self.source(pc)),
            instruction: self.code.texts[pc as usize].clone(),
            thread,
        })
    }
}
