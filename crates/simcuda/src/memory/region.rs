//! A piece of memory with what is known of each byte: a global allocation, a block's shared memory, or a warp's local
//! memory.

mod races;

use super::clocks::Clocks;
use super::shadow::Shadow;
use super::{Fault, Lanes, OpOrder, Order, Request, Run, bits::Bits, runs};
use crate::{Checks, Class};

pub struct Region {
    space: Space,
    data: Vec<u8>,
    /// Bytes that were written.
    init: Bits,
    /// Bytes that an outstanding `cp.async` will write; None before the first.
    pending: Option<Bits>,
    shadow: Shadow,
}

enum Space {
    Global {
        base: u64,
        number: usize,
    },
    /// With its variables, ascending.
    Shared(Vec<Variable>),
    /// One copy per lane, each of `bytes`, `stride` apart.
    Local {
        bytes: u64,
        stride: u64,
    },
}

struct Variable {
    name: String,
    at: u64,
    end: u64,
}

impl Region {
    /// The `number`th allocation of a device, at generic address `base`.
    pub(super) fn global(base: u64, number: usize, bytes: u64) -> Self {
        Self::new(Space::Global { base, number }, bytes)
    }

    /// A block's shared memory. Accesses must lie within one of the variables (name, offset, bytes): what lies
    /// between them is red zone.
    pub fn shared(variables: &[(String, u32, u32)], total: u32) -> Self {
        let variable = |(name, at, bytes): &(String, u32, u32)| Variable {
            name: name.clone(),
            at: u64::from(*at),
            end: u64::from(*at) + u64::from(*bytes),
        };
        let mut variables: Vec<_> = variables.iter().map(variable).collect();
        variables.sort_by_key(|variable| variable.at);
        let end = variables.iter().map(|variable| variable.end).max().unwrap_or(0);
        Self::new(Space::Shared(variables), u64::from(total).max(end))
    }

    /// A warp's local memory: `bytes` for each lane, which all start at offset 0.
    pub fn local(bytes: u32) -> Self {
        let (bytes, stride) = (u64::from(bytes), u64::from(bytes).next_multiple_of(16));
        Self::new(Space::Local { bytes, stride }, 32 * stride)
    }

    fn new(space: Space, bytes: u64) -> Self {
        let data = vec![0; bytes as usize];
        Self { space, data, init: Bits::new(bytes), pending: None, shadow: Shadow::default() }
    }

    /// As new, for the next block: the bytes stay, but nobody wrote them.
    pub fn reset(&mut self) {
        self.init.clear_all();
        self.pending = None;
        self.shadow.reset();
    }

    pub fn load(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        out: &mut Lanes,
    ) -> Result<(), Fault> {
        self.each(r, true, clocks, check, |region, run, clocks, check| {
            region.load_run(run, r, clocks, check, out)
        })
    }

    pub fn store(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        from: &Lanes,
    ) -> Result<(), Fault> {
        self.each(r, false, clocks, check, |region, run, clocks, check| {
            region.store_run(run, r, clocks, check, from)
        })
    }

    /// Replaces each lane's value, by ascending lane, and gives the old ones.
    pub fn atomic(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        apply: &mut dyn FnMut(usize, u64) -> u64,
    ) -> Result<[u64; 32], Fault> {
        let mut old = [0; 32];
        self.each(r, false, clocks, check, |region, run, clocks, check| {
            region.atomic_run(run, r, clocks, check, apply, &mut old)
        })?;
        Ok(old)
    }

    /// Issues `cp.async` into these bytes: until [`Region::finish_async`] nobody may read or write them.
    pub fn begin_async(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
    ) -> Result<(), Fault> {
        self.each(r, false, clocks, check, |region, run, clocks, check| {
            if let Some(at) = region.first_pending(&run) {
                return Err(region.pending_fault(Class::Race, at, &run, "writes"));
            }
            if check.race {
                region.race(run, r, clocks, true)?;
            }
            let bytes = region.data.len() as u64;
            region.pending.get_or_insert_with(|| Bits::new(bytes)).set(run.at, run.bytes());
            Ok(())
        })
    }

    /// The wait for a `cp.async`: `from` becomes visible, written by the warp that waited, at its present clock.
    pub fn finish_async(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        from: &Lanes,
    ) -> Result<(), Fault> {
        self.each(r, false, clocks, check, |region, run, clocks, check| {
            match &mut region.pending {
                Some(pending) if pending.first_set(run.at, run.bytes()).is_some() => {
                    pending.clear(run.at, run.bytes());
                }
                // Never issued: the copy happens now.
                _ => return region.store_run(run, r, clocks, check, from),
            }
            if check.race {
                region.settle(run, r, clocks);
            }
            region.put(&run, from);
            Ok(())
        })
    }

