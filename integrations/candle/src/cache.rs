//! The cache an engine adopts: sequences, the policy and the budget they are compressed by, and an attention
//! hook that appends new tokens and attends over whatever is held.
//!
//! Compression happens between forward passes ([`BudgetCache::compress`], [`BudgetCache::recompress_if_due`]),
//! or during the last one of a prompt ([`BudgetCache::compressing`]), never inside a decode step.

use std::sync::Arc;

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{Cpu, HostLayer};
use kvbudget::score::{Queries, Scored};
use kvbudget::{
    Budget, Geometry, LayerId, Plan, Planner, Policy, PolicyConfig, Ragged, Rope, Sequence, Trigger,
};

use crate::attention::{AttentionHook, Span};
use crate::batch::Batch;
use crate::compressing::Compressing;
use crate::sequence::SequenceCache;
use crate::step::rows_of;

/// What all sequences share.
pub(crate) struct Settings {
    pub(crate) geometry: Arc<Geometry>,
    pub(crate) o_proj: Vec<Tensor>,
    pub(crate) policy: Policy<Cpu>,
    pub(crate) budget: Budget,
    pub(crate) cpu: Cpu,
}

/// The caches of a batch of sequences, each on the same budget.
pub struct BudgetCache {
    settings: Settings,
    batch: Batch,
    queries: Queries,
    rope: Option<Arc<Rope>>,
    trigger: Option<Trigger>,
}

impl BudgetCache {
    /// No sequences yet. `o_proj`, `[hidden, Hq·D]` by layer, may be empty if the policy does not ask for it.
    ///
    /// Errors: a policy that cannot be built, or lacks its output projections.
    pub fn new(
        geometry: Geometry,
        o_proj: Vec<Tensor>,
        policy: PolicyConfig,
        budget: Budget,
    ) -> Result<Self> {
        let policy = policy.build::<Cpu>().map_err(Error::wrap)?;
        let needs = policy.needs();
        let layers = geometry.layers().len();
        if o_proj.len() != layers && (needs.o_proj || !o_proj.is_empty()) {
            bail!(
                "policy {:?} on {layers} layers: expected as many output projections, got {}",
                policy.config().name,
                o_proj.len()
            );
        }
        let geometry = Arc::new(geometry);
        let settings = Settings { geometry, o_proj, policy, budget, cpu: Cpu::new() };
        let (batch, queries) = (Batch::default(), needs.queries);
        Ok(Self { settings, batch, queries, rope: None, trigger: None })
    }

    /// Keeps these queries of sequences that are added later, where the policy alone would keep fewer: for
    /// [`plan`](Self::plan) and [`plans`](Self::plans) with other policies.
    pub fn with_queries(mut self, queries: Queries) -> Self {
        self.queries = self.queries.max(queries);
        self
    }

    /// Gathers the mean and covariance of the queries of sequences that are added later, which `expected-attention` asks for. The model's
    /// RoPE turns queries back, and to where they are expected.
    pub fn with_rope(mut self, rope: Rope) -> Self {
        self.rope = Some(Arc::new(rope));
        self
    }

    /// When [`recompress_if_due`](Self::recompress_if_due) compresses.
    pub fn with_trigger(mut self, trigger: Trigger) -> Self {
        self.trigger = Some(trigger);
        self
    }

    /// Starts an empty sequence; returns its index, which is that of its span.
    pub fn add_sequence(&mut self) -> Result<usize> {
        Ok(self.push_sequence(self.empty_sequence()?))
    }

    /// Adopts a sequence that was filled elsewhere; returns its index.
    pub fn push_sequence(&mut self, sequence: SequenceCache) -> usize {
        self.batch.sequences.push(sequence);
        self.batch.note_peak(0);
        self.batch.sequences.len() - 1
    }

    /// Hands a sequence out; later ones move up by one.
    ///
    /// Errors: no such sequence.
    pub fn remove_sequence(&mut self, index: usize) -> Result<SequenceCache> {
        self.check_index(index)?;
        Ok(self.batch.sequences.remove(index))
    }

    /// The sequences, in the order of their spans.
    pub fn sequences(&self) -> &[SequenceCache] {
        &self.batch.sequences
    }

    /// Puts a sequence in the place of another, which is handed out.
    ///
    /// Errors: no such sequence.
    pub fn switch_sequence(&mut self, index: usize, by: SequenceCache) -> Result<SequenceCache> {
        self.check_index(index)?;
        let switched = std::mem::replace(&mut self.batch.sequences[index], by);
        self.batch.note_peak(0);
        Ok(switched)
    }

