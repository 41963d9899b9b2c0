//! The planner: takes layers one by one, for one sequence or many, and says what each head keeps.
//!
//! Budgets that are decided by number or within a layer are settled as that layer is pushed; its tensors
//! are not needed again. Budgets contested over all layers need all layers' scores, but not all layers' caches:
//! with [`Planner::cascade`] every push also drops what can no longer win. Selection under a total order is
//! monotone, so what is not among the best `B` of the layers seen so far is never among the best `B` of all:
//! the cascade ends with the plan of the one-shot selection and holds at most the budget and one layer. So it is where layers share out
//! the budget by what they prefer: a layer's share is the largest while it is the last that has been seen.
//!
//! On a device that is not the host's, [`Planner::deferred`] leaves decisions where they were made until the end.
//!
//! Planning mutates nothing: caches change when the caller applies what [`Planner::held`] or the plan says.

mod contests;
mod deferred;
mod state;

pub use state::Sequence;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::allocate::{Layers, Split};
use crate::backend::Backend;
use crate::backend::ops::{Contest, TopK};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::ids::{LayerId, Position};
use crate::plan::{Plan, Report};
use crate::policy::Policy;
use crate::ragged::Ragged;
use crate::reference;
use crate::score::{FirstSet, Redundant, Scored, segment_lens};
use crate::select::protect::count;
use crate::view::LayerView;
use contests::{divided, visible};
use deferred::Deferred;
use state::State;

/// Below what any measured share is at any place, and still a normal number at the last place.
const LEAST_SHARE: f32 = 1e-20;

/// A layer that has been pushed. Rows: sequence after sequence, head after head.
struct Pushed<B: Backend> {
    scores: B::Floats,
    weighted: Option<B::Floats>,
    spread: Option<B::Floats>,
    /// Indices that are still in the race or settled.
    kept: Ragged<u32>,
}

/// Plans for a batch of sequences, layer by layer.
pub struct Planner<'a, B: Backend> {
    backend: &'a B,
    policy: &'a Policy<B>,
    geometry: &'a Geometry,
    budget: Budget,
    sequences: Vec<State>,
    /// First segment of each layer, and the end.
    firsts: Vec<usize>,
    pushed: Vec<Pushed<B>>,
    cascade: bool,
    deferred: Option<Deferred<B>>,
}

/// Rows of pushed layers: of which layer, and which.
type Parts = Vec<(usize, Range<usize>)>;

impl<'a, B: Backend> Planner<'a, B> {
    /// Resolves the budget of every sequence and shares it out as far as numbers alone decide.
    pub fn new<'s>(
        backend: &'a B,
        policy: &'a Policy<B>,
        geometry: &'a Geometry,
        budget: Budget,
        sequences: &[impl Into<Sequence<'s>> + Copy],
    ) -> Result<Self> {
        let mut firsts = vec![0];
        for shape in geometry.layers() {
            firsts.push(firsts[firsts.len() - 1] + shape.kv_heads());
        }
        let sequences = sequences
            .iter()
            .map(|&s| State::new(policy, geometry, budget, s.into()))
            .collect::<Result<_>>()?;
        let pushed = Vec::with_capacity(geometry.layers().len());
        let (cascade, deferred) = (false, None);
        Ok(Self { backend, policy, geometry, budget, sequences, firsts, pushed, cascade, deferred })
    }

    /// Drops what cannot win any more at every push, where budgets are contested over all layers or shared out by what they prefer.
    ///
    /// Errors for policies that do not [cascade](Policy::cascades): a second stage may want what the first has dropped, and so may
    /// heads of which a smaller budget of their layer makes another choice; of a [deferred](Self::deferred) planner.
    pub fn cascade(mut self) -> Result<Self> {
        deferred::apart(self.deferred.is_some())?;
        if !self.policy.cascades() {
            return Err(Error::Unsupported {
                what: "the cascade of this policy",
                why: "two stages, reference modes, and layers by preference with heads whose shares may \
                      grow as a budget shrinks want in the end what would have been dropped",
            });
        }
        self.cascade = true;
        Ok(self)
    }

