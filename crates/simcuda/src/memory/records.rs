//! Who touched what: the accesses that the race shadow's cells name by number, and the rule for two accesses of one
//! cell.
//!
//! A cell is three slots of `record << 5 | lane`, 0 for none: the last write, and two other accesses that a later
//! one may still race with. The two are readers since the write, or strong writes that the last write does not hide.
//! Two readers are kept exactly. Of more, two of different warps are kept where there are such, so a writer that is
//! ordered after none of them is always found; one that is ordered after the kept and not after the dropped is
//! missed. Whatever a slot holds did happen, so nothing is reported that did not.

use super::clocks::View;
use super::{OpOrder, Order, Scope};

/// One warp instruction, or one operation of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Index into [`Records::ops`].
    op: u32,
    /// [`HOST`] for copies and fills.
    pub(super) warp: u32,
    pub(super) clock: u32,
    pub(super) inst: u32,
    pub(super) write: bool,
    rank: Rank,
}

/// The `warp` of a copy or fill.
pub(super) const HOST: u32 = u32::MAX;

/// How much an access may meet: the higher, the fewer accesses conflict with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Weak,
    Block,
    Device,
}

/// The accessing party.
pub(super) struct Who<'a> {
    pub(super) op: &'a OpOrder,
    /// None: the host.
    pub(super) view: Option<View<'a>>,
    pub(super) warp: u32,
    pub(super) inst: u32,
    pub(super) write: bool,
    pub(super) order: Order,
    pub(super) non_coherent: bool,
}

/// Two accesses that must not meet.
#[derive(Debug)]
pub(super) struct Conflict {
    pub(super) kind: Kind,
    /// The earlier one.
    pub(super) other: Record,
    pub(super) other_lane: u32,
    /// Operation of the earlier one.
    pub(super) other_op: u32,
    /// Same instruction and clock of the same warp: it may be the same execution.
    pub(super) same_record: bool,
    pub(super) lane: u32,
}

impl Conflict {
    /// What the earlier party did.
    pub(super) fn did(&self) -> &'static str {
        if self.other.write { "wrote" } else { "read" }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Race,
    StreamRace,
    /// A `.nc` load of what this launch wrote.
    ReadOnly,
}

/// The last write and two other accesses.
pub(super) type Cell = [u32; 3];

/// How an earlier access stands to the present one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    Unordered,
    /// Of the same warp since its last synchronisation: before, if of the same lane.
    SameWarp,
}

#[derive(Clone, Copy)]
struct Past {
    record: Record,
    when: When,
}

/// What an access does to a cell that it may touch.
#[derive(Debug, Clone, Copy, Default)]
struct Plan {
    /// The slot of the two others that a read takes, or the last write when there is a new one.
    place: Option<usize>,
    /// The other slots that say nothing any more.
    clear: [bool; 2],
    met_strong: bool,
}

#[derive(Debug, Clone, Copy)]
struct Operation {
    op: u32,
    ordinal: u32,
    seq: u32,
}

/// The accesses of a region.
#[derive(Debug)]
pub(super) struct Records {
    /// The first is none.
    all: Vec<Record>,
    /// Last record by instruction, to find it again in a loop.
    recent: [u32; 16],
    ops: Vec<Operation>,
    /// The last plan and the records it was for: the new access's (and whether it is `.nc`) and the cell's. It holds
    /// as long as the records do, because a warp that comes to know more also gets a new clock.
    known: ([u32; 4], Plan),
}

const LANE: u32 = 31;

impl Default for Records {
    fn default() -> Self {
        let none = Record { op: 0, warp: HOST, clock: 0, inst: 0, write: false, rank: Rank::Weak };
        Self { all: vec![none], recent: [0; 16], ops: Vec::new(), known: Default::default() }
    }
}

impl Records {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn reset(&mut self) {
        self.all.truncate(1);
        self.recent = [0; 16];
        self.known = Default::default();
        self.ops.clear();
    }

    /// Keeps the records named by `used` (by number) and gives the new numbers.
    pub(super) fn compact(&mut self, used: &[bool]) -> Vec<u32> {
        let mut kept = 0;
        let renumbered = (0..self.all.len()).map(|old| {
            let number = kept;
            if old == 0 || used[old] {
                self.all[number as usize] = self.all[old];
                kept += 1;
            }
            number
        });
        let renumbered = renumbered.collect();
        self.all.truncate(kept as usize);
        self.recent = [0; 16];
        self.known = Default::default();
        renumbered
    }

