//! Protection: position ranges that are kept before any score is asked. Ranges, never huge scores.
//!
//! Where the budget of a head is smaller than what is protected in it, this order decides what stays: the
//! last token, then sinks from the first, then recent tokens from the newest, then named ranges, the
//! last position first. So a head always keeps its newest token, and what it lacks is counted in the report.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;
use crate::spans::{SpanKind, Spans};

/// What must not be evicted, by position.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Protect {
    /// Tokens at the start (attention sinks).
    pub sinks: u32,
    /// Tokens at the end.
    pub recent: u32,
    /// At least this fraction of the budget per head, as tokens at the end (H2O keeps one half).
    pub recent_share: Fraction,
    /// Position ranges that the caller names: a system prompt, a frame, an answer format.
    pub ranges: Vec<Range<u32>>,
    /// Kinds of spans, wherever the sequence has such.
    pub spans: Vec<SpanKind>,
}

impl Protect {
    /// Ranges must not be reversed.
    pub fn validate(&self) -> Result<()> {
        match self.ranges.iter().find(|r| r.start > r.end) {
            None => Ok(()),
            Some(range) => Err(Error::Parameter {
                name: "ranges",
                expected: "start <= end",
                got: format!("{}..{}", range.start, range.end),
            }),
        }
    }

    /// The same, with the recent tokens resolved for a budget of `slots_per_head`.
    pub fn for_budget(&self, slots_per_head: u64) -> Self {
        let share = self.recent_share.of(slots_per_head).min(MAX_LEN) as u32;
        Self { recent: self.recent.max(share), ..self.clone() }
    }

    /// The same, with the sequence's spans of protected kinds as ranges.
    pub fn for_spans(&self, spans: &Spans) -> Self {
        let named = self.spans.iter().flat_map(|&kind| spans.of(kind));
        Self { ranges: self.ranges.iter().cloned().chain(named).collect(), ..self.clone() }
    }

    /// Protected position ranges of a sequence of `tokens` tokens, ascending and disjoint.
    pub fn positions(&self, tokens: u32) -> Vec<Range<u32>> {
        let named = self.ranges.iter().map(|r| r.start.min(tokens)..r.end.min(tokens));
        let sinks = 0..self.sinks.min(tokens);
        let recent = tokens.saturating_sub(self.recent)..tokens;
        merge(named.chain([sinks, recent]).collect())
    }

    /// What a head with `budget` slots can keep of its protected ones, by the module's rule.
    ///
    /// `slots_of` maps a position range to the head's slots (or units) that hold any of it.
    pub fn slots(
        &self,
        tokens: u32,
        budget: u64,
        slots_of: impl Fn(Range<u32>) -> Range<u32>,
    ) -> Vec<Range<u32>> {
        let all = merge(self.positions(tokens).into_iter().map(&slots_of).collect());
        if count(&all) <= budget {
            return all;
        }
        let last = slots_of(0..tokens).end.saturating_sub(1);
        let sinks = slots_of(0..self.sinks.min(tokens));
        let recent = slots_of(tokens.saturating_sub(self.recent)..tokens);
        let named = all.iter().rev().flat_map(|r| r.clone().rev());
        let ranked = [last].into_iter().chain(sinks).chain(recent.rev()).chain(named);
        let mut kept = BTreeSet::new();
        for slot in ranked.filter(|slot| all.iter().any(|r| r.contains(slot))) {
            if kept.len() as u64 == budget {
                break;
            }
            kept.insert(slot);
        }
        merge(kept.into_iter().map(|s| s..s + 1).collect())
    }
}

/// Slots in disjoint ranges.
pub(crate) fn count(ranges: &[Range<u32>]) -> u64 {
    ranges.iter().map(|r| u64::from(r.end - r.start)).sum()
}

/// Sorts, joins what touches, drops what is empty.
pub(crate) fn merge(mut ranges: Vec<Range<u32>>) -> Vec<Range<u32>> {
    ranges.retain(|r| r.start < r.end);
    ranges.sort_by_key(|r| r.start);
    let mut out: Vec<Range<u32>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}
