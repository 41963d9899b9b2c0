//! A device's global memory: allocations at addresses that fault when the host touches them, and are never used twice.
#![allow(unsafe_code, reason = "reserving address space that nobody can touch takes mmap")]

use super::region::Region;
use super::{Clocks, Fault, Lanes, OpOrder, Request, Run, runs};
use crate::{Checks, Class};

/// Address space reserved at a time.
const RESERVED: u64 = 256 << 30;

/// Alignment of allocations, and the least distance between them.
const RED_ZONE: u64 = 512;

/// The memory of one emulated device.
pub struct Memory {
    device: usize,
    capacity: u64,
    used: u64,
    /// The last one is what addresses come from.
    reserved: Vec<Reservation>,
    next: u64,
    /// Every allocation ever made, by ascending address of each reservation.
    slots: Vec<Slot>,
    /// Index of the slot found last.
    last: usize,
}

struct Slot {
    base: u64,
    bytes: u64,
    /// None: freed.
    region: Option<Box<Region>>,
}

/// Address space without memory.
struct Reservation {
    base: u64,
}

impl Reservation {
    /// At the same address in every run, if that is free: reports and pointers in kernels are then the same too.
    fn new(device: usize, number: usize) -> Option<Self> {
        let hint = 0x1000_0000_0000 + (device as u64 * 4 + number as u64) * RESERVED;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping without MAP_FIXED replaces nothing, and PROT_NONE lets nobody read or write it.
        let base = unsafe {
            libc::mmap(hint as *mut libc::c_void, RESERVED as usize, libc::PROT_NONE, flags, -1, 0)
        };
        (base != libc::MAP_FAILED).then(|| Self { base: base as u64 })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it exists: it was never accessible.
        unsafe { libc::munmap(self.base as *mut libc::c_void, RESERVED as usize) };
    }
}

impl Memory {
    /// For device number `device` with `capacity` bytes.
    pub fn new(device: usize, capacity: u64) -> Self {
        Self {
            device,
            capacity,
            used: 0,
            reserved: Vec::new(),
            next: 0,
            slots: Vec::new(),
            last: 0,
        }
    }

    /// None: out of memory.
    pub fn alloc(&mut self, bytes: u64) -> Option<u64> {
        let span = bytes.checked_next_multiple_of(RED_ZONE)? + RED_ZONE;
        if bytes > self.capacity - self.used || span + RED_ZONE > RESERVED {
            return None;
        }
        // An allocation of more than the machine has should be the device's error, not the end of the process.
        Vec::<u8>::new().try_reserve_exact(bytes as usize).ok()?;
        if self.reserved.last().is_none_or(|reserved| reserved.base + RESERVED - self.next < span) {
            let reserved = Reservation::new(self.device, self.reserved.len())?;
            self.next = reserved.base + RED_ZONE;
            self.reserved.push(reserved);
        }
        let base = self.next;
        self.next += span;
        self.used += bytes;
        let at = self.slots.partition_point(|slot| slot.base < base);
        let region = Region::global(base, self.slots.len(), bytes);
        self.slots.insert(at, Slot { base, bytes, region: Some(Box::new(region)) });
        Some(base)
    }

    /// Gives back the bytes freed.
    pub fn free(&mut self, address: u64) -> Result<u64, Fault> {
        let at = self.slots.partition_point(|slot| slot.base < address);
        if let Some(slot) = self.slots.get_mut(at).filter(|slot| slot.base == address) {
            return match slot.region.take() {
                Some(_) => {
                    self.used -= slot.bytes;
                    Ok(slot.bytes)
                }
                None => {
                    let message = format!(
                        "free of {address:#x}, whose {} bytes were freed before",
                        slot.bytes
                    );
                    Err(Fault::new(Class::UseAfterFree, None, message))
                }
            };
        }
        let message = match self.containing(address) {
            Some((base, bytes)) => {
                format!(
                    "free of {address:#x}, inside the allocation of {bytes} bytes at {base:#x}: free its base"
                )
            }
            None => format!("free of no allocation: {}", self.outside(address, 1, None).message),
        };
        Err(Fault::new(Class::OutOfBounds, None, message))
    }

    /// Base and bytes of the live allocation that holds the address.
    pub fn containing(&self, address: u64) -> Option<(u64, u64)> {
        let slot = &self.slots[self.slot_at(address)?];
        (address - slot.base < slot.bytes && slot.region.is_some())
            .then_some((slot.base, slot.bytes))
    }

    /// Bytes in live allocations.
    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Address and bytes of what was not freed.
    #[cfg(test)]
    pub fn live(&self) -> impl Iterator<Item = (u64, u64)> {
        self.slots.iter().filter(|slot| slot.region.is_some()).map(|slot| (slot.base, slot.bytes))
    }

    /// A copy from the host, in stream order.
    pub fn write(&mut self, at: u64, bytes: &[u8], op: &OpOrder) -> Result<(), Fault> {
        let (region, offset) = self.host_range(at, bytes.len() as u64)?;
        region.write(offset, bytes, op)
    }

    /// A copy to the host, in stream order; `init_check` refuses bytes that nobody wrote.
    pub fn read(
        &mut self,
        at: u64,
        out: &mut [u8],
        op: &OpOrder,
        init_check: bool,
    ) -> Result<(), Fault> {
        let (region, offset) = self.host_range(at, out.len() as u64)?;
        region.read(offset, out, op, init_check)
    }