    /// An empty sequence of this cache's making, for [`switch_sequence`](Self::switch_sequence).
    pub fn empty_sequence(&self) -> Result<SequenceCache> {
        let sequence = SequenceCache::new(self.settings.geometry.clone(), self.queries)?;
        Ok(match &self.rope {
            Some(rope) => sequence.with_moments(rope.clone()),
            None => sequence,
        })
    }

    /// A sequence, to name its stretches or to roll it back.
    ///
    /// Errors: no such sequence.
    pub fn sequence_mut(&mut self, index: usize) -> Result<&mut SequenceCache> {
        self.check_index(index)?;
        Ok(&mut self.batch.sequences[index])
    }

    /// Whether a sequence holds more than its budget.
    ///
    /// Errors: no such sequence.
    pub fn is_over_budget(&self, sequence: usize) -> Result<bool> {
        self.check_index(sequence)?;
        let Settings { geometry, budget, .. } = &self.settings;
        let sequence = &self.batch.sequences[sequence];
        Ok(sequence.slots() > budget.resolve(geometry, sequence.tokens().into()))
    }

    /// The policy.
    pub fn policy(&self) -> &PolicyConfig {
        self.settings.policy.config()
    }

    /// Whether the policy looks with a probe.
    pub fn wants_probe(&self) -> bool {
        self.settings.policy.needs().probe
    }

    /// Whether the policy asks for what [`with_rope`](Self::with_rope) gathers.
    pub fn wants_rope(&self) -> bool {
        self.settings.policy.needs().expected_queries
    }

    /// The spans of a forward pass in which sequence `i` gets `tokens[i]` new tokens.
    pub fn spans(&self, tokens: &[u32]) -> Vec<Span> {
        let positions = self.batch.sequences.iter().map(SequenceCache::tokens);
        positions.zip(tokens).map(|(position, &tokens)| Span { position, tokens }).collect()
    }

    /// The most bytes that the caches have reserved at once, copies made while compacting included. Tensors that
    /// the engine passes in are the engine's.
    pub fn peak_bytes(&self) -> u64 {
        self.batch.peak
    }

    /// Makes room for so many more tokens of a sequence, so that appending them moves nothing.
    pub fn reserve(&mut self, sequence: usize, tokens: u32) -> Result<()> {
        self.check_index(sequence)?;
        let layers = 0..self.settings.geometry.layers().len();
        layers.into_iter().try_for_each(|layer| self.batch.reserve(sequence, layer, tokens))
    }

    /// Compresses every sequence to the budget: after its prompt, or whenever the engine likes. One plan for each;
    /// that of an empty sequence keeps nothing.
    pub fn compress(&mut self) -> Result<Vec<Plan>> {
        (0..self.batch.sequences.len()).map(|i| self.compress_sequence(i)).collect()
    }

    /// Compresses one sequence to the budget.
    pub fn compress_sequence(&mut self, sequence: usize) -> Result<Plan> {
        let plan = self.plan(sequence, &self.settings.policy, self.settings.budget)?;
        for (layer, kept) in plan.layers.iter().enumerate() {
            let replaced =
                self.batch.sequences[sequence].evict(layer, kept).map_err(Error::wrap)?;
            self.batch.note_peak(replaced);
        }
        self.batch.sequences[sequence].compressed();
        Ok(plan)
    }

    /// Compresses the sequences whose trigger is due; returns their indices and plans. Call it between steps.
    pub fn recompress_if_due(&mut self) -> Result<Vec<(usize, Plan)>> {
        let Some(trigger) = self.trigger else {
            return Ok(Vec::new());
        };
        let due: Vec<usize> = (0..self.batch.sequences.len())
            .filter(|&i| {
                let sequence = &self.batch.sequences[i];
                trigger.due(sequence.tokens_since_compression(), sequence.slots())
            })
            .collect();
        due.into_iter().map(|i| Ok((i, self.compress_sequence(i)?))).collect()
    }