    /// Scores the next layer, one view per sequence. Returns the layers of which [`held`](Self::held) has
    /// changed: apply it to their caches now, or wait for the plan.
    pub fn push(&mut self, layers: &[LayerView<'_, B::Storage<'_>>]) -> Result<Vec<LayerId>> {
        let l = self.pushed.len();
        self.check_views(l, layers)?;
        let layer = LayerId(l as u32);
        let described =
            layers.iter().zip(&self.sequences).map(|(view, state)| match &state.spans {
                Some(spans) => view.with_spans(spans),
                None => Ok(*view),
            });
        let layers = &described.collect::<Result<Vec<_>>>()?;
        let config = &self.policy.config;
        if let Some(reference) = config.reference {
            let scored =
                reference::score(self.backend, reference, config, self.budget, layer, layers)?;
            self.store(scored.scores, scored.weighted, None);
            return self.finish_reference(reference);
        }
        let scored = self.policy.score(self.backend, layer, layers)?;
        self.take(l, scored)
    }

    /// The same with scores from elsewhere: those of [`Policy::score`], which serve planners of many budgets, or
    /// any scores `[H, len]` of each view.
    ///
    /// Errors as [`push`](Self::push) does; also for scores of other lengths, and in reference mode.
    pub fn push_scored(
        &mut self,
        layers: &[LayerView<'_, B::Storage<'_>>],
        scored: impl Into<Scored<B::Floats>>,
    ) -> Result<Vec<LayerId>> {
        let l = self.pushed.len();
        self.check_views(l, layers)?;
        if self.policy.config.reference.is_some() {
            return Err(Error::Unsupported {
                what: "scores of your own in reference mode",
                why: "reference modes reproduce published scores",
            });
        }
        let scored = scored.into();
        let expected = segment_lens(layers);
        let redundant = scored.redundant.as_ref();
        if let Some(Redundant { slots, .. }) = redundant {
            expect("counts of redundant slots", expected.len() as u64, slots.len() as u64)?;
        }
        let Scored { scores, first, weighted, .. } = &scored;
        let by = redundant.map(|redundant| &redundant.by);
        for rows in [Some(scores), first.as_ref(), weighted.as_ref(), by] {
            let Some(got) = rows.map(|rows| self.backend.lens(rows)) else { continue };
            expect("score rows (segments)", expected.len() as u64, got.len() as u64)?;
            for (&expected, got) in expected.iter().zip(got) {
                expect("scores of a segment", expected.into(), got.into())?;
            }
        }
        let scored = self.policy.weighted(self.backend, layers, scored)?;
        self.take(l, scored)
    }

    /// Settles a layer by its scores.
    fn take(&mut self, l: usize, scored: Scored<B::Floats>) -> Result<Vec<LayerId>> {
        // Whoever asks for spans to be kept must hear of it if nobody says where they are.
        let untold = self.sequences.iter().any(|state| state.spans.is_none());
        if untold && !self.policy.config.protect.spans.is_empty() {
            let what = "spans of the sequence (spans; an empty list says that there are none)";
            return Err(Error::Missing { method: "protect_spans", what });
        }
        let Scored { mut scores, first, mut weighted, redundant, spread } = scored;
        self.check_spread(l, spread.as_ref())?;
        // NaN scores are NaN with any weights.
        let nan = self.backend.count_nan(weighted.as_ref().unwrap_or(&scores))?;
        match &mut self.deferred {
            Some(deferred) => deferred.nan.push(nan),
            None => self.report_nan(LayerId(l as u32), &nan)?,
        }
        if let Some(weighted) = &mut weighted {
            self.align(l, weighted)?;
        }
        self.align(l, &mut scores)?;
        if let Some(Redundant { mut by, slots }) = redundant {
            let counts = self.drop_counts(l, &self.backend.lens(&by), &slots);
            self.align(l, &mut by)?;
            for rows in [Some(&mut scores), weighted.as_mut()].into_iter().flatten() {
                self.backend.drop_top(&counts, &by, rows)?;
            }
        }
        if let Some(mut first) = first {
            let counts = self.first_counts(l, &first)?;
            self.align(l, &mut first)?;
            self.backend.pin_top(&counts, &first, &mut scores)?;
        }
        if self.sequences.iter().any(|s| s.profile.is_some()) {
            let (protected, weights) = self.places(l);
            self.backend.rank(&protected, &weights, &mut scores)?;
        }
        self.store(scores, weighted, spread);
        self.settle(l)
    }

