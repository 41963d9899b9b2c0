//! Stream work as tasks with explicit predecessors, and when they run.
//!
//! Streams, events and the legacy stream's rules only decide a task's predecessors and its vector clock at
//! submission. Policy `Eager` runs a task at once; `Lazy` when something waits for it, and then in seeded random order
//! wherever predecessors leave a choice, tasks of other streams included.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::abi::{Host, HostFunction};
use super::clock;
use super::device::Device;
use super::finding;
use super::handle::Handle;
use super::module::Loadable;
use super::status::{Cu, Status, of_class};
use super::stream::Role;
use crate::memory::{Fault, OpOrder};
use crate::policy::Streams;
use crate::{Class, Report, exec};

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

/// Submitted work.
pub struct Task {
    context: Handle,
    role: Role,
    after: Vec<u64>,
    order: OpOrder,
    action: Action,
}

/// What is submitted and has not run.
pub struct Work {
    pending: BTreeMap<u64, Task>,
    last: u64,
    random: u64,
    /// Something asked since the last submission whether work is done.
    asked: bool,
}

impl Work {
    pub fn new(seed: u64) -> Self {
        Self { pending: BTreeMap::new(), last: 0, random: seed, asked: false }
    }

    pub fn reseed(&mut self, seed: u64) {
        self.random = seed;
    }

