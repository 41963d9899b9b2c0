//! What happened before what: vector clocks of stream operations, and of the warps of one launch after the PTX
//! memory model.
//!
//! The unit is the warp: what one lane acquires its whole warp has acquired, what one lane releases covers the whole
//! warp's earlier accesses. Lanes of one warp are kept apart only by [`Clocks::warp_sync`]. So an order may be seen
//! that the model does not give (a bug missed), never the reverse (a false alarm). Two things are accepted beyond the
//! letter of the model because kernels do them and hardware honours them: a block barrier hands on the fences of its
//! participants (`__threadfence(); __syncthreads();` and then an atomic of thread 0), and it hands on what they read
//! and have not fenced yet.

use super::Scope;
use super::tree::Tree;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Identity of a stream operation and what was ordered before it: a vector clock over streams and host threads.
#[derive(Debug, Clone)]
pub struct OpOrder {
    pub op: u32,
    /// Which stream or host thread it belongs to: an index into clocks.
    pub(super) ordinal: u32,
    /// Its place there, from 1.
    pub(super) seq: u32,
    clock: Arc<[u32]>,
}

impl OpOrder {
    /// `clock[i]` is the last place of stream or host thread `i` that comes before this operation.
    pub fn new(op: u32, ordinal: u32, seq: u32, clock: Vec<u32>) -> Self {
        Self { op, ordinal, seq, clock: clock.into() }
    }

    pub(super) fn follows(&self, ordinal: u32, seq: u32) -> bool {
        self.clock.get(ordinal as usize).is_some_and(|known| *known >= seq)
    }
}

/// What a warp knows, or what several know together.
#[derive(Debug, Clone, Default)]
struct Knowledge {
    /// Two clocks per warp of the block. The first stamps loads and plain stores, the second strong writes: a fence
    /// and a later flag store release what came before the fence and the flag itself, but not the plain stores
    /// between the two.
    clock: Vec<u32>,
    others: Tree,
    /// Snapshots at the last fence, by its scope: what a strong write releases.
    fenced: [Tree; 2],
    /// What relaxed loads read, by the scope of the fence that acquires it.
    unfenced: [Tree; 2],
}

impl Knowledge {
    fn learn(&mut self, clock: &[u32]) -> bool {
        let mut news = false;
        for (mine, theirs) in self.clock.iter_mut().zip(clock) {
            news |= theirs > mine;
            *mine = (*mine).max(*theirs);
        }
        news
    }

    fn absorb(&mut self, other: &Self) {
        self.learn(&other.clock);
        self.others = self.others.join(&other.others);
        for scope in [0, 1] {
            self.fenced[scope] = self.fenced[scope].join(&other.fenced[scope]);
            self.unfenced[scope] = self.unfenced[scope].join(&other.unfenced[scope]);
        }
    }
}

#[derive(Debug, Clone)]
struct Warp {
    known: Knowledge,
    /// Own clocks at the last barrier or `bar.warp.sync`: what is earlier is ordered for all lanes.
    synced: [u32; 2],
}

/// What the last strong write to a place released.
#[derive(Debug, Default)]
struct Location {
    /// To everyone.
    device: Tree,
    /// To the block that wrote: `.cta` releases too.
    blocks: BTreeMap<u32, Tree>,
}

/// The clocks of one launch.
pub struct Clocks {
    op: OpOrder,
    warps_per_block: u32,
    /// Depth of the trees.
    levels: u32,
    /// Of the blocks that run or ran, up to the last; None: not started or retired.
    blocks: Vec<Option<Box<[Warp]>>>,
    /// Warps that did `bar.arrive`, by block and barrier.
    arrivals: HashMap<(u32, u32), Knowledge>,
    locations: HashMap<u64, Location>,
    /// Warp, its block and its index there, of the access under way.
    current: (u32, u32, u32),
}

/// One warp's view of what is ordered before it.
pub(super) struct View<'a> {
    warp: &'a Warp,
    own: u32,
    first: u32,
    warps_per_block: u32,
    levels: u32,
}

impl Clocks {
    /// For a grid of `blocks`; nothing is kept for a block before it runs.
    pub fn new(op: &OpOrder, blocks: u32, warps_per_block: u32) -> Self {
        let bits = u32::BITS - blocks.saturating_sub(1).leading_zeros();
        Self {
            op: op.clone(),
            warps_per_block,
            levels: bits.div_ceil(4),
            blocks: Vec::new(),
            arrivals: HashMap::new(),
            locations: HashMap::new(),
            current: (0, 0, 0),
        }
    }

    pub(super) fn op(&self) -> &OpOrder {
        &self.op
    }

    pub(super) fn warps_per_block(&self) -> u32 {
        self.warps_per_block
    }

    /// The warp's own clock: counts its synchronisations.
    pub fn now(&mut self, warp: u32) -> u32 {
        let (_, _, own, state) = self.warp(warp);
        state.known.clock[own]
    }