    /// Positions that a sequence's heads still hold of a layer, once it has been pushed and read back.
    pub fn held(&self, sequence: usize, layer: LayerId) -> Option<Ragged<Position>> {
        if self.selected(sequence, layer).is_some() {
            return None;
        }
        let pushed = self.pushed.get(layer.index())?;
        let state = self.sequences.get(sequence)?;
        let l = layer.index();
        let heads = self.geometry.layers()[l].kv_heads();
        let rows = (0..heads).map(|h| {
            let kept = pushed.kept.row(sequence * heads + h);
            state.segments[self.firsts[l] + h].positions(kept)
        });
        Some(rows.collect())
    }

    /// The plans, one per sequence, once every layer has been pushed.
    ///
    /// Errors: layers that are missing; what a [deferred](Self::deferred) planner finds only now.
    pub fn finish(mut self) -> Result<Vec<Plan>> {
        let layers = self.geometry.layers().len();
        if self.pushed.len() != layers {
            return Err(Error::LayerOrder { expected: self.pushed.len(), got: layers, layers });
        }
        self.read_back()?;
        let plans = (0..self.sequences.len()).map(|i| {
            let state = &self.sequences[i];
            let kept = (0..layers as u32).filter_map(|l| self.held(i, LayerId(l))).collect();
            let mut report = state.report.clone();
            let mut plan = Plan::assemble(
                self.policy.config.name.clone(),
                self.budget,
                state.tokens,
                self.geometry,
                Report::default(),
                kept,
            );
            if self.policy.config.align.unit > 1 {
                let wanted = report.budget_slots.min(report.available_slots);
                report.alignment_waste = wanted.saturating_sub(plan.slots);
            }
            plan.report = report;
            plan
        });
        Ok(plans.collect())
    }

    fn check_views(&self, l: usize, layers: &[LayerView<'_, B::Storage<'_>>]) -> Result<()> {
        let shapes = self.geometry.layers();
        let Some(&shape) = shapes.get(l) else {
            return Err(Error::LayerOrder { expected: shapes.len(), got: l, layers: shapes.len() });
        };
        expect("views of a layer", self.sequences.len() as u64, layers.len() as u64)?;
        for (state, view) in self.sequences.iter().zip(layers) {
            let seen = view.shape();
            expect("kv heads", shape.kv_heads() as u64, seen.kv_heads() as u64)?;
            expect("query heads", shape.query_heads() as u64, seen.query_heads() as u64)?;
            expect("head dim", shape.head_dim() as u64, seen.head_dim() as u64)?;
            expect("tokens", u64::from(state.tokens), u64::from(view.tokens()))?;
            if view.k().dtype() != self.geometry.dtype() {
                let (expected, got) = (self.geometry.dtype(), view.k().dtype());
                return Err(Error::Dtype { what: "keys", expected, got });
            }
            for h in 0..shape.kv_heads() {
                let segment = &state.segments[self.firsts[l] + h];
                expect("slots of a head", segment.slots(), view.k().len(h) as u64)?;
                let positions = view.positions().map(|p| p[h].as_slice());
                if positions != segment.held.as_deref() {
                    return Err(Error::Unsupported {
                        what: "a view with other positions than its sequence",
                        why: "name the positions held when the planner is made",
                    });
                }
            }
        }
        Ok(())
    }

