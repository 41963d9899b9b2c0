//! Stream capture: work becomes a graph's nodes, and what would tie it to work outside is refused.
//!
//! A refused call ends the capture (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED from then on), as a driver does. Other than
//! a driver's, a capture in global mode forbids unsafe calls only on its own device: tests share a process.

use std::cell::Cell;
use std::sync::Arc;

use super::abi::Out;
use super::device::{self, Device};
use super::graph::{Graph, Node};
use super::handle::{Handle, Kind};
use super::init;
use super::status::{Cu, Status};
use super::stream::{Role, locked};
use super::work::Action;

const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

/// A capture sequence.
pub struct Capture {
    pub context: Handle,
    mode: u32,
    thread: u64,
    origin: Handle,
    /// The streams in it: each is one lane of the graph.
    streams: Vec<Handle>,
    nodes: Vec<Node>,
    invalid: bool,
}

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

impl Device {
    fn capture_of(&mut self, stream: Handle) -> Cu<(u64, &mut Capture)> {
        let (id, _) = self
            .streams
            .get(&stream)
            .and_then(|s| s.capture.as_ref())
            .ok_or(Status::ILLEGAL_STATE)?;
        let capture = self.captures.get_mut(id).ok_or(Status::ILLEGAL_STATE)?;
        Ok((*id, capture))
    }

    /// The capture of a stream, if it may still go on.
    fn live_capture(&mut self, stream: Handle) -> Cu<(u64, &mut Capture)> {
        let (id, capture) = self.capture_of(stream)?;
        if capture.invalid { Err(Status::STREAM_CAPTURE_INVALIDATED) } else { Ok((id, capture)) }
    }

    /// Adds a node for a stream's work.
    pub fn capture(&mut self, stream: Handle, action: Action) -> Cu {
        let (id, after) = self.capture_point(stream)?;
        let (_, capture) = self.live_capture(stream)?;
        let lane =
            capture.streams.iter().position(|&s| s == stream).ok_or(Status::ILLEGAL_STATE)?;
        capture.nodes.push(Node { after, lane, action });
        let node = capture.nodes.len() - 1;
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.capture = Some((id, vec![node]));
        }
        Ok(())
    }

    /// What an event recorded now in a capturing stream stands for.
    pub fn capture_point(&mut self, stream: Handle) -> Cu<(u64, Vec<usize>)> {
        self.live_capture(stream)?;
        self.streams.get(&stream).and_then(|s| s.capture.clone()).ok_or(Status::ILLEGAL_STATE)
    }

    /// A wait where stream or event belong to a capture.
    pub fn capture_wait(
        &mut self,
        stream: Handle,
        event: Option<(u64, Vec<usize>)>,
        recorded: bool,
    ) -> Cu {
        let live = event.filter(|(id, _)| self.captures.contains_key(id));
        let ended = live.is_none() && !recorded;
        if !self.is_capturing(stream) {
            let (id, nodes) = live.ok_or(Status::CAPTURED_EVENT)?;
            let role = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?.role;
            if role == Role::Legacy {
                self.invalidate(id);
                return Err(Status::STREAM_CAPTURE_IMPLICIT);
            }
            let capture = self.captures.get_mut(&id).ok_or(Status::CAPTURED_EVENT)?;
            if capture.invalid {
                return Err(Status::STREAM_CAPTURE_INVALIDATED);
            }
            capture.streams.push(stream);
            if let Some(stream) = self.streams.get_mut(&stream) {
                stream.capture = Some((id, nodes));
            }
            return Ok(());
        }
        let (id, mut frontier) = self.capture_point(stream)?;
        match live {
            Some((other, nodes)) if other == id => {
                frontier.extend(nodes);
                frontier.sort_unstable();
                frontier.dedup();
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.capture = Some((id, frontier));
                }
                Ok(())
            }
            Some((other, _)) => {
                self.invalidate(id);
                self.invalidate(other);
                Err(Status::STREAM_CAPTURE_MERGE)
            }
            None if ended => Ok(()),
            None => {
                self.invalidate(id);
                Err(Status::STREAM_CAPTURE_ISOLATION)
            }
        }
    }

    pub fn invalidate(&mut self, capture: u64) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.invalid = true;
        }
    }

    /// Ends the capture that a stream takes part in, if it does.
    pub fn invalidate_of(&mut self, stream: Handle) {
        if let Ok((_, capture)) = self.capture_of(stream) {
            capture.invalid = true;
        }
    }

    /// Waiting for a capturing stream is refused, and so is waiting for the legacy stream while a blocking one captures.
    pub fn not_captured(&mut self, stream: Handle) -> Cu {
        if self.is_capturing(stream) {
            self.invalidate_of(stream);
            return Err(Status::STREAM_CAPTURE_UNSUPPORTED);
        }
        self.not_implicit(stream)
    }

    /// Waiting for a whole context is refused while something in it captures.
    pub fn not_while_capturing(&mut self, context: Handle) -> Cu {
        self.refuse(Status::STREAM_CAPTURE_UNSUPPORTED, |capture| capture.context == context)
    }

    /// The legacy stream must not come to depend on a blocking stream that captures.
    pub fn not_implicit(&mut self, stream: Handle) -> Cu {
        let context = match self.streams.get(&stream) {
            Some(s) if s.role == Role::Legacy => s.context,
            _ => return Ok(()),
        };
        let blocking: Vec<u64> = self.blocking_captures(context);
        blocking.iter().for_each(|&capture| self.invalidate(capture));
        if blocking.is_empty() { Ok(()) } else { Err(Status::STREAM_CAPTURE_IMPLICIT) }
    }

    fn blocking_captures(&self, context: Handle) -> Vec<u64> {
        let blocking =
            self.streams.values().filter(|s| s.context == context && s.role == Role::Blocking);
        blocking.filter_map(|s| s.capture.as_ref()).map(|&(id, _)| id).collect()
    }

    /// Calls that a capture cannot see (allocation, synchronous copies, queries) are refused by the thread's mode.
    pub fn not_unsafe(&mut self) -> Cu {
        let (mode, thread) = (MODE.get(), super::thread());
        self.refuse(Status::STREAM_CAPTURE_UNSUPPORTED, |capture| {
            let own = capture.thread == thread && capture.mode != RELAXED;
            mode != RELAXED && (own || mode == GLOBAL && capture.mode == GLOBAL)
        })
    }

    fn refuse(&mut self, status: Status, which: impl Fn(&Capture) -> bool) -> Cu {
        let mut refused = false;
        for capture in self.captures.values_mut().filter(|capture| which(capture)) {
            capture.invalid = true;
            refused = true;
        }
        if refused { Err(status) } else { Ok(()) }
    }

    /// Ends a capture: its streams are free again.
    fn end_capture(&mut self, stream: Handle) -> Cu<Graph> {
        let (id, capture) = self.capture_of(stream)?;
        if capture.origin != stream {
            capture.invalid = true;
            return Err(Status::STREAM_CAPTURE_UNMATCHED);
        }
        if capture.mode != RELAXED && capture.thread != super::thread() {
            return Err(Status::STREAM_CAPTURE_WRONG_THREAD);
        }
        let capture = self.captures.remove(&id).ok_or(Status::ILLEGAL_STATE)?;
        let mut ends = Vec::new();
        let mut origin = Vec::new();
        for (&handle, s) in &mut self.streams {
            if s.capture.as_ref().is_some_and(|&(other, _)| other == id) {
                let (_, frontier) = s.capture.take().unwrap_or_default();
                if handle == stream { origin = frontier } else { ends.extend(frontier) }
            }
        }
        if capture.invalid {
            return Err(Status::STREAM_CAPTURE_INVALIDATED);
        }
        if ends.iter().any(|&end| !precedes(&capture.nodes, end, &origin)) {
            return Err(Status::STREAM_CAPTURE_UNJOINED);
        }
        Ok(Graph { context: capture.context, lanes: capture.streams.len(), nodes: capture.nodes })
    }
}

