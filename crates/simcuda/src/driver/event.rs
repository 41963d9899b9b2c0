//! Events: a point in a stream that hosts and streams, of other devices too, can wait for.

use std::time::Instant;

use super::abi::Out;
use super::clock::{self, Clock};
use super::context;
use super::device::{self, Device};
use super::handle::{Handle, Kind};
use super::status::{Cu, Status};
use super::stream::locked;
use super::work::Action;

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

/// An event.
pub struct Event {
    pub context: Handle,
    pub flags: u32,
    /// Its last record outside a capture.
    pub record: Option<Record>,
    /// Its last record was inside this capture, after these nodes.
    pub captured: Option<(u64, Vec<usize>)>,
}

/// A recorded point.
pub struct Record {
    pub task: u64,
    pub clock: Clock,
    pub time: Option<Instant>,
}

impl Device {
    fn event(&self, event: Handle) -> Cu<&Event> {
        let found = self.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        self.usable(found.context)?;
        Ok(found)
    }

    /// An event that the host may ask about. One recorded in a capture it may not: that ends the capture.
    fn host_event(&mut self, event: Handle) -> Cu<&Event> {
        if let Some((capture, _)) = self.event(event)?.captured {
            self.invalidate(capture);
            return Err(Status::CAPTURED_EVENT);
        }
        self.event(event)
    }

    fn pending(&self, event: Handle) -> Cu<Option<u64>> {
        let record = self.event(event)?.record.as_ref();
        Ok(record.map(|record| record.task).filter(|&task| self.work.is_pending(task)))
    }

    /// The host waits for an event, or found it done: it knows what the event knows.
    fn wait_event(&mut self, event: Handle) -> Cu {
        self.log.waits += 1;
        if let Some(task) = self.pending(event)? {
            self.wait_task(task);
        }
        if let Some(record) = self.events.get(&event).and_then(|event| event.record.as_ref()) {
            clock::host().join(&record.clock);
        }
        self.settle_pools();
        self.event(event).map(drop)
    }

    fn record(&mut self, event: Handle, stream: Handle) -> Cu {
        if self.event(event)?.context != self.streams[&stream].context {
            return Err(Status::INVALID_HANDLE);
        }
        if self.is_capturing(stream) {
            let point = self.capture_point(stream)?;
            let event = self.events.get_mut(&event).ok_or(Status::INVALID_HANDLE)?;
            (event.captured, event.record) = (Some(point), None);
            return Ok(());
        }
        self.not_implicit(stream)?;
        // The record must be there before the task runs, which may be at once.
        let task = self.next_task();
        let found = self.events.get_mut(&event).ok_or(Status::INVALID_HANDLE)?;
        (found.captured, found.record) =
            (None, Some(Record { task, clock: Clock::default(), time: None }));
        self.enqueue(stream, &[], Action::Record(event))?;
        let clock = self.streams[&stream].clock.clone();
        if let Some(record) = self.events.get_mut(&event).and_then(|event| event.record.as_mut()) {
            record.clock = clock;
        }
        Ok(())
    }
}

/// Makes a stream wait for an event of the same or of another device.
fn wait(stream: Handle, event: Handle, flags: u32) -> Cu {
    if flags > 1 {
        return Err(Status::INVALID_VALUE);
    }
    let (capture, task, clock, ordinal) = {
        let mut device = device::owner(event, Kind::Event)?;
        let ordinal = device.ordinal;
        let found = device.event(event)?;
        let captured = found.captured.clone();
        let record = found.record.as_ref().map(|record| (record.task, record.clock.clone()));
        let (task, clock) = record.unzip();
        // Tasks of one device cannot wait for tasks of another, so those run now.
        if stream.ordinal().or_else(|| context::peek()?.ordinal()) != Some(ordinal) {
            task.into_iter().for_each(|task| device.wait_task(task));
        }
        (captured, task, clock, ordinal)
    };
    let (mut device, stream) = locked(stream)?;
    if device.is_capturing(stream) || capture.is_some() {
        let capture = capture.filter(|_| ordinal == device.ordinal);
        return device.capture_wait(stream, capture, task.is_some());
    }
    if flags != 0 {
        return Err(Status::INVALID_VALUE);
    }
    device.not_implicit(stream)?;
    let Some(clock) = clock else { return Ok(()) }; // never recorded: nothing to wait for
    if let Some(stream) = device.streams.get_mut(&stream) {
        stream.clock.join(&clock);
    }
    let task = task.filter(|&task| ordinal == device.ordinal && device.work.is_pending(task));
    device.enqueue(stream, task.as_slice(), Action::Mark).map(drop)
}

fn elapsed(milliseconds: &Out<f32>, start: Handle, end: Handle) -> Cu {
    milliseconds.check()?;
    let mut device = device::owner(start, Kind::Event)?;
    let mut times = [None; 2];
    for (time, event) in times.iter_mut().zip([start, end]) {
        let found = device.host_event(event)?;
        let record = found.record.as_ref().filter(|_| found.flags & DISABLE_TIMING == 0);
        *time = record.ok_or(Status::INVALID_HANDLE)?.time;
    }
    if device.event(start)?.context != device.event(end)?.context {
        return Err(Status::INVALID_HANDLE);
    }
    let [Some(start), Some(end)] = times else { return Err(Status::NOT_READY) };
    let forward = end.saturating_duration_since(start).as_secs_f32();
    let back = start.saturating_duration_since(end).as_secs_f32();
    milliseconds.set((forward - back) * 1e3)
}

entries! {
    fn cuEventCreate(event: Out<Handle>, flags: u32) {
        event.check()?;
        if flags & !7 != 0 || flags & INTERPROCESS != 0 && flags & DISABLE_TIMING == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let (mut device, context) = device::current()?;
        let handle = device.handle(Kind::Event);
        device.events.insert(handle, Event { context, flags, record: None, captured: None });
        event.set(handle)
    }

    fn cuEventDestroy_v2(event: Handle) {
        let mut device = device::owner(event, Kind::Event)?;
        device.event(event)?;
        device.events.remove(&event);
        Ok(())
    }

    fn cuEventRecord(event: Handle, stream: Handle) {
        let (mut device, stream) = locked(stream)?;
        device.record(event, stream)
    }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) {
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        Status(cuEventRecord(event, stream)).ok()
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) {
        wait(stream, event, flags)
    }

    fn cuEventSynchronize(event: Handle) {
        let mut device = device::owner(event, Kind::Event)?;
        device.host_event(event)?;
        device.wait_event(event)
    }

    fn cuEventQuery(event: Handle) {
        let mut device = device::owner(event, Kind::Event)?;
        device.host_event(event)?;
        device.not_unsafe()?;
        let task = device.pending(event)?;
        device.poll(task.as_slice())?;
        device.wait_event(event)
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(&milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) {
        elapsed(&milliseconds, start, end)
    }
}
