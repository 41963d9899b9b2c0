//! Running tasks: what each kind of work does to memory, and what becomes of findings.

use std::time::Instant;

use super::abi::Host;
use super::device::Device;
use super::finding;
use super::handle::Handle;
use super::status::of_class;
use super::work::{Action, Launch, Task};
use crate::memory::{Fault, OpOrder};
use crate::{Class, Report, exec};

impl Device {
    /// Runs a task, unless its context failed before.
    pub fn execute(&mut self, task: Task) {
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
                self.note(fault);
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

    /// Says behind a message what the operations in it were.
    fn explain(&self, message: &mut String) {
        let mut numbers: Vec<usize> = message
            .split("operation #")
            .skip(1)
            .filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            if let Some(label) = self.work.label(number) {
                message.push_str(&format!("\n  #{number}: {label}"));
            }
        }
    }

    /// A finding that ends nothing.
    pub fn note(&mut self, fault: Fault) {
        let mut report = finding(fault.class, fault.message);
        self.explain(&mut report.message);
        self.log.reports.push(report);
    }

    /// A fault: the context is unusable from now on.
    fn fail(&mut self, context: Handle, mut report: Report) {
        self.explain(&mut report.message);
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
