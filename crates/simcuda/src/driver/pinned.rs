//! Page-locked host memory. It matters to copies: from pinned memory they read when they run, from pageable memory
//! when they are submitted.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::abi::{Host, Out};
use super::capture::unsafe_call;
use super::handle::Handle;
use super::status::{Cu, Status};

const PAGE: usize = 4096;
const FLAGS: u32 = 7; // portable, device map, write-combined

struct Pinned {
    bytes: usize,
    context: Handle,
}

/// By address. With unified addressing, all contexts know all of it.
static PINNED: Mutex<BTreeMap<usize, Pinned>> = Mutex::new(BTreeMap::new());

fn table() -> MutexGuard<'static, BTreeMap<usize, Pinned>> {
    PINNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether all these bytes are pinned.
pub fn covers(at: Host, bytes: usize) -> bool {
    let table = table();
    let found = table.range(..=at.0).next_back();
    found.is_some_and(|(start, pinned)| {
        at.0 - start < pinned.bytes && bytes <= pinned.bytes - (at.0 - start)
    })
}

/// A context ended: its pinned memory goes with it.
pub fn forget(context: Handle) {
    let mut table = table();
    let gone: Vec<usize> =
        table.iter().filter(|(_, p)| p.context == context).map(|(&at, _)| at).collect();
    for at in gone {
        if let Some(pinned) = table.remove(&at) {
            release(at, pinned.bytes);
        }
    }
}

fn release(at: usize, bytes: usize) {
    // SAFETY: allocated below with this layout, and out of the table, so not freed before.
    unsafe { dealloc(at as *mut u8, Layout::from_size_align_unchecked(bytes, PAGE)) }
}

fn allocate(address: &Out<Host>, bytes: usize, flags: u32) -> Cu {
    address.check()?;
    let (_device, context) = unsafe_call()?;
    if bytes == 0 || flags & !FLAGS != 0 {
        return Err(Status::INVALID_VALUE);
    }
    let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| Status::OUT_OF_MEMORY)?;
    // SAFETY: the layout has a size above zero.
    let at = unsafe { alloc_zeroed(layout) } as usize;
    if at == 0 {
        return Err(Status::OUT_OF_MEMORY);
    }
    table().insert(at, Pinned { bytes, context });
    address.set(Host(at))
}

entries! {
    fn cuMemHostAlloc(address: Out<Host>, bytes: usize, flags: u32) {
        allocate(&address, bytes, flags)
    }

    fn cuMemAllocHost_v2(address: Out<Host>, bytes: usize) {
        allocate(&address, bytes, 0)
    }

    /// Waits for the context, as a driver does.
    fn cuMemFreeHost(at: Host) {
        let (mut device, context) = unsafe_call()?;
        if !table().contains_key(&at.0) {
            return Err(Status::INVALID_VALUE);
        }
        device.finish(context);
        if let Some(pinned) = table().remove(&at.0) {
            release(at.0, pinned.bytes);
        }
        device.usable(context)
    }
}
