//! The full cache of a context, and the compressed copies that variants get of it.

use std::time::Instant;

use anyhow::{Context, Result};
use kvbudget::score::Queries;
use kvbudget::{Budget, Plan, Ragged};
use kvbudget_candle::reconstruct::reconstruct;
use kvbudget_candle::{BudgetCache, SequenceCache};

use super::{Bench, CHUNK};
use crate::record::Seconds;
use crate::variant::Variant;

/// A context as the model has read it.
pub struct Dense<'b> {
    bench: &'b Bench,
    cache: BudgetCache,
    /// What it has read.
    ids: Vec<u32>,
    /// Whether any variant wants the scores of a second pass.
    second_pass: bool,
    scores: Vec<Ragged<f32>>,
}

/// A variant and its compressed copy.
pub struct Compressed {
    pub variant: Variant,
    pub slots: u64,
    pub sequence: SequenceCache,
}

impl<'b> Dense<'b> {
    /// Keeps the queries, and gathers of them, what any of the variants asks for.
    pub fn new(bench: &'b Bench, variants: impl Iterator<Item = &'b Variant>) -> Result<Self> {
        let (mut queries, mut second_pass, mut expected) = (Queries::None, false, false);
        for variant in variants {
            let needs = variant.build()?.0.needs();
            queries = queries.max(needs.queries);
            second_pass |= needs.second_pass;
            expected |= needs.expected_queries;
        }
        let mut cache = bench.cache()?.with_queries(queries);
        if expected {
            cache = cache.with_rope(bench.model.rope()?);
        }
        cache.add_sequence()?;
        Ok(Self { bench, cache, ids: Vec::new(), second_pass, scores: Vec::new() })
    }

    pub fn tokens(&self) -> u32 {
        self.cache.sequences()[0].tokens()
    }

    /// Goes on reading, and repeats all of it but the template's start if a variant wants that.
    pub fn read(&mut self, ids: &[u32], seconds: &mut Seconds) -> Result<()> {
        let start = Instant::now();
        for chunk in ids.chunks(CHUNK) {
            let spans = self.cache.spans(&[chunk.len() as u32]);
            self.bench.model.forward(chunk, &spans, &mut self.cache)?;
        }
        self.ids.extend(ids);
        if self.second_pass {
            let prefix = self.bench.template.len();
            let from = if self.ids.starts_with(&self.bench.template) { prefix } else { 0 };
            let model = &self.bench.model;
            self.scores = reconstruct(
                &self.cache.sequences()[0],
                &self.bench.instruction,
                &self.ids[from..],
                &mut |ids, spans, hook| model.forward(ids, spans, hook).map(drop),
            )?;
        }
        seconds.prefill += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Plans of the variants. The budgets of a policy that follow each other are planned from one scoring.
    pub fn plans(&self, variants: &[Variant], seconds: &mut Seconds) -> Result<Vec<Plan>> {
        let start = Instant::now();
        let mut plans = Vec::with_capacity(variants.len());
        for same in variants.chunk_by(|a, b| a.policy == b.policy) {
            let built = same.iter().map(Variant::build).collect::<Result<Vec<_>>>()?;
            let budgets: Vec<Budget> = built.iter().map(|(_, budget)| *budget).collect();
            let policy = &built[0].0;
            let scores = policy.needs().second_pass.then_some(self.scores.as_slice());
            let of_policy = self.cache.plans(0, policy, &budgets, scores);
            plans.extend(of_policy.with_context(|| same[0].policy.clone())?);
        }
        seconds.plan += start.elapsed().as_secs_f64();
        Ok(plans)
    }

    /// What the plan keeps, with room for `slack` more tokens.
    pub fn gather(
        &self,
        variant: &Variant,
        plan: &Plan,
        slack: usize,
        seconds: &mut Seconds,
    ) -> Result<Compressed> {
        let start = Instant::now();
        let sequence = self.cache.sequences()[0].gather(plan, slack as u32)?;
        seconds.gather += start.elapsed().as_secs_f64();
        Ok(Compressed { variant: variant.clone(), slots: plan.slots, sequence })
    }
}

impl Bench {
    /// A cache that is never compressed by itself: variants bring their own plans.
    pub(crate) fn cache(&self) -> Result<BudgetCache> {
        let (policy, budget) = Variant::full().build()?;
        let config = policy.config().clone();
        Ok(BudgetCache::new(self.geometry.clone(), self.o_proj.clone(), config, budget)?)
    }
}
