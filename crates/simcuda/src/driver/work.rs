//! Stream work as tasks with explicit predecessors, and when they run.
//!
//! Streams, events and the legacy stream's rules only decide a task's predecessors and its vector clock at
//! submission. Policy `Eager` runs a task at once; `Lazy` when something waits for it, and then in seeded random order
//! wherever predecessors leave a choice, tasks of other streams included.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::abi::{Host, HostFunction};
use super::clock::{self, Clock};
use super::device::Device;
use super::handle::Handle;
use super::module::Loadable;
use super::status::{Cu, Status};
use super::stream::Role;
use crate::memory::OpOrder;
use crate::policy::Streams;

/// A kernel and what it is launched with.
pub struct Launch {
    pub module: Arc<Loadable>,
    pub kernel: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_shared: u32,
    pub params: Vec<u8>,
}

/// What a task does. Cheap to clone: a graph does so at each launch.
#[derive(Clone)]
pub enum Action {
    /// Nothing: a point in a stream that others can wait for.
    Mark,
    /// Gives an event its time.
    Record(Handle),
    /// Bytes staged at submission.
    Write {
        at: u64,
        bytes: Arc<[u8]>,
    },
    /// Bytes read at execution; with the hash they had at submission, unless in a graph.
    WriteFrom {
        at: u64,
        from: Host,
        bytes: usize,
        hash: Option<u64>,
    },
    Read {
        at: u64,
        to: Host,
        bytes: usize,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: u64,
    },
    Fill {
        at: u64,
        pattern: Arc<[u8]>,
        count: u64,
    },
    Launch(Arc<Launch>),
    Call {
        function: HostFunction,
        data: Host,
    },
    Free {
        at: u64,
    },
}

impl Action {
    /// What it does, in a report's words.
    pub fn label(&self) -> String {
        match self {
            Self::Mark => "wait".into(),
            Self::Record(_) => "event record".into(),
            Self::Write { at, bytes } => {
                format!("copy of {} bytes from the host to {at:#x}", bytes.len())
            }
            Self::WriteFrom { at, bytes, .. } => {
                format!("copy of {bytes} bytes from the host to {at:#x}")
            }
            Self::Read { at, bytes, .. } => format!("copy of {bytes} bytes at {at:#x} to the host"),
            Self::Copy { to, from, bytes } => {
                format!("copy of {bytes} bytes from {from:#x} to {to:#x}")
            }
            Self::Fill { at, pattern, count } => {
                format!("memset of {} bytes at {at:#x}", pattern.len() as u64 * count)
            }
            Self::Launch(launch) => match launch.module.module.kernels.get(launch.kernel) {
                Some(kernel) => format!("launch of {}", kernel.name),
                None => "launch".into(),
            },
            Self::Call { .. } => "host function".into(),
            Self::Free { at } => format!("free of {at:#x}"),
        }
    }
}

/// Submitted work.
pub struct Task {
    pub context: Handle,
    role: Role,
    after: Vec<u64>,
    pub order: OpOrder,
    pub action: Action,
}

/// What is submitted and has not run.
pub struct Work {
    pending: BTreeMap<u64, Task>,
    last: u64,
    random: u64,
    /// What each operation was, by its number less one: for reports.
    labels: Vec<String>,
    /// Something asked since the last submission whether work is done.
    asked: bool,
}

impl Work {
    pub fn new(seed: u64) -> Self {
        Self { pending: BTreeMap::new(), last: 0, random: seed, labels: Vec::new(), asked: false }
    }

    pub fn reseed(&mut self, seed: u64) {
        self.random = seed;
    }

    pub fn is_pending(&self, task: u64) -> bool {
        self.pending.contains_key(&task)
    }

    /// What an operation was, by its number.
    pub fn label(&self, number: usize) -> Option<&str> {
        self.labels.get(number.checked_sub(1)?).map(String::as_str)
    }

    /// splitmix64.
    fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }
}

impl Device {
    /// The order of the next operation of an actor, which knows what `known` holds for this device. Where races are
    /// not checked it knows everything.
    pub fn order(&mut self, actor: u32, seq: u32, known: &[u32], label: String) -> OpOrder {
        self.work.last += 1;
        self.work.labels.push(label);
        let known = if self.policy.checks.race {
            known.to_vec()
        } else {
            vec![u32::MAX; self.actors() as usize + 1]
        };
        OpOrder::new(self.work.last as u32, actor, seq, known)
    }

    /// The number that the next task will have.
    pub fn next_task(&self) -> u64 {
        self.work.last + 1
    }

    /// The order of something the host itself does: after all that it waited for, before all that it submits later.
    pub fn host_order(&mut self, label: &str) -> OpOrder {
        let (seq, known) = {
            let mut host = clock::host();
            (host.advance(self.ordinal, 0), host.on(self.ordinal).to_vec())
        };
        self.order(0, seq, &known, format!("{label} by the host"))
    }