    /// The slot value of an access, for lane 0.
    pub(super) fn note(&mut self, who: &Who<'_>) -> u32 {
        let op = self.operation(who.op);
        let rank = match who.order {
            Order::Weak => Rank::Weak,
            Order::Strong(Scope::Block) => Rank::Block,
            Order::Strong(Scope::Device) => Rank::Device,
        };
        let strong_write = who.write && rank != Rank::Weak;
        let clock = who.view.as_ref().map_or(0, |view| view.stamp(strong_write));
        let record = Record { op, warp: who.warp, clock, inst: who.inst, write: who.write, rank };
        let recent = &mut self.recent[who.inst as usize % 16];
        if self.all[*recent as usize] != record || *recent == 0 {
            *recent = self.all.len() as u32;
            self.all.push(record);
        }
        *recent << 5
    }

    fn operation(&mut self, of: &OpOrder) -> u32 {
        let known = |op: &Operation| op.op == of.op;
        if let Some(at) = self.ops.iter().rposition(known) {
            return at as u32;
        }
        self.ops.push(Operation { op: of.op, ordinal: of.ordinal, seq: of.seq });
        self.ops.len() as u32 - 1
    }

    /// Checks an access to some cells against their slots and enters it. `mine` is its slot value for lane 0; cell
    /// `i` is touched by lane `lane + (i >> per_lane)`. Says whether a plain store met a strong write of its launch.
    pub(super) fn touch(
        &mut self,
        cells: &mut [Cell],
        mine: u32,
        lane: u32,
        per_lane: u32,
        who: &Who<'_>,
    ) -> Result<bool, Conflict> {
        let (mut at, mut met_strong) = (0, false);
        while at < cells.len() {
            let mine_at = |i: usize| mine | (lane + ((at + i) as u32 >> per_lane));
            let rest = &mut cells[at..];
            let mut like = alike(rest);
            let [w, a, b] = rest[0].map(|slot| slot >> 5);
            let question = [mine >> 5 | u32::from(who.non_coherent) << 31, w, a, b];
            let plan = match self.known {
                (asked, plan) if asked == question => plan,
                _ => {
                    let me = self.all[(mine >> 5) as usize];
                    let mut past = rest[0].map(|slot| self.past(slot, &me, who));
                    let by_lane = past.iter().flatten().any(|past| past.when == When::SameWarp);
                    if by_lane {
                        // As far as the lanes agree.
                        let same = |i: usize| rest[i].map(|slot| (slot ^ mine_at(i)) & LANE == 0);
                        let lanes = same(0);
                        like = (1..like).find(|i| same(*i) != lanes).unwrap_or(like);
                        past.iter_mut().zip(lanes).for_each(|(past, same)| {
                            past.iter_mut().for_each(|past| past.decide(same));
                        });
                    }
                    for (slot, past) in rest[0].iter().zip(past) {
                        if let Some(past) = past
                            && let Some(kind) = past.conflict(&me, who)
                        {
                            return Err(Conflict {
                                kind,
                                other: past.record,
                                other_lane: slot & LANE,
                                other_op: self.ops[past.record.op as usize].op,
                                same_record: slot >> 5 == mine >> 5,
                                lane: mine_at(0) & LANE,
                            });
                        }
                    }
                    let plan = Plan::new(&me, past);
                    if !by_lane {
                        self.known = (question, plan);
                    }
                    plan
                }
            };
            met_strong |= plan.met_strong;
            plan.enter(who.write, &mut rest[..like], mine_at);
            at += like;
        }
        Ok(met_strong)
    }

    fn past(&self, slot: u32, me: &Record, who: &Who<'_>) -> Option<Past> {
        if slot == 0 {
            return None;
        }
        let record = self.all[(slot >> 5) as usize];
        let before = |before| if before { When::Before } else { When::Unordered };
        let when = if record.op != me.op {
            let op = self.ops[record.op as usize];
            before(who.op.follows(op.ordinal, op.seq))
        } else if let Some(view) = &who.view {
            let strong_write = record.write && record.rank != Rank::Weak;
            match view.ordered(record.warp, record.clock, strong_write) {
                false if record.warp == me.warp => When::SameWarp,
                ordered => before(ordered),
            }
        } else {
            When::Before
        };
        Some(Past { record, when })
    }
}