    fn report_nan(&mut self, layer: LayerId, counts: &B::Counts) -> Result<()> {
        let counts = self.backend.counts_to_host(counts)?;
        let count: u64 = counts.iter().sum();
        if count > 0 && !self.policy.config.allow_nan {
            return Err(Error::NanScores { layer, count });
        }
        let heads = self.geometry.layers()[layer.index()].kv_heads();
        for (state, counts) in self.sequences.iter_mut().zip(counts.chunks(heads)) {
            state.report.nan_scores += counts.iter().sum::<u64>();
        }
        Ok(())
    }

    /// Shares scores over heads and coarsens them to units, as the policy asks.
    fn align(&self, l: usize, rows: &mut B::Floats) -> Result<()> {
        let align = self.policy.config.align;
        let heads = self.geometry.layers()[l].kv_heads();
        if align.share_heads {
            self.backend.share_heads(&vec![heads; self.sequences.len()], rows)?;
        }
        if align.unit > 1 {
            let units = self.sequences.iter().flat_map(|state| {
                let segments = &state.segments[self.firsts[l]..self.firsts[l + 1]];
                segments.iter().map(|s| s.units.clone().unwrap_or_default())
            });
            *rows = self.backend.coarsen(&units.collect(), rows)?;
        }
        Ok(())
    }

    /// What comes first in each of a layer's segments, and the share that the profile has for it: something, however
    /// little, or the slots of a head without a share would all be worth the same.
    fn places(&self, l: usize) -> (Ragged<Range<u32>>, Vec<f32>) {
        let segments = self.firsts[l]..self.firsts[l + 1];
        let of = |state: &State| -> Vec<(Vec<Range<u32>>, f32)> {
            let shares = state.profile.as_deref().unwrap_or(&[]);
            let share = |s: usize| shares.get(s).copied().unwrap_or(0.0).max(LEAST_SHARE);
            segments.clone().map(|s| (state.segments[s].protected.clone(), share(s))).collect()
        };
        let (protected, shares): (Vec<_>, Vec<_>) = self.sequences.iter().flat_map(of).unzip();
        (protected.into_iter().collect(), shares)
    }

    /// Sizes of first sets in units, and equal for heads that must keep the same.
    fn first_counts(&self, l: usize, mass: &B::Floats) -> Result<Vec<u32>> {
        let align = self.policy.config.align;
        let heads = self.geometry.layers()[l].kv_heads();
        let sets = self.sequences.iter().flat_map(|state| {
            std::iter::repeat_n(self.policy.scorer.first_set(&state.room()), heads)
        });
        let limit = |(set, len): (FirstSet, u32)| (set.mass, set.slots.min(len.into()) as u32);
        let (thresholds, caps): (Vec<f32>, Vec<u32>) =
            sets.zip(self.backend.lens(mass)).map(limit).unzip();
        let slots = self.backend.mass_count(&thresholds, &caps, mass)?;
        let fewest = |layer: &[u32]| layer.iter().copied().min().unwrap_or(0);
        let shared = |layer: &[u32]| match align.share_heads {
            true => vec![fewest(layer); layer.len()],
            false => layer.to_vec(),
        };
        Ok(slots.chunks(heads).flat_map(shared).map(|n| n / align.unit).collect())
    }

    /// How many redundant slots are dropped, of heads that hold so many: in units.
    fn drop_counts(&self, l: usize, lens: &[u32], redundant: &[u32]) -> Vec<u32> {
        let heads = self.geometry.layers()[l].kv_heads();
        let rooms = self.sequences.iter().flat_map(|s| std::iter::repeat_n(s.room(), heads));
        let slots = lens.iter().zip(redundant);
        let dropped = rooms.zip(slots).map(|(room, (&len, &redundant))| {
            self.policy.scorer.dropped(&room, len, redundant).min(redundant)
        });
        dropped.map(|slots| slots / self.policy.config.align.unit).collect()
    }

