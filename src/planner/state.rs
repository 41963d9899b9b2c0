//! What a sequence brings to its plan: its segments, what they protect, and the shares of the budget as far as numbers decide,
//! which layers may bring with their scores.

use std::ops::Range;

use crate::allocate::{Demand, Heads, Layers, Share, allocate};
use crate::backend::Backend;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::geometry::{Geometry, MAX_LEN};
use crate::ids::{KvHead, LayerId, Position};
use crate::plan::Report;
use crate::policy::{Policy, PolicyConfig};
use crate::score::Room;
use crate::select::align::units;
use crate::select::protect::{Protect, count};
use crate::spans::Spans;

/// A sequence to plan for.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Tokens it has seen.
    pub tokens: u32,
    /// Positions its heads hold, `[layer][head]`, if it has been compressed before.
    pub held: Option<&'a [&'a [Vec<Position>]]>,
    /// What stretches of it are, for policies that ask.
    pub spans: Option<&'a Spans>,
}

impl From<u32> for Sequence<'_> {
    /// A dense sequence of so many tokens.
    fn from(tokens: u32) -> Self {
        Self { tokens, held: None, spans: None }
    }
}

/// One KV head of one layer. Indices count slots, or units where units are larger than a slot.
pub(super) struct Segment {
    pub(super) len: u32,
    pub(super) held: Option<Vec<Position>>,
    pub(super) units: Option<Vec<Range<u32>>>,
    pub(super) protected: Vec<Range<u32>>,
}

impl Segment {
    pub(super) fn new(len: u32, held: Option<Vec<Position>>, unit: u32) -> Self {
        let units = (unit > 1).then(|| units(len, held.as_deref(), unit));
        let len = units.as_ref().map_or(len, |u| u.len() as u32);
        Self { len, held, units, protected: Vec::new() }
    }

    /// Indices that hold any of a position range.
    pub(super) fn indices_of(&self, positions: Range<u32>) -> Range<u32> {
        let before = |p: u32| match (&self.held, &self.units) {
            (Some(held), _) => held.partition_point(|h| h.0 < p) as u32,
            (None, Some(units)) => p.min(units.last().map_or(0, |u| u.end)),
            (None, None) => p.min(self.len),
        };
        let slots = before(positions.start)..before(positions.end);
        match &self.units {
            None => slots,
            Some(units) => {
                let first = units.partition_point(|u| u.end <= slots.start) as u32;
                let end = units.partition_point(|u| u.start < slots.end) as u32;
                first..end.max(first)
            }
        }
    }

    pub(super) fn slots_in(&self, indices: &[u32]) -> u64 {
        match &self.units {
            None => indices.len() as u64,
            Some(units) => indices.iter().map(|&u| units[u as usize].clone().len() as u64).sum(),
        }
    }

    pub(super) fn slots(&self) -> u64 {
        let held = self.units.as_ref().map(|u| u.last().map_or(0, |u| u.end));
        u64::from(held.unwrap_or(self.len))
    }

    pub(super) fn positions(&self, indices: &[u32]) -> Vec<Position> {
        let position = |slot: u32| match &self.held {
            Some(held) => held[slot as usize],
            None => Position(slot),
        };
        match &self.units {
            None => indices.iter().map(|&slot| position(slot)).collect(),
            Some(units) => {
                indices.iter().flat_map(|&u| units[u as usize].clone()).map(position).collect()
            }
        }
    }
}

/// What a sequence's plan needs beside scores.
pub(super) struct State {
    pub(super) tokens: u32,
    pub(super) recent: u32,
    pub(super) slots_per_head: u64,
    pub(super) segments: Vec<Segment>,
    /// To be kept, in units.
    budget: u64,
    pub(super) shares: Vec<Share>,
    /// What the layers looked at so far prefer: they share out the budget, unless it is scarce.
    pub(super) preferences: Option<Vec<f64>>,
    pub(super) report: Report,
    pub(super) spans: Option<Spans>,
    /// Shares of the segments as a profile has them.
    pub(super) profile: Option<Vec<f32>>,
}

impl State {
    /// What scorers measure sets of slots against.
    pub(super) fn room(&self) -> Room {
        let Self { tokens, slots_per_head, recent, .. } = *self;
        Room { tokens, slots_per_head, recent }
    }

    /// Whether what layers keep depends on later ones: some budget is contested over several, or shared out by what they prefer.
    pub(super) fn spans_layers(&self, firsts: &[usize]) -> bool {
        let layer = |s: usize| firsts.partition_point(|&first| first <= s);
        let contested = self.shares.iter().any(|share| {
            let segments = &share.contest.segments;
            !segments.is_empty() && layer(segments.start) != layer(segments.end - 1)
        });
        contested || self.preferences.is_some()
    }

    /// Divides the budget, by what layers prefer as far as that is known.
    pub(super) fn share_out(&mut self, config: &PolicyConfig, geometry: &Geometry) -> Result<()> {
        let heads: Vec<usize> = geometry.layers().iter().map(|s| s.kv_heads()).collect();
        let lens: Vec<u64> = self.segments.iter().map(|s| s.len.into()).collect();
        let protected: Vec<u64> = self.segments.iter().map(|s| count(&s.protected)).collect();
        let preferences = self.preferences.as_deref().unwrap_or(&[]);
        let (lens, protected, budget) = (&lens, &protected, self.budget);
        let demand = Demand { heads: &heads, lens, protected, preferences, budget };
        self.shares = allocate(&config.layers, &config.heads, &demand)?;
        if demand.is_scarce() {
            self.preferences = None;
        }
        Ok(())
    }

