//! Device memory: allocation, release and memset, synchronous and stream-ordered.

use std::sync::Arc;

use super::abi::Out;
use super::capture::unsafe_call;
use super::device::{self, Allocation, Device};
use super::handle::Handle;
use super::status::{Cu, Status};
use super::stream::locked;
use super::work::Action;

impl Device {
    /// Takes memory for a context.
    pub fn allocate(
        &mut self,
        context: Handle,
        bytes: u64,
        pool: Option<Handle>,
        variable: bool,
    ) -> Cu<u64> {
        if let Some(pool) = pool {
            self.pools.get_mut(&pool).ok_or(Status::INVALID_VALUE)?.take(bytes)?;
        }
        let Some(at) = self.memory.alloc(bytes) else {
            if let Some(pool) = pool.and_then(|pool| self.pools.get_mut(&pool)) {
                pool.give(bytes);
            }
            return Err(Status::OUT_OF_MEMORY);
        };
        self.allocations.insert(at, Allocation { bytes, context, pool, freeing: false, variable });
        Ok(at)
    }

    /// The allocation that starts here and may be freed.
    fn freeable(&mut self, at: u64) -> Cu<&mut Allocation> {
        let found = self.allocations.get_mut(&at).ok_or(Status::INVALID_VALUE)?;
        if found.freeing || found.variable { Err(Status::INVALID_VALUE) } else { Ok(found) }
    }
}

fn allocate_async(address: &Out<u64>, bytes: usize, pool: Option<Handle>, stream: Handle) -> Cu {
    address.check()?;
    let (mut device, stream) = locked(stream)?;
    if device.is_capturing(stream) {
        device.invalidate_of(stream);
        return Err(Status::NOT_SUPPORTED); // would be the graph's memory
    }
    device.not_implicit(stream)?;
    if bytes == 0 {
        return address.set(0);
    }
    let pool = pool.unwrap_or(device.current_pool);
    let context = device.streams[&stream].context;
    let at = device.allocate(context, bytes as u64, Some(pool), false)?;
    address.set(at)
}

/// Sets `count` elements. A memset is asynchronous to the host in all its forms.
fn fill(at: u64, pattern: &[u8], count: usize, stream: Handle) -> Cu {
    let (mut device, stream) = locked(stream)?;
    let width = pattern.len() as u64;
    let bytes = width.checked_mul(count as u64).ok_or(Status::INVALID_VALUE)?;
    if bytes == 0 {
        return Ok(());
    }
    if !at.is_multiple_of(width) {
        return Err(Status::INVALID_VALUE);
    }
    device.range(at, bytes)?;
    device.submit(stream, Action::Fill { at, pattern: Arc::from(pattern), count: count as u64 })
}

/// The same on the legacy stream, for which a capture must leave room.
fn fill_legacy(at: u64, pattern: &[u8], count: usize) -> Cu {
    drop(unsafe_call()?);
    fill(at, pattern, count, Handle::NULL)
}

entries! {
    fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) {
        address.check()?;
        let (mut device, context) = unsafe_call()?;
        if bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let at = device.allocate(context, bytes as u64, None, false)?;
        address.set(at)
    }

    /// Waits for the device first, unless the memory came from a pool: then the caller must have waited.
    fn cuMemFree_v2(at: u64) {
        let (mut device, context) = unsafe_call()?;
        if at == 0 {
            return Ok(());
        }
        if device.freeable(at)?.pool.is_none() {
            device.finish(context);
        }
        let order = device.host_order("free");
        if let Err(fault) = device.free(at, &order) {
            device.note(fault);
        }
        device.usable(context)
    }

    /// A null address is what an empty allocation got.
    fn cuMemAllocAsync(address: Out<u64>, bytes: usize, stream: Handle) {
        allocate_async(&address, bytes, None, stream)
    }

    fn cuMemAllocFromPoolAsync(address: Out<u64>, bytes: usize, pool: Handle, stream: Handle) {
        allocate_async(&address, bytes, Some(pool), stream)
    }

    fn cuMemFreeAsync(at: u64, stream: Handle) {
        let (mut device, stream) = locked(stream)?;
        if at == 0 {
            return Ok(());
        }
        if device.is_capturing(stream) {
            device.invalidate_of(stream);
            return Err(Status::INVALID_VALUE); // only a graph's own memory can be freed inside it
        }
        device.freeable(at)?;
        device.submit(stream, Action::Free { at })?;
        if let Some(allocation) = device.allocations.get_mut(&at) {
            allocation.freeing = true;
        }
        Ok(())
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let (device, _) = device::current()?;
        let (used, capacity) = (device.memory.used(), device.memory.capacity());
        free.set(capacity.saturating_sub(used) as usize)?;
        total.set(capacity as usize)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, at: u64) {
        let (device, _) = device::current()?;
        let (&start, found) = device.allocations.range(..=at).next_back().ok_or(Status::NOT_FOUND)?;
        if at - start >= found.bytes {
            return Err(Status::NOT_FOUND);
        }
        base.set_if_wanted(start);
        bytes.set_if_wanted(found.bytes as usize);
        Ok(())
    }

    fn cuMemsetD8_v2(at: u64, value: u8, count: usize) {
        fill_legacy(at, &[value], count)
    }

    fn cuMemsetD16_v2(at: u64, value: u16, count: usize) {
        fill_legacy(at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD32_v2(at: u64, value: u32, count: usize) {
        fill_legacy(at, &value.to_le_bytes(), count)
    }

    fn cuMemsetD8Async(at: u64, value: u8, count: usize, stream: Handle) {
        fill(at, &[value], count, stream)
    }

    fn cuMemsetD16Async(at: u64, value: u16, count: usize, stream: Handle) {
        fill(at, &value.to_le_bytes(), count, stream)
    }

    fn cuMemsetD32Async(at: u64, value: u32, count: usize, stream: Handle) {
        fill(at, &value.to_le_bytes(), count, stream)
    }
}