    fn store(&mut self, scores: B::Floats, weighted: Option<B::Floats>, spread: Option<B::Floats>) {
        let l = self.pushed.len();
        let segments = |s: &'_ State| self.firsts[l]..self.firsts[l + 1].min(s.segments.len());
        let kept = self
            .sequences
            .iter()
            .flat_map(|s| s.segments[segments(s)].iter().map(|s| (0..s.len).collect()))
            .collect();
        self.pushed.push(Pushed { scores, weighted, spread, kept });
        if self.deferred.is_none() {
            self.note_peak(l + 1);
        }
    }

    /// Counts what is held of the first `layers` layers.
    fn note_peak(&mut self, layers: usize) {
        for (i, state) in self.sequences.iter_mut().enumerate() {
            let mut held = 0;
            for (l, pushed) in self.pushed[..layers].iter().enumerate() {
                let heads = self.geometry.layers()[l].kv_heads();
                for h in 0..heads {
                    let kept = pushed.kept.row(i * heads + h);
                    held += state.segments[self.firsts[l] + h].slots_in(kept);
                }
            }
            state.report.peak_slots = state.report.peak_slots.max(held);
        }
    }

    /// Layers that share out the budget by what they prefer must bring it.
    fn check_spread(&self, l: usize, spread: Option<&B::Floats>) -> Result<()> {
        if !matches!(self.policy.config.layers, Layers::Preference(_)) {
            return Ok(());
        }
        let what = "how attention spreads (the scorer cake measures it)";
        let spread = spread.ok_or(Error::Missing { method: "layers by preference", what })?;
        let lens = self.backend.lens(spread);
        let segments = self.sequences.len() * self.geometry.layers()[l].kv_heads();
        expect("rows of the spread (segments)", segments as u64, lens.len() as u64)?;
        lens.iter().try_for_each(|&n| expect("spread of a segment", 2, n.into()))
    }

    /// Shares out anew by what the layers pushed so far prefer.
    fn share_out(&mut self) -> Result<()> {
        let config = &self.policy.config;
        let Layers::Preference(preference) = &config.layers else { return Ok(()) };
        // Taken: a layer is read once.
        for (l, pushed) in self.pushed.iter_mut().enumerate() {
            let Some(spread) = pushed.spread.take() else { continue };
            let spread = self.backend.to_host(&spread)?;
            let heads = self.geometry.layers()[l].kv_heads();
            for (i, state) in self.sequences.iter_mut().enumerate() {
                let rows = i * heads..(i + 1) * heads;
                let sum = |of: usize| rows.clone().map(|r| f64::from(spread.row(r)[of])).sum();
                if let Some(preferences) = &mut state.preferences {
                    preferences.push(preference.of(sum(0), sum(1)));
                }
            }
        }
        let waiting = self.sequences.iter_mut().filter(|state| state.preferences.is_some());
        for state in waiting {
            state.share_out(config, self.geometry)?;
        }
        Ok(())
    }

