//! The caches of episodes: one in use, the others on the host.
//!
//! Caches of this crate are on the host as it is, so bringing one in moves it; an engine on a device copies here, and the budget of
//! a switch is the bytes of one cache.

use candle_core::{Result, bail};

use crate::cache::BudgetCache;
use crate::sequence::SequenceCache;

/// The caches of a conversation's episodes. Episodes may share one.
#[derive(Default)]
pub struct EpisodeStore {
    /// None while in use.
    caches: Vec<Option<SequenceCache>>,
    /// Cache of each episode.
    episodes: Vec<usize>,
    /// The cache in use.
    resident: Option<usize>,
}

impl EpisodeStore {
    /// Takes in the cache of the next episode; returns the episode.
    pub fn put(&mut self, cache: SequenceCache) -> usize {
        self.caches.push(Some(cache));
        self.share(self.caches.len() - 1)
    }

    /// The next episode has a cache that is here already; returns the episode.
    pub(super) fn share(&mut self, cache: usize) -> usize {
        self.episodes.push(cache);
        self.episodes.len() - 1
    }

    /// A cache that nothing was evicted from: the same for every episode.
    pub(super) fn whole(&self) -> Option<usize> {
        self.caches.iter().position(|c| c.as_ref().is_some_and(SequenceCache::is_dense))
    }

    /// Number of episodes.
    pub fn len(&self) -> usize {
        self.episodes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.episodes.is_empty()
    }

    /// Whether the cache of an episode is in use.
    pub fn is_resident(&self, episode: usize) -> bool {
        self.resident.is_some() && self.episodes.get(episode).copied() == self.resident
    }

    /// Brings the cache of an episode in as a sequence of `cache`, in the place of the one in use, which comes back as it is now. Whether
    /// that took a switch.
    ///
    /// Errors: no such episode, or no such sequence.
    pub fn activate(
        &mut self,
        episode: usize,
        cache: &mut BudgetCache,
        sequence: usize,
    ) -> Result<bool> {
        let Some(&wanted) = self.episodes.get(episode) else {
            bail!("expected an episode below {}, got {episode}", self.len());
        };
        if self.resident == Some(wanted) {
            return Ok(false);
        }
        cache.sequence_mut(sequence)?;
        let Some(coming) = self.caches[wanted].take() else {
            bail!("the cache of episode {episode} is in use elsewhere");
        };
        let leaving = cache.switch_sequence(sequence, coming)?;
        if let Some(resident) = self.resident.replace(wanted) {
            self.caches[resident] = Some(leaving);
        }
        Ok(true)
    }

    /// Bytes of keys and values that wait on the host.
    pub fn bytes(&self) -> u64 {
        self.caches.iter().flatten().map(SequenceCache::bytes_used).sum()
    }
}