    /// Forgets a block that ended; what it released stays.
    pub fn retire(&mut self, block: u32) {
        if let Some(warps) = self.blocks.get_mut(block as usize) {
            *warps = None;
        }
        self.arrivals.retain(|(of, _), _| *of != block);
    }

    /// Whether what `earlier` did at its clock (that of its strong writes, if `strong`) is ordered before what `now`
    /// does next; for one and the same warp, before what its other lanes do.
    #[cfg(test)]
    pub fn ordered(&mut self, earlier: u32, clock: u32, strong: bool, now: u32) -> bool {
        self.start(now);
        self.view().is_some_and(|view| view.ordered(earlier, clock, strong))
    }

    /// The warps of a block wait for each other at barrier `id`, along with those that arrived there.
    pub fn barrier(&mut self, block: u32, id: u32, warps: u64) {
        let mut sum = self.arrivals.remove(&(block, id)).unwrap_or_default();
        let all = self.block(block);
        sum.clock.resize(all.len() * 2, 0);
        let waits = |warp: &usize| warps >> warp & 1 == 1;
        for warp in (0..all.len()).filter(waits) {
            sum.absorb(&all[warp].known);
        }
        for warp in (0..all.len()).filter(waits) {
            all[warp].known.clone_from(&sum);
            all[warp].tick(2 * warp);
            all[warp].sync(2 * warp);
        }
    }

    /// `bar.arrive`: what the warp did is ordered before what follows the barrier; the warp itself goes on.
    pub fn arrive(&mut self, warp: u32, id: u32) {
        let (block, _, own, state) = self.warp(warp);
        let known = state.known.clone();
        state.tick(own);
        let sum = self.arrivals.entry((block, id)).or_default();
        sum.clock.resize(known.clock.len(), 0);
        sum.absorb(&known);
    }

    /// `bar.warp.sync`: orders the lanes of a warp. A partial mask counts as all of them.
    pub fn warp_sync(&mut self, warp: u32) {
        let (_, _, own, state) = self.warp(warp);
        state.tick(own);
        state.sync(own);
    }

    /// `fence` and `membar`: what was read relaxed is acquired, what follows releases.
    pub fn fence(&mut self, warp: u32, scope: Scope) {
        let (block, levels, own, state) = self.warp(warp);
        for reach in [Scope::Block, Scope::Device] {
            if reach <= scope {
                let read = std::mem::take(&mut state.known.unfenced[reach as usize]);
                state.acquire(levels, block, &read);
            }
        }
        let snapshot = state.snapshot(levels, block);
        state.known.fenced[Scope::Block as usize] = snapshot.clone();
        if scope == Scope::Device {
            state.known.fenced[Scope::Device as usize] = snapshot;
        }
        state.tick(own);
    }

    /// A strong write that is no atomic: what was released at these places before is no longer to be had there.
    pub(super) fn strong_store(
        &mut self,
        warp: u32,
        places: impl Iterator<Item = u64>,
        scope: Scope,
        release: bool,
    ) {
        let (block, [own, device]) = self.publish(warp, scope, release);
        for place in places {
            if own.is_empty() && device.is_empty() {
                self.locations.remove(&place);
            } else {
                let location = self.locations.entry(place).or_default();
                *location =
                    Location { device: device.clone(), blocks: [(block, own.clone())].into() };
            }
        }
    }

    /// A strong load: acquires at once, or at the warp's next fence.
    pub(super) fn strong_load(
        &mut self,
        warp: u32,
        places: impl Iterator<Item = u64>,
        scope: Scope,
        acquire: bool,
    ) {
        if self.locations.is_empty() {
            return;
        }
        for place in places {
            self.observe(warp, place, scope, acquire);
        }
    }

    /// An atomic: a strong load and a strong store that hands on what was released before.
    pub(super) fn rmw(
        &mut self,
        warp: u32,
        places: impl Iterator<Item = u64> + Clone,
        scope: Scope,
        acquire: bool,
        release: bool,
    ) {
        self.strong_load(warp, places.clone(), scope, acquire);
        let (block, [own, device]) = self.publish(warp, scope, release);
        if own.is_empty() && device.is_empty() {
            return;
        }
        for place in places {
            let location = self.locations.entry(place).or_default();
            location.device = location.device.join(&device);
            let of = location.blocks.entry(block).or_default();
            *of = of.join(&own);
        }
    }

    /// A plain store: nothing can be acquired here any more.
    pub(super) fn forget(&mut self, places: impl Iterator<Item = u64>) {
        if !self.locations.is_empty() {
            places.for_each(|place| drop(self.locations.remove(&place)));
        }
    }