    /// Settles what the layer just pushed decides.
    fn settle(&mut self, l: usize) -> Result<Vec<LayerId>> {
        let last = l + 1 == self.geometry.layers().len();
        if last || self.cascade {
            self.share_out()?;
        }
        // Sequence after sequence, and within each layer after layer, as contests are numbered.
        let mut parts = Vec::new();
        let mut contests = Vec::new();
        let mut splits = Vec::new();
        let mut next = 0;
        for (i, state) in self.sequences.iter().enumerate() {
            let layers = match (state.spans_layers(&self.firsts), last || self.cascade) {
                (true, false) => continue,
                (true, true) => 0..l + 1,
                (false, _) => l..l + 1,
            };
            let seen = self.firsts[layers.start]..self.firsts[layers.end];
            let mut held = Vec::with_capacity(seen.len());
            for m in layers {
                let heads = self.geometry.layers()[m].kv_heads();
                let rows = i * heads..(i + 1) * heads;
                held.extend(rows.clone().map(|row| self.pushed[m].kept.len(row) as u64));
                parts.push((m, rows));
            }
            for share in &state.shares {
                if let Some(contest) = visible(&share.contest, &seen, &held, next) {
                    contests.push(contest);
                    splits.push(share.split);
                }
            }
            next += seen.len();
        }
        let protected = self.protected(&parts);
        let selection = self.select(&parts, contests, &splits, &protected)?;
        let mut changed: Vec<usize> = parts.iter().map(|(m, _)| *m).collect();
        changed.sort_unstable();
        changed.dedup();
        match &mut self.deferred {
            Some(deferred) => deferred.settle(l, parts, selection),
            None => {
                let selection = self.backend.selection_to_host(&selection)?;
                self.keep(&parts, &selection, !last)?;
            }
        }
        Ok(changed.into_iter().map(|m| LayerId(m as u32)).collect())
    }

    /// Protected indices of the segments, as places in what is still held.
    fn protected(&self, parts: &[(usize, Range<usize>)]) -> Ragged<Range<u32>> {
        let rows = parts.iter().flat_map(|(m, rows)| rows.clone().map(move |row| (*m, row)));
        rows.map(|(m, row)| {
            let heads = self.geometry.layers()[m].kv_heads();
            let segment = &self.sequences[row / heads].segments[self.firsts[m] + row % heads];
            let kept = self.pushed[m].kept.row(row);
            let place = |index: u32| kept.partition_point(|&k| k < index) as u32;
            let places = segment.protected.iter().map(|r| place(r.start)..place(r.end));
            places.filter(|r| r.start < r.end).collect()
        })
        .collect()
    }

    /// Runs the contests, those that are divided by number as so many of single segments, then second stages.
    fn select(
        &self,
        parts: &[(usize, Range<usize>)],
        mut contests: Vec<Contest>,
        splits: &[Split],
        protected: &Ragged<Range<u32>>,
    ) -> Result<B::Selection> {
        let backend = self.backend;
        let run = |contests: &[Contest], weighted: bool| {
            let rows: Vec<_> = parts
                .iter()
                .map(|(m, rows)| {
                    let pushed = &self.pushed[*m];
                    let second = pushed.weighted.as_ref().filter(|_| weighted);
                    (second.unwrap_or(&pushed.scores), rows.clone())
                })
                .collect();
            backend.top_k(&TopK { contests, protected }, &rows)
        };
        // A policy has one way to divide, so one kind of merit will do.
        let merits = if splits.iter().any(|split| matches!(split, Split::Blend(_))) {
            let won = backend.selected(&run(&contests, false)?)?;
            won.into_iter().map(u64::from).collect()
        } else if splits.iter().any(|split| matches!(split, Split::Mass(_))) {
            // Never over several layers: the parts are the rows of one, in their order.
            backend.free_mass(protected, &self.pushed[parts[0].0].scores)?
        } else {
            Vec::new()
        };
        if !merits.is_empty() {
            let lens: Vec<usize> = parts
                .iter()
                .flat_map(|(m, rows)| rows.clone().map(|r| self.pushed[*m].kept.len(r)))
                .collect();
            contests = contests
                .iter()
                .zip(splits)
                .map(|(contest, split)| divided(contest, *split, &merits, &lens))
                .collect::<Result<Vec<_>>>()?
                .concat();
        }
        let Some(stage) = &self.policy.config.two_stage else {
            return run(&contests, false);
        };
        let budgets = backend.selected(&run(&contests, false)?)?;
        // Of what is free to choose: protected slots are neither stage's merit.
        let stage_one = |s: usize| {
            let free = u64::from(budgets[s]).saturating_sub(count(protected.row(s)));
            stage.first_stage.of(free) as u32
        };
        let mut weighted = Vec::with_capacity(parts.len());
        let mut next = 0;
        for (m, rows) in parts {
            let pushed = &self.pushed[*m];
            let counts: Vec<u32> = (next..next + rows.len()).map(stage_one).collect();
            next += rows.len();
            let scores = backend.slice(&pushed.scores, rows.clone())?;
            let second = pushed.weighted.as_ref().unwrap_or(&pushed.scores);
            let mut second = backend.slice(second, rows.clone())?;
            backend.pin_top(&counts, &scores, &mut second)?;
            weighted.push(second);
        }
        let contests: Vec<Contest> = budgets
            .iter()
            .enumerate()
            .map(|(s, &n)| Contest { segments: s..s + 1, budget: n.into(), floors: vec![0] })
            .collect();
        let rows: Vec<_> = weighted.iter().zip(parts).map(|(w, p)| (w, 0..p.1.len())).collect();
        backend.top_k(&TopK { contests: &contests, protected }, &rows)
    }