    pub(super) fn new<B: Backend>(
        policy: &Policy<B>,
        geometry: &Geometry,
        budget: Budget,
        sequence: Sequence<'_>,
    ) -> Result<Self> {
        let tokens = sequence.tokens;
        if u64::from(tokens) > MAX_LEN {
            return Err(Error::TooLarge { what: "tokens", got: tokens.into(), limit: MAX_LEN });
        }
        let spans = sequence.spans.cloned();
        if let Some(end) = spans.as_ref().map(Spans::end).filter(|&end| end > tokens) {
            let (got, limit) = (end.into(), tokens.into());
            return Err(Error::TooLarge { what: "end of a span", got, limit });
        }
        let config = &policy.config;
        let mut segments = Vec::with_capacity(geometry.heads());
        for (l, shape) in geometry.layers().iter().enumerate() {
            for h in 0..shape.kv_heads() {
                let held = match sequence.held {
                    Some(held) => Some(held_of(held, l, h, shape.kv_heads(), tokens)?),
                    None => None,
                };
                let len = held.as_ref().map_or(tokens, |p| p.len() as u32);
                segments.push(Segment::new(len, held, config.align.unit));
            }
        }
        let available: u64 = segments.iter().map(Segment::slots).sum();
        let budget_slots = budget.resolve(geometry, u64::from(tokens));
        let slots = budget_slots.min(available);
        let slots_per_head = slots / segments.len().max(1) as u64;
        let protect = config.protect.for_budget(slots_per_head);
        let protect = protect.for_spans(spans.as_ref().unwrap_or(&Spans::default()));
        for segment in &mut segments {
            segment.protected = protect.slots(tokens, u64::MAX, |r| segment.indices_of(r));
        }
        let whole: u64 = segments.iter().map(|s| u64::from(s.len)).sum();
        let in_units = if slots == available {
            whole
        } else {
            in_units(slots, config.align.unit, &segments, &protect, tokens).min(whole)
        };
        let heads: Vec<usize> = geometry.layers().iter().map(|s| s.kv_heads()).collect();
        let profile = match &config.heads {
            // Of the tokens seen: what a head holds after an earlier compression says nothing of its needs.
            Heads::Profile { profile } => {
                let full = geometry.slots(tokens.into()).max(1);
                Some(profile.shares_of(&heads, slots as f64 / full as f64)?)
            }
            _ => None,
        };
        let preferences = matches!(config.layers, Layers::Preference(_)).then(Vec::new);
        let mut state = Self {
            tokens,
            recent: protect.recent,
            slots_per_head,
            segments,
            budget: in_units,
            shares: Vec::new(),
            preferences,
            report: Report { budget_slots, available_slots: available, ..Report::default() },
            spans,
            profile,
        };
        state.share_out(config, geometry)?;
        if config.reference.is_none() {
            // Shares that are still to grow have room for what is protected already.
            state.report.protection_cut =
                protect_segments(&mut state.segments, &state.shares, &protect, tokens);
        }
        Ok(state)
    }
}

/// Whole units that fit into `slots`. Partly filled last units that are sure to be kept cost what they hold.
fn in_units(slots: u64, unit: u32, segments: &[Segment], protect: &Protect, tokens: u32) -> u64 {
    let unit = u64::from(unit);
    let lacking = |segment: &Segment| {
        let last = segment.units.as_ref().and_then(|u| u.last())?;
        let place = segment.len - 1;
        let safe = protect.positions(tokens).into_iter().map(|r| segment.indices_of(r));
        safe.into_iter().any(|r| r.contains(&place)).then_some(unit - last.len() as u64)
    };
    let refined = (slots + segments.iter().filter_map(lacking).sum::<u64>()) / unit;
    if refined >= segments.len() as u64 { refined } else { slots / unit }
}

/// Sets what each segment protects within its share; returns the slots that protection lost.
fn protect_segments(
    segments: &mut [Segment],
    shares: &[Share],
    protect: &Protect,
    tokens: u32,
) -> u64 {
    let mut cut = 0;
    for share in shares {
        let alone = share.contest.segments.len() == 1;
        let budget = if alone { share.contest.budget } else { u64::MAX };
        for s in share.contest.segments.clone() {
            let segment = &mut segments[s];
            let of = |budget| protect.slots(tokens, budget, |r| segment.indices_of(r));
            let (all, kept) = (of(u64::MAX), of(budget));
            let slots = |r: &[Range<u32>]| {
                segment.slots_in(&r.iter().flat_map(|r| r.clone()).collect::<Vec<_>>())
            };
            cut += slots(&all) - slots(&kept);
            segment.protected = kept;
        }
    }
    cut
}

/// The positions a head holds, checked.
fn held_of(
    held: &[&[Vec<Position>]],
    l: usize,
    h: usize,
    heads: usize,
    tokens: u32,
) -> Result<Vec<Position>> {
    let layer = held.get(l).ok_or(Error::Shape {
        what: "layers of the held positions",
        expected: l as u64 + 1,
        got: held.len() as u64,
    })?;
    if layer.len() != heads {
        return Err(Error::Shape {
            what: "heads of the held positions",
            expected: heads as u64,
            got: layer.len() as u64,
        });
    }
    let row = &layer[h];
    let bad = |i: usize| row[i].0 >= tokens || (i > 0 && row[i] <= row[i - 1]);
    match (0..row.len()).find(|&i| bad(i)) {
        None => Ok(row.clone()),
        Some(index) => Err(Error::Positions {
            layer: LayerId(l as u32),
            head: KvHead(h as u32),
            index,
            got: row[index].0.into(),
            tokens: tokens.into(),
        }),
    }
}
