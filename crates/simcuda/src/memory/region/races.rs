//! A region's accesses in its race shadow, what they mean to the clocks, and what is said of a race.

use super::{Region, Space};
use crate::Class;
use crate::memory::records::{Conflict, HOST, Kind, Who};
use crate::memory::{Clocks, Fault, Lanes, OpOrder, Order, Request, Run};

impl Region {
    pub(super) fn host_race(
        &mut self,
        at: u64,
        bytes: u64,
        write: bool,
        op: &OpOrder,
    ) -> Result<(), Fault> {
        let order = Order::Weak;
        let who = Who { op, view: None, warp: HOST, inst: 0, write, order, non_coherent: false };
        self.shadow.host_access(at, bytes, &who).map_err(|conflict| {
            let does = if write { "writes" } else { "reads" };
            let bytes = format!("{bytes} bytes from {} on", self.describe(at));
            let (op, other, did) = (op.op, conflict.other_op, conflict.did());
            let message = format!(
                "operation #{op} {does} {bytes}; operation #{other} {did} some of them, and nothing orders it before"
            );
            Fault::new(Class::StreamRace, None, message)
        })
    }

    /// Enters a warp's access in the shadow. Says whether a plain store met a strong write of its launch.
    fn access(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &Clocks,
        write: bool,
    ) -> Result<bool, Conflict> {
        let Request { warp, inst, order, non_coherent, .. } = *r;
        let who =
            Who { op: clocks.op(), view: clocks.view(), warp, inst, write, order, non_coherent };
        self.shadow.access(run, &who)
    }

    /// A write of bytes that nobody could touch since it was announced: it is theirs now, at the present clock.
    pub(super) fn settle(&mut self, run: Run, r: &Request<'_>, clocks: &Clocks) {
        let Request { warp, inst, order, non_coherent, .. } = *r;
        let view = clocks.view();
        let who = Who { op: clocks.op(), view, warp, inst, write: true, order, non_coherent };
        self.shadow.settle(run, &who);
    }

    pub(super) fn race(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        write: bool,
    ) -> Result<bool, Fault> {
        self.access(run, r, clocks, write)
            .map_err(|conflict| self.race_fault(&conflict, &run, r, clocks, write))
    }

    pub(super) fn write_race(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        from: &Lanes,
    ) -> Result<(), Fault> {
        let mut rest = Some(run);
        let mut met_strong = false;
        while let Some(part) = rest.take() {
            match self.access(part, r, clocks, true) {
                Ok(met) => met_strong |= met,
                // Lanes of one store may write the same value to one place.
                Err(conflict) if same_store(&conflict, r, from) => {
                    met_strong = true;
                    rest = part.skip(conflict.lane + 1 - part.lane);
                }
                Err(conflict) => return Err(self.race_fault(&conflict, &part, r, clocks, true)),
            }
        }
        let places = self.places(&run, r.warp, clocks);
        match r.order {
            // Half a word says nothing about what the other half releases.
            Order::Strong(scope) if run.width < 4 => {
                clocks.rmw(r.warp, places, scope, false, r.release)
            }
            Order::Strong(scope) => clocks.strong_store(r.warp, places, scope, r.release),
            Order::Weak if met_strong && run.width >= 4 => clocks.forget(places),
            Order::Weak => {}
        }
        Ok(())
    }

    /// The words of a run, named so that no two blocks' shared memories and no allocations are mixed up.
    pub(super) fn places(
        &self,
        run: &Run,
        warp: u32,
        clocks: &Clocks,
    ) -> impl Iterator<Item = u64> + Clone + use<> {
        let base = match self.space {
            Space::Global { base, .. } => base,
            _ => 1 << 63 | u64::from(warp / clocks.warps_per_block()) << 32,
        };
        (base + (run.at & !3)..base + run.at + run.bytes()).step_by(4)
    }

    fn race_fault(
        &self,
        conflict: &Conflict,
        run: &Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        write: bool,
    ) -> Fault {
        let at =
            run.at + if run.same { 0 } else { u64::from((conflict.lane - run.lane) * run.width) };
        let warps = clocks.warps_per_block();
        let party =
            |lane, warp| format!("lane {lane} of warp {} in block {}", warp % warps, warp / warps);
        let me = format!("{} (epoch {})", party(conflict.lane, r.warp), clocks.now(r.warp));
        let (does, did, place) =
            (if write { "writes" } else { "reads" }, conflict.did(), self.describe(at));
        let other = &conflict.other;
        let here = clocks.op().op;
        let (class, message) = match conflict.kind {
            Kind::StreamRace => {
                let whose = conflict.other_op;
                let order = format!("nothing orders it before this launch, operation #{here}");
                (
                    Class::StreamRace,
                    format!("{me} {does} {place}; operation #{whose} {did} it, and {order}"),
                )
            }
            kind => {
                let whom = party(conflict.other_lane, other.warp);
                let whom =
                    format!("{whom} {did} it at inst #{} (epoch {})", other.inst, other.clock);
                if kind == Kind::ReadOnly {
                    (Class::ReadOnly, format!("{me} reads {place} by .nc; in this launch {whom}"))
                } else {
                    (
                        Class::Race,
                        format!("{me} {does} {place}; {whom}, and nothing orders the two"),
                    )
                }
            }
        };
        let other_inst = (conflict.kind != Kind::StreamRace).then_some(other.inst);
        Fault { class, lane: Some(conflict.lane), message, other_inst }
    }
}

/// Whether the other party is an earlier lane of the very same store, with the same value.
fn same_store(conflict: &Conflict, r: &Request<'_>, from: &Lanes) -> bool {
    let (mine, other, width) =
        (conflict.lane as usize, conflict.other_lane as usize, r.width as usize);
    conflict.same_record
        && other < mine
        && r.mask >> other & 1 == 1
        && r.addresses[other] == r.addresses[mine]
        && from[other][..width] == from[mine][..width]
}