impl Past {
    /// Of the same warp: whether it is of the same lane.
    fn decide(&mut self, same_lane: bool) {
        if self.when == When::SameWarp {
            self.when = if same_lane { When::Before } else { When::Unordered };
        }
    }

    fn conflict(&self, me: &Record, who: &Who<'_>) -> Option<Kind> {
        let same_op = self.record.op == me.op;
        if who.non_coherent && same_op && self.record.write {
            return Some(Kind::ReadOnly);
        }
        if self.when == When::Before || !(me.write || self.record.write) {
            return None;
        }
        let same_block =
            same_op && who.view.as_ref().is_some_and(|view| view.same_block(self.record.warp));
        let reach = if same_block { Rank::Block } else { Rank::Device };
        let meet = me.rank.min(self.record.rank) >= reach;
        (!meet).then_some(if same_op { Kind::Race } else { Kind::StreamRace })
    }

    /// Whether everything that could race with it would race with `me` too.
    fn hidden_by(&self, me: &Record) -> bool {
        self.when == When::Before && (me.write || !self.record.write) && me.rank <= self.record.rank
    }
}

/// How many cells from the first on name the same records.
fn alike(cells: &[Cell]) -> usize {
    if cells.len() == 1 {
        return 1;
    }
    // Four cells at a time, to be compared as vectors.
    let pattern: [u32; 12] = std::array::from_fn(|i| cells[0][i % 3]);
    let differ = |of: &[Cell]| {
        let (fours, rest) = of.as_flattened().as_chunks::<12>();
        let mut all = [0; 12];
        for four in fours {
            for i in 0..12 {
                all[i] |= four[i] ^ pattern[i];
            }
        }
        for (i, slot) in rest.iter().enumerate() {
            all[i] |= slot ^ pattern[i];
        }
        all.into_iter().fold(0, |all, bits| all | bits) > LANE
    };
    if !differ(cells) {
        return cells.len();
    }
    cells.iter().position(|cell| differ(std::slice::from_ref(cell))).unwrap_or(cells.len())
}

impl Plan {
    fn new(me: &Record, past: [Option<Past>; 3]) -> Self {
        let kept = past.map(|past| past.filter(|past| !past.hidden_by(me)).map(|past| past.record));
        let newcomer = if me.write { kept[0] } else { Some(*me) };
        let place = newcomer.and_then(|newcomer| place(kept[1], kept[2], &newcomer, me.op));
        let strong = |past: Past| past.record.op == me.op && past.record.rank != Rank::Weak;
        Self {
            place,
            clear: [1, 2].map(|slot| past[slot].is_some() && kept[slot].is_none()),
            met_strong: me.write && me.rank == Rank::Weak && past[0].is_some_and(strong),
        }
    }

    fn enter(self, write: bool, cells: &mut [Cell], mine: impl Fn(usize) -> u32) {
        for slot in [1, 2] {
            if self.place == Some(slot) && write {
                cells.iter_mut().for_each(|cell| cell[slot] = cell[0]);
            } else if self.place == Some(slot) {
                cells.iter_mut().enumerate().for_each(|(i, cell)| cell[slot] = mine(i));
            } else if self.clear[slot - 1] {
                cells.iter_mut().for_each(|cell| cell[slot] = 0);
            }
        }
        if write {
            cells.iter_mut().enumerate().for_each(|(i, cell)| cell[0] = mine(i));
        }
    }
}

/// Which of the two other slots a third access takes, if any: a free one; else that of an earlier operation; else
/// that of the access which fewest can race with; of equals that of its own warp, so that different warps stay.
fn place(a: Option<Record>, b: Option<Record>, newcomer: &Record, op: u32) -> Option<usize> {
    let (Some(a), Some(b)) = (a, b) else { return Some(if a.is_none() { 1 } else { 2 }) };
    let idle = |record: &Record| (record.op != op, record.rank);
    let most = idle(&a).max(idle(&b)).max(idle(newcomer));
    match (idle(&a) == most, idle(&b) == most) {
        (false, false) => None,
        (true, true) => Some(if newcomer.warp == b.warp { 2 } else { 1 }),
        (only_a, _) => Some(if only_a { 1 } else { 2 }),
    }
}