    /// Bounds and alignment; then `act` on each piece of the request.
    fn each(
        &mut self,
        r: &Request<'_>,
        reads: bool,
        clocks: &mut Clocks,
        check: Checks,
        mut act: impl FnMut(&mut Self, Run, &mut Clocks, Checks) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let local = matches!(self.space, Space::Local { .. });
        let check = Checks { race: check.race && !local, ..check };
        clocks.start(r.warp);
        for run in runs(r, reads && !local) {
            let mut rest = Some(run);
            while let Some(run) = rest {
                run.aligned()?;
                let (at, room) = self.place(&run)?;
                let (now, later) = run.split(room);
                act(self, Run { at, ..now }, clocks, check)?;
                rest = later;
            }
        }
        Ok(())
    }

    /// Where the run's first lane is, and the room from there on.
    fn place(&self, run: &Run) -> Result<(u64, u64), Fault> {
        let (at, width) = (run.at, u64::from(run.width));
        let fits = |from: u64, end: u64| from <= at && at < end && end - at >= width;
        let past = |end: u64, name: &str| {
            format!("{} bytes past the end of {name}", at.saturating_add(width) - end)
        };
        let nearest = match &self.space {
            Space::Global { .. } => return Ok((at, self.data.len() as u64 - at)),
            Space::Local { bytes, stride } => {
                if fits(0, *bytes) {
                    return Ok((u64::from(run.lane) * stride + at, width));
                }
                past(*bytes, &format!("the thread's {bytes} bytes of local memory"))
            }
            Space::Shared(variables) => {
                if let Some(variable) =
                    variables.iter().find(|variable| fits(variable.at, variable.end))
                {
                    return Ok((at, variable.end - at));
                }
                let before = variables.iter().rev().find(|variable| variable.at <= at);
                let after = variables.iter().find(|variable| variable.at > at);
                let gap = |variable: &Variable| at.saturating_add(width) - variable.end;
                match (before, after) {
                    (Some(before), after)
                        if after.is_none_or(|after| gap(before) <= after.at - at) =>
                    {
                        past(
                            before.end,
                            &format!("`{}` ({} bytes)", before.name, before.end - before.at),
                        )
                    }
                    (_, Some(after)) => format!("{} bytes before `{}`", after.at - at, after.name),
                    _ => "the block has no shared memory".to_owned(),
                }
            }
        };
        let space = if matches!(self.space, Space::Local { .. }) { "local" } else { "shared" };
        let message = format!("{width} bytes at {space} offset {at}: {nearest}");
        Err(Fault::new(Class::OutOfBounds, Some(run.lane), message))
    }

    pub(super) fn load_run(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        out: &mut Lanes,
    ) -> Result<(), Fault> {
        self.readable(&run, check)?;
        if check.race {
            self.race(run, r, clocks, false)?;
            if let Order::Strong(scope) = r.order {
                clocks.strong_load(r.warp, self.places(&run, r.warp, clocks), scope, r.acquire);
            }
        }
        let from = &self.data[run.at as usize..(run.at + run.bytes()) as usize];
        let out = &mut out[run.lane as usize..(run.lane + run.lanes) as usize];
        match run.width {
            1 => unpack::<1>(from, out),
            2 => unpack::<2>(from, out),
            4 => unpack::<4>(from, out),
            8 => unpack::<8>(from, out),
            _ => unpack::<16>(from, out),
        }
        Ok(())
    }

    pub(super) fn store_run(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        from: &Lanes,
    ) -> Result<(), Fault> {
        if let Some(at) = self.first_pending(&run) {
            return Err(self.pending_fault(Class::Race, at, &run, "writes"));
        }
        if check.race {
            self.write_race(run, r, clocks, from)?;
        }
        self.put(&run, from);
        Ok(())
    }

    /// The bytes, unchecked.
    fn put(&mut self, run: &Run, from: &Lanes) {
        self.init.set(run.at, run.bytes());
        let to = &mut self.data[run.at as usize..(run.at + run.bytes()) as usize];
        let from = &from[run.lane as usize..(run.lane + run.lanes) as usize];
        match run.width {
            1 => pack::<1>(from, to),
            2 => pack::<2>(from, to),
            4 => pack::<4>(from, to),
            8 => pack::<8>(from, to),
            _ => pack::<16>(from, to),
        }
    }

