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

/// The three slots of some cells.
pub(super) struct Slots<'a> {
    pub(super) write: &'a mut [u32],
    pub(super) a: &'a mut [u32],
    pub(super) b: &'a mut [u32],
}

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
}

const LANE: u32 = 31;

impl Default for Records {
    fn default() -> Self {
        let none = Record { op: 0, warp: HOST, clock: 0, inst: 0, write: false, rank: Rank::Weak };
        Self { all: vec![none], recent: [0; 16], ops: Vec::new() }
    }
}

impl Records {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn reset(&mut self) {
        self.all.truncate(1);
        self.recent = [0; 16];
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
        &self,
        slots: Slots<'_>,
        mine: u32,
        lane: u32,
        per_lane: u32,
        who: &Who<'_>,
    ) -> Result<bool, Conflict> {
        let Slots { write, a, b } = slots;
        let me = self.all[(mine >> 5) as usize];
        let (mut at, mut met_strong) = (0, false);
        while at < write.len() {
            let mine_at = |i: usize| mine | (lane + ((at + i) as u32 >> per_lane));
            let (w, a, b) = (&mut write[at..], &mut a[at..], &mut b[at..]);
            let mut like = alike(w, a, b);
            let cell = [w[0], a[0], b[0]];
            let mut past = cell.map(|slot| self.past(slot, &me, who));
            if past.iter().flatten().any(|past| past.when == When::SameWarp) {
                // Lanes decide: as far as they agree.
                let same =
                    |i: usize| [w[i], a[i], b[i]].map(|slot| (slot ^ mine_at(i)) & LANE == 0);
                let lanes = same(0);
                like = (1..like).find(|i| same(*i) != lanes).unwrap_or(like);
                for (past, same) in past.iter_mut().zip(lanes) {
                    if let Some(past) = past.as_mut().filter(|past| past.when == When::SameWarp) {
                        past.when = if same { When::Before } else { When::Unordered };
                    }
                }
            }
            for (slot, past) in cell.iter().zip(past).filter_map(|(slot, past)| Some((slot, past?)))
            {
                if let Some(kind) = past.conflict(&me, who) {
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
            let strong = |past: Past| past.record.op == me.op && past.record.rank != Rank::Weak;
            met_strong |= me.write && me.rank == Rank::Weak && past[0].is_some_and(strong);
            enter(&me, past, [&mut w[..like], &mut a[..like], &mut b[..like]], mine_at);
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
fn alike(w: &[u32], a: &[u32], b: &[u32]) -> usize {
    let (w0, a0, b0) = (w[0], a[0], b[0]);
    let differ = |from: usize, to: usize| {
        let cells = w[from..to].iter().zip(&a[from..to]).zip(&b[from..to]);
        cells.fold(0, |all, ((w, a), b)| all | (w ^ w0) | (a ^ a0) | (b ^ b0)) > LANE
    };
    if !differ(0, w.len()) {
        return w.len();
    }
    let mut from = 0;
    while !differ(from, (from + 16).min(w.len())) {
        from += 16;
    }
    (from..w.len()).find(|i| differ(*i, i + 1)).unwrap_or(w.len())
}

/// Puts an access into cells that agree in what their slots hold.
fn enter(
    me: &Record,
    past: [Option<Past>; 3],
    slots: [&mut [u32]; 3],
    mine: impl Fn(usize) -> u32,
) {
    let [write, a, b] = slots;
    let fill = |slot: &mut [u32]| slot.iter_mut().enumerate().for_each(|(i, slot)| *slot = mine(i));
    let kept = past.map(|past| past.filter(|past| !past.hidden_by(me)).map(|past| past.record));
    let newcomer = if me.write { kept[0] } else { Some(*me) };
    let place = newcomer.and_then(|newcomer| place(kept[1], kept[2], &newcomer));
    for (i, slot) in [(1, a), (2, b)] {
        if place != Some(i) {
            if past[i].is_some() && kept[i].is_none() {
                slot.fill(0);
            }
        } else if me.write {
            slot.copy_from_slice(write);
        } else {
            fill(slot);
        }
    }
    if me.write {
        fill(write);
    }
}

/// Which of the two other slots a third access takes, if any: a free one; else that of the access which fewest can
/// race with, and of equals that of its own warp, so that different warps stay.
fn place(a: Option<Record>, b: Option<Record>, newcomer: &Record) -> Option<usize> {
    let (Some(a), Some(b)) = (a, b) else { return Some(if a.is_none() { 1 } else { 2 }) };
    let least = a.rank.max(b.rank).max(newcomer.rank);
    match (a.rank == least, b.rank == least) {
        (false, false) => None,
        (true, true) => Some(if newcomer.warp == b.warp { 2 } else { 1 }),
        (only_a, _) => Some(if only_a { 1 } else { 2 }),
    }
}