    /// Narrows what is held to the selected places; scores follow if they are needed again.
    fn keep(
        &mut self,
        parts: &[(usize, Range<usize>)],
        selection: &Ragged<u32>,
        again: bool,
    ) -> Result<()> {
        let rows = parts.iter().flat_map(|(m, rows)| rows.clone().map(move |row| (*m, row)));
        let selected: BTreeMap<_, _> = rows.zip(selection.iter()).collect();
        for (m, pushed) in self.pushed.iter_mut().enumerate() {
            if !parts.iter().any(|(part, _)| *part == m) {
                continue;
            }
            // Rows that took no part keep their places.
            let places: Ragged<u32> = (0..pushed.kept.rows())
                .map(|row| match selected.get(&(m, row)) {
                    Some(places) => places.to_vec(),
                    None => (0..pushed.kept.len(row) as u32).collect(),
                })
                .collect();
            if again {
                pushed.scores = self.backend.pick(&places, &pushed.scores)?;
            }
            pushed.kept = places
                .iter()
                .zip(pushed.kept.iter())
                .map(|(places, kept)| places.iter().map(|&p| kept[p as usize]).collect())
                .collect();
        }
        Ok(())
    }

    /// In reference mode the published code decides, once all layers are there.
    fn finish_reference(&mut self, reference: reference::Reference) -> Result<Vec<LayerId>> {
        if self.pushed.len() < self.geometry.layers().len() {
            return Ok(Vec::new());
        }
        let config = &self.policy.config;
        for i in 0..self.sequences.len() {
            let mut scores = Vec::new();
            let mut weighted = Vec::new();
            for (m, pushed) in self.pushed.iter().enumerate() {
                let heads = self.geometry.layers()[m].kv_heads();
                let rows = i * heads..(i + 1) * heads;
                let host = |f| self.backend.to_host(&self.backend.slice(f, rows.clone())?);
                scores.push(host(&pushed.scores)?);
                weighted.push(pushed.weighted.as_ref().map(host).transpose()?);
            }
            let tokens = self.sequences[i].tokens;
            let kept = reference::select(
                reference,
                config,
                self.geometry,
                self.budget,
                tokens,
                &scores,
                &weighted,
            )?;
            for (m, kept) in kept.into_iter().enumerate() {
                let heads = self.geometry.layers()[m].kv_heads();
                let rows = i * heads..(i + 1) * heads;
                let old = std::mem::take(&mut self.pushed[m].kept);
                self.pushed[m].kept = old
                    .iter()
                    .enumerate()
                    .map(|(row, old)| match rows.contains(&row) {
                        true => kept.row(row - rows.start).to_vec(),
                        false => old.to_vec(),
                    })
                    .collect();
            }
        }
        Ok((0..self.pushed.len() as u32).map(LayerId).collect())
    }
}

fn expect(what: &'static str, expected: u64, got: u64) -> Result<()> {
    match expected == got {
        true => Ok(()),
        false => Err(Error::Shape { what, expected, got }),
    }
}