    pub(super) fn atomic_run(
        &mut self,
        run: Run,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        apply: &mut dyn FnMut(usize, u64) -> u64,
        old: &mut [u64; 32],
    ) -> Result<(), Fault> {
        self.readable(&run, check)?;
        for i in 0..run.lanes {
            let at = run.at + u64::from(i) * u64::from(run.width);
            let one = Run { lane: run.lane + i, lanes: 1, at, ..run };
            if check.race {
                self.race(one, r, clocks, true)?;
                if let Order::Strong(scope) = r.order {
                    clocks.rmw(
                        r.warp,
                        self.places(&one, r.warp, clocks),
                        scope,
                        r.acquire,
                        r.release,
                    );
                }
            }
            let bytes = &mut self.data[at as usize..][..run.width as usize];
            let mut value = [0; 8];
            value[..bytes.len()].copy_from_slice(bytes);
            let before = u64::from_le_bytes(value);
            old[one.lane as usize] = before;
            bytes.copy_from_slice(
                &apply(one.lane as usize, before).to_le_bytes()[..run.width as usize],
            );
        }
        self.init.set(run.at, run.bytes());
        Ok(())
    }

    /// A copy to these bytes in stream order.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8], op: &OpOrder) -> Result<(), Fault> {
        self.host_race(at, bytes.len() as u64, true, op)?;
        self.init.set(at, bytes.len() as u64);
        self.data[at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// A copy from these bytes in stream order.
    pub(super) fn read(
        &mut self,
        at: u64,
        out: &mut [u8],
        op: &OpOrder,
        init_check: bool,
    ) -> Result<(), Fault> {
        self.host_race(at, out.len() as u64, false, op)?;
        if init_check && let Some(clear) = self.init.first_clear(at, out.len() as u64) {
            let end = self
                .init
                .first_set(clear, at + out.len() as u64 - clear)
                .unwrap_or(at + out.len() as u64);
            let place = self.describe(clear);
            let message = format!("the {} bytes from {place} on were never written", end - clear);
            return Err(Fault::new(Class::Uninitialised, None, message));
        }
        out.copy_from_slice(&self.data[at as usize..][..out.len()]);
        Ok(())
    }

    /// Which of these bytes were written, from bit 0 on.
    pub(super) fn written(&self, at: u64, bytes: u64) -> Bits {
        self.init.extract(at, bytes)
    }

    /// A copy took this along.
    pub(super) fn set_written(&mut self, at: u64, written: &Bits, bytes: u64) {
        self.init.insert(at, written, bytes);
    }

    fn readable(&self, run: &Run, check: Checks) -> Result<(), Fault> {
        if let Some(at) = self.first_pending(run) {
            return Err(self.pending_fault(Class::AsyncNotWaited, at, run, "reads"));
        }
        if check.init
            && let Some(at) = self.init.first_clear(run.at, run.bytes())
        {
            let lane = run.lane_of(at);
            let first = run.at + u64::from(lane - run.lane) * u64::from(run.width);
            let bytes = (at..first + u64::from(run.width))
                .take_while(|at| self.init.first_set(*at, 1).is_none());
            let count = bytes.count();
            let place = self.describe(at);
            let message = format!(
                "reads {} bytes; the {count} from {place} on were never written",
                run.width
            );
            return Err(Fault::new(Class::Uninitialised, Some(lane), message));
        }
        Ok(())
    }

    fn first_pending(&self, run: &Run) -> Option<u64> {
        self.pending.as_ref()?.first_set(run.at, run.bytes())
    }

    fn pending_fault(&self, class: Class, at: u64, run: &Run, does: &str) -> Fault {
        let message = format!(
            "{does} {}, which a cp.async that nobody waited for is to write",
            self.describe(at)
        );
        Fault::new(class, Some(run.lane_of(at)), message)
    }

    fn describe(&self, at: u64) -> String {
        match &self.space {
            Space::Global { base, number } => {
                format!(
                    "{:#x} (byte {at} of allocation #{number}, {} bytes)",
                    base + at,
                    self.data.len()
                )
            }
            Space::Local { stride, .. } => format!("local offset {}", at % stride),
            Space::Shared(variables) => {
                match variables.iter().find(|variable| (variable.at..variable.end).contains(&at)) {
                    Some(variable) => {
                        format!("shared `{}` byte {}", variable.name, at - variable.at)
                    }
                    None => format!("shared offset {at}"),
                }
            }
        }
    }
}

/// Bytes to lanes; a single value goes to all.
fn unpack<const W: usize>(from: &[u8], out: &mut [[u8; 16]]) {
    if from.len() == W {
        out.iter_mut().for_each(|lane| lane[..W].copy_from_slice(from));
    } else {
        out.iter_mut()
            .zip(from.chunks_exact(W))
            .for_each(|(lane, bytes)| lane[..W].copy_from_slice(bytes));
    }
}

fn pack<const W: usize>(from: &[[u8; 16]], to: &mut [u8]) {
    to.chunks_exact_mut(W).zip(from).for_each(|(bytes, lane)| bytes.copy_from_slice(&lane[..W]));
}