    /// Adds work to a stream that is not capturing; returns the task's number.
    pub fn enqueue(&mut self, stream: Handle, after: &[u64], action: Action) -> Cu<u64> {
        let ordinal = self.ordinal;
        let s = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        let (context, role, actor, seq) = (s.context, s.role, s.actor, s.seq + 1);
        let (mut known, last) = (s.clock.clone(), s.last);
        let owner = self.contexts.get(&context).ok_or(Status::CONTEXT_IS_DESTROYED)?;
        let legacy = &self.streams[&owner.legacy];
        let mut after: Vec<u64> = after.iter().copied().chain(last).collect();
        known.join_on(ordinal, clock::host().on(ordinal));
        match role {
            Role::NonBlocking => {}
            Role::Blocking => {
                after.extend(legacy.last);
                known.join(&legacy.clock);
            }
            Role::Legacy => {
                after.extend(self.blocking_tasks(context));
                known.join(&owner.blocking);
            }
        }
        known.tick(ordinal, actor, seq);
        self.publish(context, role, &known);
        let order = self.order(
            actor,
            seq,
            known.on(ordinal),
            format!("{} in stream {actor}", action.label()),
        );
        let id = self.work.last;
        let s = self.streams.get_mut(&stream).ok_or(Status::INVALID_HANDLE)?;
        (s.clock, s.seq, s.last) = (known, seq, Some(id));
        self.add(id, Task { context, role, after, order, action });
        Ok(id)
    }

    /// Work of a graph's branch: its own actor, no stream.
    pub fn enqueue_branch(
        &mut self,
        context: Handle,
        role: Role,
        after: Vec<u64>,
        order: OpOrder,
        action: Action,
    ) -> u64 {
        let id = self.work.last;
        self.add(id, Task { context, role, after, order, action });
        id
    }

    /// Notes what waiting for all streams of the context makes known.
    fn publish(&mut self, context: Handle, role: Role, known: &Clock) {
        if let Some(owner) = self.contexts.get_mut(&context) {
            owner.everything.join(known);
            if role == Role::Blocking {
                owner.blocking.join(known);
            }
        }
    }

    fn add(&mut self, id: u64, task: Task) {
        self.work.asked = false;
        self.work.pending.insert(id, task);
        if self.policy.streams == Streams::Eager {
            self.run_until(|pending| !pending.contains_key(&id));
        }
    }

    fn blocking_tasks(&self, context: Handle) -> impl Iterator<Item = u64> + '_ {
        let blocking = move |(&id, task): (&u64, &Task)| {
            (task.context == context && task.role == Role::Blocking).then_some(id)
        };
        self.work.pending.iter().filter_map(blocking)
    }

    /// Runs until a task is done.
    pub fn wait_task(&mut self, task: u64) {
        self.run_until(|pending| !pending.contains_key(&task));
    }

    /// What the host waits for with a stream: for the legacy stream, the blocking ones too.
    pub fn stream_tasks(&self, stream: Handle) -> Cu<Vec<u64>> {
        let s = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        let mut tasks: Vec<u64> = s.last.into_iter().collect();
        if s.role == Role::Legacy {
            tasks.extend(self.blocking_tasks(s.context));
        }
        Ok(tasks)
    }

    /// Runs a stream's work; the host knows.
    pub fn wait_stream(&mut self, stream: Handle) -> Cu {
        self.log.waits += 1;
        let tasks = self.stream_tasks(stream)?;
        let s = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        let mut known = s.clock.clone();
        if let Some(owner) = self.contexts.get(&s.context).filter(|_| s.role == Role::Legacy) {
            known.join(&owner.blocking);
        }
        self.run_until(|pending| !tasks.iter().any(|task| pending.contains_key(task)));
        clock::host().join(&known);
        self.settle_pools();
        Ok(())
    }

    /// Runs all work of a context; the host knows.
    pub fn finish(&mut self, context: Handle) {
        self.log.waits += 1;
        self.run_until(|pending| !pending.values().any(|task| task.context == context));
        if let Some(owner) = self.contexts.get(&context) {
            clock::host().join(&owner.everything);
        }
        self.settle_pools();
    }

    /// Runs all work of the device.
    pub fn drain(&mut self) {
        self.run_until(BTreeMap::is_empty);
    }

    /// A query: the first one of pending work answers no, each later one lets one more task run, so that polling ends.
    pub fn poll(&mut self, tasks: &[u64]) -> Cu {
        let done = |work: &Work| !tasks.iter().any(|&task| work.is_pending(task));
        if !done(&self.work) && std::mem::replace(&mut self.work.asked, true) {
            self.step();
        }
        if done(&self.work) { Ok(()) } else { Err(Status::NOT_READY) }
    }

    fn run_until(&mut self, done: impl Fn(&BTreeMap<u64, Task>) -> bool) {
        while !done(&self.work.pending) {
            self.step();
        }
    }

    /// Runs one task whose predecessors are done. There is one, since predecessors have smaller numbers.
    fn step(&mut self) {
        let pending = &self.work.pending;
        let ready = |task: &Task| !task.after.iter().any(|before| pending.contains_key(before));
        let ready: Vec<u64> =
            pending.iter().filter(|(_, task)| ready(task)).map(|(&id, _)| id).collect();
        let choice = match self.policy.streams {
            Streams::Eager => 0,
            Streams::Lazy => self.work.random(ready.len().max(1)),
        };
        if let Some(task) = ready.get(choice).and_then(|id| self.work.pending.remove(id)) {
            self.execute(task);
        }
    }
}