    pub fn is_pending(&self, task: u64) -> bool {
        self.pending.contains_key(&task)
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
    /// The order of the next operation of an actor, which knows what `known` holds for this device.
    pub fn order(&mut self, actor: u32, seq: u32, known: &[u32]) -> OpOrder {
        self.work.last += 1;
        OpOrder::new(self.work.last as u32, actor, seq, known.to_vec())
    }

    /// The number that the next task will have.
    pub fn next_task(&self) -> u64 {
        self.work.last + 1
    }

    /// The order of something the host itself does: after all that it waited for, before all that it submits later.
    pub fn host_order(&mut self) -> OpOrder {
        self.host[0] += 1;
        let (seq, known) = (self.host[0], self.host.clone());
        self.order(0, seq, &known)
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
        known.join_on(ordinal, &self.host);
        match role {
            Role::NonBlocking => {}
            Role::Blocking => {
                after.extend(legacy.last);
                known.join(&legacy.clock);
            }
            Role::Legacy => {
                after.extend(self.blocking_tasks(context));
                known.join_on(ordinal, &owner.blocking);
            }
        }
        known.tick(ordinal, actor, seq);
        self.publish(context, role, known.on(ordinal));
        let order = self.order(actor, seq, known.on(ordinal));
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
    pub fn publish(&mut self, context: Handle, role: Role, known: &[u32]) {
        if let Some(owner) = self.contexts.get_mut(&context) {
            clock::join(&mut owner.everything, known);
            if role == Role::Blocking {
                clock::join(&mut owner.blocking, known);
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
    pub fn wait_stream(&mut self, stream: Handle) -> Cu {
        let s = self.streams.get(&stream).ok_or(Status::INVALID_HANDLE)?;
        let (context, role, last) = (s.context, s.role, s.last);
        let mut known = s.clock.on(self.ordinal).to_vec();
        let mut tasks: Vec<u64> = last.into_iter().collect();
        if role == Role::Legacy {
            tasks.extend(self.blocking_tasks(context));
            if let Some(owner) = self.contexts.get(&context) {
                clock::join(&mut known, &owner.blocking);
            }
        }
        self.run_until(|pending| !tasks.iter().any(|task| pending.contains_key(task)));
        clock::join(&mut self.host, &known);
        self.settle_pools();
        Ok(())
    }

    /// Runs all work of a context; the host knows.
    pub fn finish(&mut self, context: Handle) {
        self.run_until(|pending| !pending.values().any(|task| task.context == context));
        if let Some(owner) = self.contexts.get(&context) {
            clock::join(&mut self.host, &owner.everything);
        }
        self.settle_pools();
    }

    /// Runs all work of the device.
    pub fn drain(&mut self) {
        self.run_until(BTreeMap::is_empty);
    }

    /// A query: the first one of pending work answers no, each later one lets one more task run, so that polling ends.
    pub fn poll(&mut self, done: impl Fn(&Self) -> bool) -> Cu {
        if !done(self) && std::mem::replace(&mut self.work.asked, true) {
            self.step();
        }
        if done(self) { Ok(()) } else { Err(Status::NOT_READY) }
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

    /// Runs a task, unless its context failed before.
    fn execute(&mut self, task: Task) {
        let Task { context, order, action, .. } = task;
        if self.usable(context).is_err() {
            return;
        }
        let outcome = match action {
            Action::Mark => Ok(()),
            Action::Record(event) => {
                if let Some(record) =
                    self.events.get_mut(&event).and_then(|event| event.record.as_mut())
                {
                    record.time = Some(Instant::now());
                }
                Ok(())
            }
            Action::Write { at, bytes } => self.memory.write(at, &bytes, &order),
            Action::WriteFrom { at, from, bytes, hash } => {
                let data = from.bytes(bytes);
                if hash.is_some_and(|before| before != hash_of(data)) {
                    self.log.reports.push(finding(
                        Class::HostBuffer,
                        format!(
                            "the {bytes} host bytes at {:#x} changed between the submission of an asynchronous copy \
                             to {at:#x} and its execution",
                            from.0
                        ),
                    ));
                }
                self.memory.write(at, data, &order)
            }
            Action::Read { at, to, bytes } => self.read(at, to, bytes, &order),
            Action::Copy { to, from, bytes } => self.memory.copy(to, from, bytes, &order),
            Action::Fill { at, pattern, count } => self.memory.fill(at, &pattern, count, &order),
            Action::Launch(launch) => return self.launch(context, &launch, order),
            Action::Call { function, data } => {
                super::IN_HOST_FUNCTION.set(true);
                function(data.0 as *mut _);
                super::IN_HOST_FUNCTION.set(false);
                Ok(())
            }
            Action::Free { at } => self.free(at, &order),
        };
        if let Err(fault) = outcome {
            self.fail(context, finding(fault.class, fault.message));
        }
    }

    /// A copy to the host. Undefined bytes are reported but copied: hardware would, and nothing ran wrong.
    pub fn read(&mut self, at: u64, to: Host, bytes: usize, order: &OpOrder) -> Result<(), Fault> {
        let mut data = vec![0; bytes];
        match self.memory.read(at, &mut data, order, self.policy.checks.init) {
            Err(fault) if fault.class == Class::Uninitialised => {
                self.log
                    .reports
                    .push(finding(fault.class, format!("copy to the host: {}", fault.message)));
                self.memory.read(at, &mut data, order, false)?;
            }
            outcome => outcome?,
        }
        to.write(&data);
        Ok(())
    }

    /// A free is a write of all bytes: what another stream does with them without an order is a race.
    pub fn free(&mut self, at: u64, order: &OpOrder) -> Result<(), Fault> {
        let outcome = match self.allocations.get(&at) {
            Some(allocation) if self.policy.checks.race => {
                self.memory.fill(at, &[0xdd], allocation.bytes, order).map_err(|fault| Fault {
                    message: format!("freed while in use: {}", fault.message),
                    ..fault
                })
            }
            _ => Ok(()),
        };
        self.release(at);
        outcome
    }

    /// Gives memory back.
    pub fn release(&mut self, at: u64) {
        if let Some(allocation) = self.allocations.remove(&at) {
            if let Some(pool) = allocation.pool.and_then(|pool| self.pools.get_mut(&pool)) {
                pool.give(allocation.bytes);
            }
            // The table above has it, so memory has it, too.
            let _freed = self.memory.free(at);
        }
    }

    fn launch(&mut self, context: Handle, launch: &Launch, order: OpOrder) {
        let Some(kernel) = launch.module.module.kernels.get(launch.kernel) else { return };
        let outcome = exec::run(
            &exec::Launch {
                kernel,
                grid: launch.grid,
                block: launch.block,
                dynamic_shared: launch.dynamic_shared,
                params: &launch.params,
                op: order,
            },
            &mut self.memory,
            &self.policy,
        );
        self.log.printed.push_str(&outcome.printed);
        let (launches, sum) = self.log.counters.entry(kernel.name.clone()).or_default();
        *launches += 1;
        sum.add(&outcome.counters);
        if let Some(report) = outcome.report {
            self.fail(context, report);
        }
    }

    /// A fault: the context is unusable from now on.
    fn fail(&mut self, context: Handle, report: Report) {
        if let Some(context) = self.contexts.get_mut(&context) {
            context.error = Some(of_class(report.class));
        }
        self.log.reports.push(report);
    }
}

/// FNV-1a over 8-byte words.
pub fn hash_of(bytes: &[u8]) -> u64 {
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64, step)
}
