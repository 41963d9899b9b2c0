//! The 64 emulated devices: their tables, contexts and logs, each behind one lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::capture::Capture;
use super::context::{self, Context};
use super::event::Event;
use super::graph::{Exec, Graph};
use super::handle::{Handle, Kind};
use super::module::{Function, Loaded};
use super::pool::Pool;
use super::status::{Cu, Status};
use super::stream::{Role, Stream};
use super::work::Work;
use crate::memory::Memory;
use crate::{Counters, Policy, Report};

/// How many devices there are. cargo runs the tests of a file in one process: each takes a device of its own.
pub const DEVICES: usize = 64;

/// Device memory, as on an H100 with 80 GB.
pub const CAPACITY: u64 = 80 << 30;

/// Allocated device memory.
pub struct Allocation {
    pub bytes: u64,
    pub context: Handle,
    /// The pool of a stream-ordered allocation.
    pub pool: Option<Handle>,
    /// A `cuMemFreeAsync` was submitted.
    pub freeing: bool,
    /// A module's variable: only unloading the module frees it.
    pub variable: bool,
}

/// What tests ask for.
#[derive(Default)]
pub struct Log {
    pub reports: Vec<Report>,
    /// By kernel name: how many launches, and their sum.
    pub counters: BTreeMap<String, (u64, Counters)>,
    /// How often the host waited for the device.
    pub waits: u64,
    pub printed: String,
}

/// One device.
pub struct Device {
    pub ordinal: usize,
    pub policy: Policy,
    pub memory: Memory,
    pub allocations: BTreeMap<u64, Allocation>,
    pub contexts: BTreeMap<Handle, Context>,
    /// How often the primary context is retained, and its flags.
    pub retained: u32,
    pub primary_flags: u32,
    pub streams: BTreeMap<Handle, Stream>,
    pub events: BTreeMap<Handle, Event>,
    pub modules: BTreeMap<Handle, Loaded>,
    pub functions: BTreeMap<Handle, Function>,
    pub captures: BTreeMap<u64, Capture>,
    pub graphs: BTreeMap<Handle, Arc<Graph>>,
    pub execs: BTreeMap<Handle, Exec>,
    pub pools: BTreeMap<Handle, Pool>,
    pub default_pool: Handle,
    pub current_pool: Handle,
    pub work: Work,
    pub log: Log,
    actors: u32,
    serial: u64,
}

static DEVICE: [OnceLock<Mutex<Device>>; DEVICES] = [const { OnceLock::new() }; DEVICES];

/// Locks a device; None where there is no such device.
pub fn lock(ordinal: usize) -> Option<MutexGuard<'static, Device>> {
    let device = DEVICE.get(ordinal)?.get_or_init(|| Mutex::new(Device::new(ordinal)));
    Some(device.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether a CUdevice is one.
pub fn exists(ordinal: i32) -> Cu {
    super::init::check()?;
    if (0..DEVICES as i32).contains(&ordinal) { Ok(()) } else { Err(Status::INVALID_DEVICE) }
}

/// Locks a device named by a CUdevice.
pub fn by_ordinal(ordinal: i32) -> Cu<MutexGuard<'static, Device>> {
    exists(ordinal)?;
    lock(ordinal as usize).ok_or(Status::INVALID_DEVICE)
}

/// Locks the device that a handle of this kind belongs to.
pub fn owner(handle: Handle, kind: Kind) -> Cu<MutexGuard<'static, Device>> {
    super::init::check()?;
    let ordinal = handle.ordinal().filter(|_| handle.is(kind)).ok_or(Status::INVALID_HANDLE)?;
    lock(ordinal).ok_or(Status::INVALID_HANDLE)
}

/// Locks the device of the current context, which must be usable.
pub fn current() -> Cu<(MutexGuard<'static, Device>, Handle)> {
    super::init::check()?;
    let context = context::peek().ok_or(Status::INVALID_CONTEXT)?;
    let device = owner(context, Kind::Context).map_err(|_| Status::INVALID_CONTEXT)?;
    device.usable(context)?;
    Ok((device, context))
}

