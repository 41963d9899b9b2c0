//! Planning without waiting: what pushes decide stays on the device until somebody asks.
//!
//! A push of a policy whose budgets are numbers is then launches and nothing else, and the caller cuts caches by the
//! selection itself (`FlatCache::gather_selected` of the CUDA backend). The plan is the same.

use super::{Parts, Planner};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::ids::LayerId;

/// What has not been read back.
pub(super) struct Deferred<B: Backend> {
    /// NaN of each layer's segments.
    pub(super) nan: Vec<B::Counts>,
    settled: Vec<Settled<B>>,
}

/// What the push of a layer decided.
struct Settled<B: Backend> {
    by: usize,
    parts: Parts,
    selection: B::Selection,
}

impl<B: Backend> Deferred<B> {
    pub(super) fn settle(&mut self, by: usize, parts: Parts, selection: B::Selection) {
        self.settled.push(Settled { by, parts, selection });
    }
}

/// A cascade narrows what it has read.
pub(super) fn apart(both: bool) -> Result<()> {
    match both {
        false => Ok(()),
        true => Err(Error::Unsupported {
            what: "a deferred cascade",
            why: "a cascade asks at every push what the earlier layers still hold",
        }),
    }
}

impl<B: Backend> Planner<'_, B> {
    /// Leaves on the device what pushes decide: [`selected`](Self::selected) lends it, [`finish`](Self::finish) reads it.
    /// Until then [`held`](Self::held) is `None` for settled layers, and NaN that the policy does not allow are no error.
    /// Policies that need numbers in between (mass thresholds, blended budgets, two stages, subspaces of keys) still wait for
    /// those, and layers by preference once, at the last one.
    ///
    /// Errors: a layer has been pushed; a cascade; reference modes, which run on the host.
    pub fn deferred(mut self) -> Result<Self> {
        apart(self.cascade)?;
        if self.policy.config.reference.is_some() {
            let why = "they reproduce published code on the host";
            return Err(Error::Unsupported { what: "deferred reference modes", why });
        }
        if !self.pushed.is_empty() {
            let (got, layers) = (self.pushed.len(), self.geometry.layers().len());
            return Err(Error::LayerOrder { expected: 0, got, layers });
        }
        self.deferred = Some(Deferred { nan: Vec::new(), settled: Vec::new() });
        Ok(self)
    }

    /// What a deferred planner keeps of a settled layer: a selection, and its segment for the first head of `sequence`;
    /// the other heads follow. It counts slots, or units where the policy keeps units of several slots.
    pub fn selected(&self, sequence: usize, layer: LayerId) -> Option<(&B::Selection, usize)> {
        let heads = self.geometry.layers().get(layer.index())?.kv_heads();
        let sought = (layer.index(), sequence * heads..(sequence + 1) * heads);
        self.deferred.as_ref()?.settled.iter().find_map(|settled| {
            let place = settled.parts.iter().position(|part| *part == sought)?;
            let first = settled.parts[..place].iter().map(|(_, rows)| rows.len()).sum();
            Some((&settled.selection, first))
        })
    }

    /// Reads what was deferred, as if it had been read at each push.
    pub(super) fn read_back(&mut self) -> Result<()> {
        let Some(Deferred { nan, settled }) = self.deferred.take() else { return Ok(()) };
        for (l, counts) in (0u32..).zip(&nan) {
            self.report_nan(LayerId(l), counts)?;
        }
        let mut settled = settled.into_iter().peekable();
        for l in 0..self.pushed.len() {
            self.note_peak(l + 1);
            while let Some(Settled { parts, selection, .. }) = settled.next_if(|s| s.by == l) {
                let selection = self.backend.selection_to_host(&selection)?;
                self.keep(&parts, &selection, false)?;
            }
        }
        Ok(())
    }
}