/// Whether a node is one of `ends` or leads to one.
fn precedes(nodes: &[Node], node: usize, ends: &[usize]) -> bool {
    let mut seen = vec![false; nodes.len()];
    let mut stack = ends.to_vec();
    while let Some(at) = stack.pop() {
        if !std::mem::replace(&mut seen[at], true) {
            stack.extend(&nodes[at].after);
        }
    }
    seen[node]
}

entries! {
    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) {
        if mode > RELAXED {
            return Err(Status::INVALID_VALUE);
        }
        let (mut device, stream) = locked(stream)?;
        let s = device.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        if s.role == Role::Legacy {
            return Err(Status::STREAM_CAPTURE_UNSUPPORTED);
        }
        if s.capture.is_some() {
            return Err(Status::ILLEGAL_STATE);
        }
        let context = s.context;
        let id = u64::from(device.actor());
        let capture = Capture {
            context,
            mode,
            thread: super::thread(),
            origin: stream,
            streams: vec![stream],
            nodes: Vec::new(),
            invalid: false,
        };
        device.captures.insert(id, capture);
        if let Some(stream) = device.streams.get_mut(&stream) {
            stream.capture = Some((id, Vec::new()));
        }
        Ok(())
    }

    fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) {
        graph.check()?;
        let (mut device, stream) = locked(stream)?;
        graph.set(Handle::NULL)?;
        let captured = Arc::new(device.end_capture(stream)?);
        let handle = device.handle(Kind::Graph);
        device.graphs.insert(handle, captured);
        graph.set(handle)
    }

    fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) {
        status.check()?;
        let (mut device, stream) = locked(stream)?;
        let s = device.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        if s.role == Role::Legacy && !device.blocking_captures(s.context).is_empty() {
            return Err(Status::STREAM_CAPTURE_IMPLICIT);
        }
        status.set(match device.capture_of(stream) {
            Err(_) => 0,
            Ok((_, capture)) => 1 + u32::from(capture.invalid),
        })
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        init::check()?;
        let new = mode.get()?;
        if new > RELAXED {
            return Err(Status::INVALID_VALUE);
        }
        mode.set(MODE.replace(new))
    }
}

/// Locks the current context's device for a call that a capture may forbid.
pub fn unsafe_call() -> Cu<(std::sync::MutexGuard<'static, Device>, Handle)> {
    let (mut device, context) = device::current()?;
    device.not_unsafe()?;
    Ok((device, context))
}