impl Device {
    fn new(ordinal: usize) -> Self {
        let mut device = Self {
            ordinal,
            policy: Policy::default(),
            memory: Memory::new(ordinal, CAPACITY),
            allocations: BTreeMap::new(),
            contexts: BTreeMap::new(),
            retained: 0,
            primary_flags: 0,
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            captures: BTreeMap::new(),
            graphs: BTreeMap::new(),
            execs: BTreeMap::new(),
            pools: BTreeMap::new(),
            default_pool: Handle::NULL,
            current_pool: Handle::NULL,
            work: Work::new(0),
            log: Log::default(),
            actors: 0,
            serial: 1, // serial 1 is the primary context
        };
        device.default_pool = device.handle(Kind::Pool);
        device.current_pool = device.default_pool;
        device.pools.insert(device.default_pool, Pool::default());
        device
    }

    /// A handle that was never given out before.
    pub fn handle(&mut self, kind: Kind) -> Handle {
        self.serial += 1;
        Handle::new(kind, self.ordinal, self.serial)
    }

    /// A number for a new actor in vector clocks.
    pub fn actor(&mut self) -> u32 {
        self.actors += 1;
        self.actors
    }

    /// How many actors there are beside the host.
    pub fn actors(&self) -> u32 {
        self.actors
    }

    /// The primary context's handle: the same after each reset.
    pub fn primary(&self) -> Handle {
        Handle::new(Kind::Context, self.ordinal, 1)
    }

    pub fn context(&mut self, context: Handle) -> Cu<&mut Context> {
        self.contexts.get_mut(&context).ok_or(Status::CONTEXT_IS_DESTROYED)
    }

    /// Whether calls on a context may go on: it exists and nothing failed in it.
    pub fn usable(&self, context: Handle) -> Cu {
        let context = self.contexts.get(&context).ok_or(Status::CONTEXT_IS_DESTROYED)?;
        context.error.map_or(Ok(()), Err)
    }

    /// A new context with its legacy stream.
    pub fn open(&mut self, context: Handle, flags: u32) {
        let legacy = self.open_stream(context, Role::Legacy, 0);
        self.contexts.insert(context, Context::new(flags, legacy));
    }

    /// Ends a context: its work runs to the end, then all that belongs to it goes. The last context that goes leaves
    /// the device as new, but for what tests have yet to ask for.
    pub fn close(&mut self, context: Handle) {
        self.finish(context);
        self.contexts.remove(&context);
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, module| module.context != context);
        self.functions.retain(|_, function| function.context != context);
        self.captures.retain(|_, capture| capture.context != context);
        self.graphs.retain(|_, graph| graph.context != context);
        self.execs.retain(|_, exec| exec.graph.context != context);
        super::pinned::forget(context);
        let addresses: Vec<u64> = self
            .allocations
            .iter()
            .filter(|(_, a)| a.context == context)
            .map(|(&at, _)| at)
            .collect();
        for at in addresses {
            self.release(at);
        }
        if self.contexts.is_empty() {
            self.memory = Memory::new(self.ordinal, CAPACITY);
            self.work = Work::new(self.policy.seed);
        }
    }

    /// Ends all contexts and forgets policy and log: the device as it was when the process began.
    pub fn reset(&mut self) {
        for context in self.contexts.keys().copied().collect::<Vec<_>>() {
            self.close(context);
        }
        self.retained = 0;
        self.primary_flags = 0;
        self.pools.retain(|&handle, _| handle == self.default_pool);
        self.current_pool = self.default_pool;
        self.pools.insert(self.default_pool, Pool::default());
        self.log = Log::default();
        self.policy = Policy::default();
        self.work = Work::new(self.policy.seed);
    }

    /// The allocation that holds `bytes` bytes from here on, if it may still be used.
    pub fn range(&self, at: u64, bytes: u64) -> Cu<&Allocation> {
        let (start, allocation) =
            self.allocations.range(..=at).next_back().ok_or(Status::INVALID_VALUE)?;
        let inside = at - start;
        if allocation.freeing || inside > allocation.bytes || bytes > allocation.bytes - inside {
            return Err(Status::INVALID_VALUE);
        }
        Ok(allocation)
    }
}