    /// The view of the warp that started its access last.
    pub(super) fn view(&self) -> Option<View<'_>> {
        let (warp, block, index) = self.current;
        let warps = self.blocks.get(block as usize)?.as_ref()?;
        Some(View {
            warp: &warps[index as usize],
            own: 2 * index,
            first: warp - index,
            warps_per_block: self.warps_per_block,
            levels: self.levels,
        })
    }

    /// A warp starts an access.
    pub(super) fn start(&mut self, warp: u32) {
        let (block, _, own, _) = self.warp(warp);
        self.current = (warp, block, own as u32 / 2);
    }

    fn block(&mut self, block: u32) -> &mut [Warp] {
        let at = block as usize;
        if at >= self.blocks.len() {
            self.blocks.resize(at + 1, None);
        }
        let warps = self.warps_per_block as usize;
        self.blocks[at]
            .get_or_insert_with(|| (0..warps).map(|warp| Warp::new(warp, warps)).collect())
    }

    /// Block, depth of the trees, index of the warp's own clocks, and the warp.
    fn warp(&mut self, warp: u32) -> (u32, u32, usize, &mut Warp) {
        let (block, index) = (warp / self.warps_per_block, (warp % self.warps_per_block) as usize);
        let levels = self.levels;
        (block, levels, 2 * index, &mut self.block(block)[index])
    }

    fn observe(&mut self, warp: u32, place: u64, scope: Scope, acquire: bool) {
        let block = warp / self.warps_per_block;
        let Some(location) = self.locations.get(&place) else { return };
        let mut seen = [location.blocks.get(&block).cloned().unwrap_or_default(), Tree::Empty];
        if scope == Scope::Device {
            seen[Scope::Device as usize] = location.device.clone();
        }
        let (_, levels, own, state) = self.warp(warp);
        let mut news = false;
        for (unfenced, seen) in state.known.unfenced.iter_mut().zip(&seen) {
            if !acquire {
                *unfenced = unfenced.join(seen);
            }
        }
        if acquire {
            news |= state.acquire(levels, block, &seen[0]);
            news |= state.acquire(levels, block, &seen[1]);
        }
        if news {
            // The race shadow counts on it: at one clock, a warp knows the same.
            state.tick(own);
        }
    }

    /// What a strong write of this warp releases, to its block and to the device, with the write itself.
    fn publish(&mut self, warp: u32, scope: Scope, release: bool) -> (u32, [Tree; 2]) {
        let (block, levels, own, state) = self.warp(warp);
        let mut released = if release {
            let snapshot = state.snapshot(levels, block);
            state.tick(own);
            [snapshot.clone(), snapshot]
        } else {
            let strong = state.known.clock[own + 1];
            let with_write = |tree: &Tree| {
                tree.get(levels, block).map_or(Tree::Empty, |clocks| {
                    let mut clocks = clocks.to_vec();
                    clocks[own + 1] = strong;
                    tree.with(levels, block, clocks.into())
                })
            };
            let released = [with_write(&state.known.fenced[0]), with_write(&state.known.fenced[1])];
            if !released[0].is_empty() {
                state.known.clock[own + 1] += 1;
            }
            released
        };
        if scope == Scope::Block {
            released[Scope::Device as usize] = Tree::Empty;
        }
        (block, released)
    }
}

impl Warp {
    fn new(index: usize, warps: usize) -> Self {
        let mut clock = vec![0; 2 * warps];
        clock[2 * index..2 * index + 2].fill(1);
        Self { known: Knowledge { clock, ..Knowledge::default() }, synced: [1, 1] }
    }

    fn tick(&mut self, own: usize) {
        self.known.clock[own] += 1;
        self.known.clock[own + 1] += 1;
    }

    fn sync(&mut self, own: usize) {
        self.synced = [self.known.clock[own], self.known.clock[own + 1]];
    }

    fn snapshot(&self, levels: u32, block: u32) -> Tree {
        self.known.others.with(levels, block, self.known.clock.as_slice().into())
    }

    /// Joins a released snapshot; whether it told anything about the own block or other blocks is what ticks.
    fn acquire(&mut self, levels: u32, block: u32, released: &Tree) -> bool {
        if released.is_empty() {
            return false;
        }
        let joined = self.known.others.join(released);
        let mut news = !joined.same(&self.known.others);
        self.known.others = joined;
        if let Some(clocks) = released.get(levels, block) {
            news |= self.known.learn(clocks);
        }
        news
    }
}

impl View<'_> {
    /// The clock that stamps an access: strong writes have their own.
    pub(super) fn stamp(&self, strong_write: bool) -> u32 {
        self.warp.known.clock[(self.own + u32::from(strong_write)) as usize]
    }

    pub(super) fn same_block(&self, warp: u32) -> bool {
        warp.wrapping_sub(self.first) < self.warps_per_block
    }

    pub(super) fn ordered(&self, earlier: u32, clock: u32, strong: bool) -> bool {
        if !self.same_block(earlier) {
            let block = earlier / self.warps_per_block;
            let at = (2 * (earlier % self.warps_per_block) + u32::from(strong)) as usize;
            return self
                .warp
                .known
                .others
                .get(self.levels, block)
                .is_some_and(|known| known[at] >= clock);
        }
        let index = 2 * (earlier - self.first);
        if index == self.own {
            return clock < self.warp.synced[usize::from(strong)];
        }
        self.warp.known.clock[(index + u32::from(strong)) as usize] >= clock
    }
}
