//! Streams: creation, the default ones, waiting, and how work gets into them.

use super::abi::{Host, HostFunction, Out};
use super::clock::Clock;
use super::device::{self, Device};
use super::handle::{Handle, Kind};
use super::status::{Cu, Status};
use super::work::Action;
use std::sync::MutexGuard;

/// The highest stream priority; the lowest is 0.
pub const GREATEST_PRIORITY: i32 = -5;

/// How a stream relates to the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is the legacy default stream: waits for all blocking streams, and they for it.
    Legacy,
    Blocking,
    NonBlocking,
}

/// A stream.
pub struct Stream {
    pub context: Handle,
    pub role: Role,
    pub priority: i32,
    /// Its number in vector clocks and of its last operation.
    pub actor: u32,
    pub seq: u32,
    /// What its next operation is ordered after.
    pub clock: Clock,
    /// Its last task.
    pub last: Option<u64>,
    /// The capture it takes part in, and the nodes that its next one depends on.
    pub capture: Option<(u64, Vec<usize>)>,
}

/// Locks the device of a stream named by an argument, and checks that its context is usable. 0 and 1 are the current
/// context's legacy stream, 2 its stream of this thread; others belong to their own context, current or not.
pub fn locked(stream: Handle) -> Cu<(MutexGuard<'static, Device>, Handle)> {
    if stream.0 <= 2 {
        let (mut device, context) = device::current()?;
        let stream = if stream.0 == 2 {
            device.per_thread(context)?
        } else {
            device.context(context)?.legacy
        };
        return Ok((device, stream));
    }
    let device = device::owner(stream, Kind::Stream)?;
    let context = device.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?.context;
    device.usable(context)?;
    Ok((device, stream))
}

impl Device {
    pub fn open_stream(&mut self, context: Handle, role: Role, priority: i32) -> Handle {
        let handle = self.handle(Kind::Stream);
        let actor = self.actor();
        let stream = Stream {
            context,
            role,
            priority,
            actor,
            seq: 0,
            clock: Clock::default(),
            last: None,
            capture: None,
        };
        self.streams.insert(handle, stream);
        handle
    }

    fn per_thread(&mut self, context: Handle) -> Cu<Handle> {
        let thread = super::thread();
        if let Some(&stream) = self.context(context)?.per_thread.get(&thread) {
            return Ok(stream);
        }
        let stream = self.open_stream(context, Role::Blocking, 0);
        self.context(context)?.per_thread.insert(thread, stream);
        Ok(stream)
    }

    /// Adds work to a stream, or to the graph it is captured into.
    pub fn submit(&mut self, stream: Handle, action: Action) -> Cu {
        let s = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        if s.capture.is_some() {
            return self.capture(stream, action);
        }
        self.not_implicit(stream)?;
        self.enqueue(stream, &[], action).map(drop)
    }

    pub fn is_capturing(&self, stream: Handle) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.capture.is_some())
    }
}

fn create(stream: &Out<Handle>, flags: u32, priority: i32) -> Cu {
    stream.check()?;
    let role = match flags {
        0 => Role::Blocking,
        1 => Role::NonBlocking,
        _ => return Err(Status::INVALID_VALUE),
    };
    let (mut device, context) = device::current()?;
    let handle = device.open_stream(context, role, priority.clamp(GREATEST_PRIORITY, 0));
    stream.set(handle)
}

entries! {
    fn cuStreamCreate(stream: Out<Handle>, flags: u32) {
        create(&stream, flags, 0)
    }

    /// Priorities out of range are clamped.
    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) {
        create(&stream, flags, priority)
    }

    /// Work in it goes on; a capture that it takes part in cannot.
    fn cuStreamDestroy_v2(stream: Handle) {
        if stream.0 <= 2 {
            return Err(Status::INVALID_HANDLE);
        }
        let (mut device, stream) = locked(stream)?;
        device.invalidate_of(stream);
        device.streams.remove(&stream);
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) {
        let (mut device, stream) = locked(stream)?;
        device.not_captured(stream)?;
        device.wait_stream(stream)?;
        let context = device.streams[&stream].context;
        device.usable(context)
    }

    fn cuStreamQuery(stream: Handle) {
        let (mut device, stream) = locked(stream)?;
        device.not_captured(stream)?;
        let context = device.streams[&stream].context;
        let tasks = device.stream_tasks(stream)?;
        device.poll(&tasks)?;
        device.usable(context)?;
        device.wait_stream(stream)
    }

    fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) {
        let (device, stream) = locked(stream)?;
        flags.set(u32::from(device.streams[&stream].role == Role::NonBlocking))
    }

    fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) {
        let (device, stream) = locked(stream)?;
        priority.set(device.streams[&stream].priority)
    }

    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) {
        let (device, stream) = locked(stream)?;
        context.set(device.streams[&stream].context)
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<HostFunction>, data: Host) {
        let function = function.ok_or(Status::INVALID_VALUE)?;
        let (mut device, stream) = locked(stream)?;
        device.submit(stream, Action::Call { function, data })
    }
}
