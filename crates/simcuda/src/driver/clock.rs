//! Vector clocks over the actors of stream work: per device, the last operation of each actor that is known to have
//! finished before. Actor 0 of a device is the host.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is ordered before something, per device and actor. Other devices appear only through events and peer copies.
#[derive(Debug, Clone, Default)]
pub struct Clock(BTreeMap<usize, Vec<u32>>);

impl Clock {
    /// Knows all that the other knows, too.
    pub fn join(&mut self, other: &Self) {
        for (&ordinal, seen) in &other.0 {
            join(self.0.entry(ordinal).or_default(), seen);
        }
    }

    /// Knows what an actor of one device knows, too.
    pub fn join_on(&mut self, ordinal: usize, seen: &[u32]) {
        join(self.0.entry(ordinal).or_default(), seen);
    }

    /// The actor begins its next operation, which knows itself; returns its number.
    pub fn advance(&mut self, ordinal: usize, actor: u32) -> u32 {
        let seq = self.on(ordinal).get(actor as usize).map_or(1, |seq| seq + 1);
        self.tick(ordinal, actor, seq);
        seq
    }

    /// The actor's operation with this number has begun: it knows itself.
    pub fn tick(&mut self, ordinal: usize, actor: u32, seq: u32) {
        let seen = self.0.entry(ordinal).or_default();
        let at = actor as usize;
        if seen.len() <= at {
            seen.resize(at + 1, 0);
        }
        seen[at] = seq;
    }

    /// What is known about one device.
    pub fn on(&self, ordinal: usize) -> &[u32] {
        self.0.get(&ordinal).map_or(&[], Vec::as_slice)
    }
}

/// What the host knows to have finished, and its own operations as actor 0: one for all threads and devices, since
/// waiting for one device also tells what that device had waited for on another. Locked last and briefly.
pub fn host() -> MutexGuard<'static, Clock> {
    static HOST: Mutex<Clock> = Mutex::new(Clock(BTreeMap::new()));
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The later of the two for each actor.
fn join(into: &mut Vec<u32>, other: &[u32]) {
    if into.len() < other.len() {
        into.resize(other.len(), 0);
    }
    for (known, &seen) in into.iter_mut().zip(other) {
        *known = (*known).max(seen);
    }
}