    /// A hook for the forward pass that ends a prompt: each layer is compressed as soon as it has attended.
    pub fn compressing(&mut self) -> Compressing<'_> {
        Compressing::new(&self.settings, &mut self.batch, false)
    }

    /// A hook for the forward pass of a probe, over a block that has been read through the cache itself: each layer is scored by the
    /// probe's queries and compressed, and the probe's own rows are gone.
    pub fn probing(&mut self) -> Compressing<'_> {
        Compressing::new(&self.settings, &mut self.batch, true)
    }

    /// What a policy would keep of a sequence; nothing changes.
    pub fn plan(&self, sequence: usize, policy: &Policy<Cpu>, budget: Budget) -> Result<Plan> {
        let push = |planners: &mut [Planner<'_, Cpu>], _, view: &HostLayer<'_>| {
            planners.iter_mut().try_for_each(|planner| planner.push(&[*view]).map(drop))
        };
        Ok(self.planned(sequence, policy, &[budget], push)?.remove(0))
    }

    /// The same for many budgets, from one scoring: the policy's, or `scores` from elsewhere, `[H, T]` of each layer
    /// ([`reconstruct`](crate::reconstruct::reconstruct)).
    ///
    /// Errors: those of [`plan`](Self::plan), scores of another shape, a policy in reference mode.
    pub fn plans(
        &self,
        sequence: usize,
        policy: &Policy<Cpu>,
        budgets: &[Budget],
        scores: Option<&[Ragged<f32>]>,
    ) -> Result<Vec<Plan>> {
        let layers = self.settings.geometry.layers().len();
        if let Some(scores) = scores
            && scores.len() != layers
        {
            bail!("expected scores of {layers} layers, got {}", scores.len());
        }
        let push = |planners: &mut [Planner<'_, Cpu>], layer: usize, view: &HostLayer<'_>| {
            let scored: Scored<_> = match scores {
                Some(scores) => scores[layer].clone().into(),
                None => policy.score(&self.settings.cpu, LayerId(layer as u32), &[*view])?,
            };
            planners
                .iter_mut()
                .try_for_each(|planner| planner.push_scored(&[*view], scored.clone()).map(drop))
        };
        self.planned(sequence, policy, budgets, push)
    }

    /// Planners of a sequence, one per budget, that are shown layer after layer.
    fn planned(
        &self,
        sequence: usize,
        policy: &Policy<Cpu>,
        budgets: &[Budget],
        push: impl Fn(&mut [Planner<'_, Cpu>], usize, &HostLayer<'_>) -> kvbudget::Result<()>,
    ) -> Result<Vec<Plan>> {
        self.check_index(sequence)?;
        let Settings { cpu, geometry, o_proj, .. } = &self.settings;
        let sequence = &self.batch.sequences[sequence];
        let held = sequence.held();
        let tokens = sequence.tokens();
        let spans = sequence.spans().until(tokens);
        let described = Sequence { tokens, held: held.as_deref(), spans: Some(&spans) };
        let planner = |&budget| Planner::new(cpu, policy, geometry, budget, &[described]);
        let planners = budgets.iter().map(planner).collect::<kvbudget::Result<Vec<_>>>();
        let mut planners = planners.map_err(Error::wrap)?;
        for layer in 0..geometry.layers().len() {
            sequence
                .with_view(layer, o_proj.get(layer), |view| push(&mut planners, layer, view))?;
        }
        let plans = planners.into_iter().map(Planner::finish).collect::<kvbudget::Result<Vec<_>>>();
        Ok(plans.map_err(Error::wrap)?.concat())
    }

    fn check_index(&self, sequence: usize) -> Result<()> {
        match sequence < self.batch.sequences.len() {
            true => Ok(()),
            false => bail!("there is no sequence {sequence} among {}", self.batch.sequences.len()),
        }
    }
}

impl AttentionHook for BudgetCache {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let step = self.batch.step(&self.settings.geometry, layer, [q, k, v], spans)?;
        // Room first: what can fail fails before anything is written.
        for (sequence, span) in spans.iter().enumerate() {
            self.batch.reserve(sequence, layer, span.tokens)?;
        }
        let active = || rows_of(spans).enumerate().filter(|(_, rows)| !rows.is_empty());
        let loan = step.lend()?;
        for (sequence, rows) in active() {
            self.batch.sequences[sequence].remember(layer, &step.queries(&rows)?)?;
            self.batch.append(sequence, layer, &loan, &rows)?;
        }
        let views =
            active().map(|(sequence, rows)| self.batch.attend_view(sequence, layer, &loan, &rows));
        step.attend(&self.settings.cpu, &views.collect::<Result<Vec<_>>>()?)
    }
}
