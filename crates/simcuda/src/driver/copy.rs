//! Copies between host and devices, with the documented rules of what the host waits for:
//!
//! | copy | pageable host memory | pinned host memory |
//! |---|---|---|
//! | to the device, async | staged at submission | read when it runs, must not change until then |
//! | to the device, sync | staged once the legacy stream is idle: may still run when it returns | returns when done |
//! | to the host, async | returns when done | returns at once |
//! | to the host, sync | returns when done | the same |
//! | device to device, both | returns at once | |

use std::sync::Arc;

use super::abi::Host;
use super::capture::unsafe_call;
use super::clock::{self, Clock};
use super::device::{self, Device};
use super::handle::{Handle, Kind};
use super::pinned;
use super::run::hash_of;
use super::status::{Cu, Status, of_class};
use super::stream::locked;
use super::work::Action;

/// A host address of a copy: null and device addresses are refused, where a dereference would fault.
fn host(device: &Device, at: Host, bytes: usize) -> Cu {
    if at.0 == 0 || device.range(at.0 as u64, bytes as u64).is_ok() {
        Err(Status::INVALID_VALUE)
    } else {
        Ok(())
    }
}

fn to_device(device: &mut Device, stream: Handle, at: u64, from: Host, bytes: usize) -> Cu {
    host(device, from, bytes)?;
    device.range(at, bytes as u64)?;
    let action = if device.is_capturing(stream) {
        Action::WriteFrom { at, from, bytes, hash: None }
    } else if pinned::covers(from, bytes) {
        Action::WriteFrom { at, from, bytes, hash: Some(hash_of(from.bytes(bytes))) }
    } else {
        Action::Write { at, bytes: Arc::from(from.bytes(bytes)) }
    };
    device.submit(stream, action)
}

fn to_host(device: &mut Device, stream: Handle, to: Host, at: u64, bytes: usize) -> Cu {
    host(device, to, bytes)?;
    device.range(at, bytes as u64)?;
    device.submit(stream, Action::Read { at, to, bytes })
}

fn within(device: &mut Device, stream: Handle, to: u64, from: u64, bytes: usize) -> Cu {
    device.range(to, bytes as u64)?;
    device.range(from, bytes as u64)?;
    device.submit(stream, Action::Copy { to, from, bytes: bytes as u64 })
}

/// Waits for a stream after a synchronous copy.
fn finish(device: &mut Device, stream: Handle) -> Cu {
    device.wait_stream(stream)?;
    let context = device.streams[&stream].context;
    device.usable(context)
}

/// Runs `copy` on the legacy stream, as the calls without a stream do.
fn on_legacy(bytes: usize, wait: bool, copy: impl FnOnce(&mut Device, Handle) -> Cu) -> Cu {
    drop(unsafe_call()?);
    let (mut device, stream) = locked(Handle::NULL)?;
    device.not_implicit(stream)?;
    if bytes != 0 {
        copy(&mut device, stream)?;
    }
    if wait { finish(&mut device, stream) } else { Ok(()) }
}

/// Runs `copy` on a stream.
fn on(stream: Handle, bytes: usize, copy: impl FnOnce(&mut Device, Handle) -> Cu) -> Cu {
    let (mut device, stream) = locked(stream)?;
    if bytes == 0 { Ok(()) } else { copy(&mut device, stream) }
}

/// Reads another device's memory for a peer copy, now: what the stream waited for there has run, since waits for
/// another device's events are waited for at submission. On that device the stream is an actor of its own.
fn peer_read(context: Handle, from: u64, bytes: usize, known: &mut Clock) -> Cu<Vec<u8>> {
    let mut device = device::owner(context, Kind::Context).map_err(|_| Status::INVALID_CONTEXT)?;
    device.usable(context)?;
    device.range(from, bytes as u64)?;
    let ordinal = device.ordinal;
    let actor = device.actor();
    known.join_on(ordinal, clock::host().on(ordinal));
    known.tick(ordinal, actor, 1);
    let order = device.order(actor, 1, known.on(ordinal), "copy to another device".into());
    let mut data = vec![0; bytes];
    let to = Host(data.as_mut_ptr() as usize);
    if let Err(fault) = device.read(from, to, bytes, &order) {
        let status = of_class(fault.class);
        device.note(fault);
        return Err(status);
    }
    Ok(data)
}

entries! {
    fn cuMemcpyHtoD_v2(at: u64, from: Host, bytes: usize) {
        let pinned = pinned::covers(from, bytes);
        on_legacy(bytes, pinned, |device, stream| {
            if !pinned {
                device.wait_stream(stream)?;
            }
            to_device(device, stream, at, from, bytes)
        })
    }

    fn cuMemcpyDtoH_v2(to: Host, at: u64, bytes: usize) {
        on_legacy(bytes, true, |device, stream| to_host(device, stream, to, at, bytes))
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        on_legacy(bytes, false, |device, stream| within(device, stream, to, from, bytes))
    }

    fn cuMemcpyHtoDAsync_v2(at: u64, from: Host, bytes: usize, stream: Handle) {
        on(stream, bytes, |device, stream| to_device(device, stream, at, from, bytes))
    }

    fn cuMemcpyDtoHAsync_v2(to: Host, at: u64, bytes: usize, stream: Handle) {
        on(stream, bytes, |device, stream| {
            to_host(device, stream, to, at, bytes)?;
            if device.is_capturing(stream) || pinned::covers(to, bytes) {
                return Ok(());
            }
            finish(device, stream)
        })
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        on(stream, bytes, |device, stream| within(device, stream, to, from, bytes))
    }

    /// Between devices: the source is read at submission, the destination written in stream order.
    fn cuMemcpyPeerAsync(
        to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize, stream: Handle
    ) {
        if to_context.ordinal() == from_context.ordinal() {
            return on(stream, bytes, |device, stream| within(device, stream, to, from, bytes));
        }
        let (mut known, stream) = {
            let (mut device, stream) = locked(stream)?;
            if to_context.ordinal() != Some(device.ordinal) {
                return Err(Status::NOT_SUPPORTED); // a stream of the source device
            }
            if device.is_capturing(stream) {
                device.invalidate_of(stream);
                return Err(Status::NOT_SUPPORTED);
            }
            device.range(to, bytes as u64)?;
            (device.streams[&stream].clock.clone(), stream)
        };
        if bytes == 0 {
            return Ok(());
        }
        let data = peer_read(from_context, from, bytes, &mut known)?;
        let (mut device, stream) = locked(stream)?;
        device.streams.get_mut(&stream).ok_or(Status::INVALID_HANDLE)?.clock.join(&known);
        device.submit(stream, Action::Write { at: to, bytes: Arc::from(data) })
    }
}