    /// Writes the pattern `count` times.
    pub fn fill(&mut self, at: u64, pattern: &[u8], count: u64, op: &OpOrder) -> Result<(), Fault> {
        let bytes = count.saturating_mul(pattern.len() as u64);
        let (region, offset) = self.host_range(at, bytes)?;
        region.write(offset, &pattern.repeat(count as usize), op)
    }

    /// A copy within the device; the two may overlap. What was never written stays so.
    pub fn copy(&mut self, to: u64, from: u64, bytes: u64, op: &OpOrder) -> Result<(), Fault> {
        self.host_range(to, bytes)?;
        let (source, offset) = self.host_range(from, bytes)?;
        let mut data = vec![0; bytes as usize];
        source.read(offset, &mut data, op, false)?;
        let written = source.written(offset, bytes);
        let (target, offset) = self.host_range(to, bytes)?;
        target.write(offset, &data, op)?;
        target.set_written(offset, &written, bytes);
        Ok(())
    }

    /// A warp's load.
    pub fn load(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        out: &mut Lanes,
    ) -> Result<(), Fault> {
        clocks.start(r.warp);
        self.each(r, true, |region, run| region.load_run(run, r, clocks, check, out))
    }

    /// A warp's store.
    pub fn store(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        from: &Lanes,
    ) -> Result<(), Fault> {
        clocks.start(r.warp);
        self.each(r, false, |region, run| region.store_run(run, r, clocks, check, from))
    }

    /// A warp's atomic: replaces each lane's value, by ascending lane, and gives the old ones.
    pub fn atomic(
        &mut self,
        r: &Request<'_>,
        clocks: &mut Clocks,
        check: Checks,
        apply: &mut dyn FnMut(usize, u64) -> u64,
    ) -> Result<[u64; 32], Fault> {
        clocks.start(r.warp);
        let mut old = [0; 32];
        self.each(r, false, |region, run| {
            region.atomic_run(run, r, clocks, check, apply, &mut old)
        })?;
        Ok(old)
    }

    fn each(
        &mut self,
        r: &Request<'_>,
        reads: bool,
        mut act: impl FnMut(&mut Region, Run) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        for run in runs(r, reads) {
            let mut rest = Some(run);
            while let Some(run) = rest {
                run.aligned()?;
                let (region, offset, room) =
                    self.find(run.at, u64::from(run.width), Some(run.lane))?;
                let (now, later) = run.split(room);
                act(region, Run { at: offset, ..now })?;
                rest = later;
            }
        }
        Ok(())
    }

    fn host_range(&mut self, at: u64, bytes: u64) -> Result<(&mut Region, u64), Fault> {
        self.find(at, bytes, None).map(|(region, offset, _)| (region, offset))
    }

    /// The live allocation that holds all of these bytes, the offset there, and the room from there on.
    fn find(
        &mut self,
        at: u64,
        bytes: u64,
        lane: Option<u32>,
    ) -> Result<(&mut Region, u64, u64), Fault> {
        let holds = |slot: &Slot| at >= slot.base && at - slot.base <= slot.bytes;
        if !self.slots.get(self.last).is_some_and(holds) {
            self.last = self.slot_at(at).unwrap_or(0);
        }
        let fits = |slot: &&Slot| {
            holds(slot) && slot.bytes - (at - slot.base) >= bytes && slot.region.is_some()
        };
        if self.slots.get(self.last).as_ref().is_none_or(|slot| !fits(slot)) {
            return Err(self.outside(at, bytes, lane));
        }
        match &mut self.slots[self.last] {
            Slot { base, bytes, region: Some(region) } => {
                Ok((region, at - *base, *bytes - (at - *base)))
            }
            _ => unreachable!("checked to be live above"),
        }
    }

    /// The last slot that starts at or before the address.
    fn slot_at(&self, address: u64) -> Option<usize> {
        self.slots.partition_point(|slot| slot.base <= address).checked_sub(1)
    }

    /// Why an access is refused.
    fn outside(&self, at: u64, bytes: u64, lane: Option<u32>) -> Fault {
        let of = |slot: &Slot| {
            let freed = if slot.region.is_some() { "" } else { "freed " };
            format!("the {freed}allocation of {} bytes at {:#x}", slot.bytes, slot.base)
        };
        let before = self.slot_at(at);
        let after = self.slots.get(before.map_or(0, |before| before + 1));
        let before = before.map(|before| &self.slots[before]);
        let access = format!("{bytes} bytes at {at:#x}");
        if let Some(slot) =
            before.filter(|slot| slot.region.is_none() && at - slot.base < slot.bytes)
        {
            let message = format!("{access}: byte {} of {}", at - slot.base, of(slot));
            return Fault::new(Class::UseAfterFree, lane, message);
        }
        let distance = |slot: &Slot| at - slot.base - slot.bytes.min(at - slot.base);
        let where_to = match (before, after) {
            (Some(slot), _) if at - slot.base < slot.bytes => {
                let past = bytes - (slot.bytes - (at - slot.base));
                format!("reaches {past} bytes past the end of {}", of(slot))
            }
            (Some(slot), after) if after.is_none_or(|after| distance(slot) <= after.base - at) => {
                format!("starts {} bytes past the end of {}", distance(slot), of(slot))
            }
            (_, Some(after)) => format!("starts {} bytes before {}", after.base - at, of(after)),
            _ => "nothing was ever allocated".to_owned(),
        };
        Fault::new(Class::OutOfBounds, lane, format!("{access}: {where_to}"))
    }
}
