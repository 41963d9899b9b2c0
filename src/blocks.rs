//! Block-wise prefill: a prompt of any length within a budget and one block (EpiCache, arXiv 2509.17396, and any other policy).
//!
//! After every block all layers are planned over what they hold and the block, so no more than the budget is left. Most slots
//! are held just before that: the budget and the block. What an earlier block lost is lost: that is the price.
//!
//! Any policy will do. `snapkv` here is plain block eviction, by the block's last queries; `epicache` looks with a probe.

use crate::backend::Backend;
use crate::budget::Budget;
use crate::engine::{Books, CacheManager, Keep};
use crate::error::{Error, Result};
use crate::geometry::{Geometry, MAX_LEN};
use crate::ids::{LayerId, Position};
use crate::plan::{Plan, Report};
use crate::planner::{Planner, Sequence};
use crate::policy::Policy;
use crate::ragged::Ragged;
use crate::score::Needs;
use crate::spans::Spans;
use crate::view::LayerView;

/// The cache of one sequence that is read block by block.
pub struct BlockPrefill<'a, B: Backend> {
    backend: &'a B,
    policy: &'a Policy<B>,
    geometry: &'a Geometry,
    budget: Budget,
    books: Books,
    /// Tokens seen when something was evicted last.
    evicted_at: u32,
    block: Option<Block<'a, B>>,
    peak: u64,
}

/// A block that has not ended.
struct Block<'a, B: Backend> {
    /// None if everything stays.
    planner: Option<Planner<'a, B>>,
    next: usize,
}

impl<'a, B: Backend> BlockPrefill<'a, B> {
    /// Goes on from `books`: [`Books::default`] for an empty cache. A budget that is a fraction is one of the tokens seen so far,
    /// at each block.
    ///
    /// Errors: books of other layers or heads.
    pub fn new(
        backend: &'a B,
        policy: &'a Policy<B>,
        geometry: &'a Geometry,
        budget: Budget,
        books: Books,
    ) -> Result<Self> {
        check(&books, geometry)?;
        let (evicted_at, block, peak) = (books.tokens, None, books.slots(geometry));
        Ok(Self { backend, policy, geometry, budget, books, evicted_at, block, peak })
    }

    /// What the cache holds.
    pub fn books(&self) -> &Books {
        &self.books
    }

    /// The most slots held at once: never more than the budget, a block, and what was appended after the last block.
    pub fn peak_slots(&self) -> u64 {
        self.peak
    }

    fn between_blocks(&self, what: &'static str) -> Result<()> {
        match self.block {
            None => Ok(()),
            Some(_) => Err(Error::Unsupported { what, why: "a block has begun and not ended" }),
        }
    }
}

impl<B: Backend> CacheManager<B> for BlockPrefill<'_, B> {
    fn needs(&self) -> Needs {
        self.policy.needs()
    }

    fn spans(&mut self, spans: Spans) -> Result<()> {
        self.between_blocks("spans")?;
        self.books.spans = spans;
        Ok(())
    }

    fn begin_block(&mut self, tokens: u32) -> Result<bool> {
        self.append(tokens)?;
        let tokens = self.books.tokens;
        let slots = self.budget.resolve(self.geometry, tokens.into());
        let evicts = slots < self.books.slots(self.geometry);
        let planner = match evicts {
            true => {
                let held: Option<Vec<&[Vec<Position>]>> =
                    self.books.held.as_ref().map(|held| held.iter().map(Vec::as_slice).collect());
                let spans = self.books.spans.until(tokens);
                let sequence = Sequence { tokens, held: held.as_deref(), spans: Some(&spans) };
                let Self { backend, policy, geometry, budget, .. } = *self;
                let planner = Planner::new(backend, policy, geometry, budget, &[sequence])?;
                Some(if policy.cascades() { planner.cascade()? } else { planner })
            }
            false => None,
        };
        self.block = Some(Block { planner, next: 0 });
        Ok(evicts)
    }

    fn layer_done(
        &mut self,
        layer: LayerId,
        view: &LayerView<'_, B::Storage<'_>>,
    ) -> Result<Vec<Keep>> {
        let block = self.block.as_mut().ok_or(NO_BLOCK)?;
        if layer.index() != block.next {
            let (expected, got, layers) = (block.next, layer.index(), self.geometry.layers().len());
            return Err(Error::LayerOrder { expected, got, layers });
        }
        block.next += 1;
        let Some(planner) = &mut block.planner else { return Ok(Vec::new()) };
        let changed = planner.push(std::slice::from_ref(view))?;
        let keep = |layer| Some(Keep { layer, positions: planner.held(0, layer)? });
        Ok(changed.into_iter().filter_map(keep).collect())
    }

    fn end_block(&mut self) -> Result<Plan> {
        let Block { planner, .. } = self.block.take().ok_or(NO_BLOCK)?;
        let Some(planner) = planner else { return Ok(self.whole()) };
        let plan = planner.finish()?.remove(0);
        let rows = |layer: &Ragged<Position>| layer.iter().map(<[_]>::to_vec).collect();
        self.books.held = Some(plan.layers.iter().map(rows).collect());
        self.evicted_at = self.books.tokens;
        Ok(plan)
    }

    fn append(&mut self, tokens: u32) -> Result<()> {
        self.between_blocks("new tokens")?;
        let Books { tokens: seen, held, .. } = &mut self.books;
        let end = u64::from(*seen) + u64::from(tokens);
        if end > MAX_LEN {
            let (what, limit) = ("tokens of a sequence", MAX_LEN);
            return Err(Error::TooLarge { what, got: end, limit });
        }
        let new = *seen..end as u32;
        for head in held.iter_mut().flatten().flatten() {
            head.extend(new.clone().map(Position));
        }
        *seen = end as u32;
        self.peak = self.peak.max(self.books.slots(self.geometry));
        Ok(())
    }

    fn roll_back(&mut self, tokens: u32) -> Result<()> {
        self.between_blocks("a roll-back")?;
        let seen = self.books.tokens;
        if tokens > seen {
            let (what, got, limit) = ("tokens to roll back to", tokens.into(), seen.into());
            return Err(Error::TooLarge { what, got, limit });
        }
        if tokens < self.evicted_at {
            return Err(Error::Unsupported {
                what: "rolling back behind an eviction",
                why: "what was evicted does not come back",
            });
        }
        for head in self.books.held.iter_mut().flatten().flatten() {
            head.truncate(head.partition_point(|p| p.0 < tokens));
        }
        self.books.tokens = tokens;
        Ok(())
    }

    fn switch(&mut self, books: Books) -> Result<Books> {
        self.between_blocks("another cache")?;
        check(&books, self.geometry)?;
        self.evicted_at = books.tokens;
        self.peak = self.peak.max(books.slots(self.geometry));
        Ok(std::mem::replace(&mut self.books, books))
    }
}

const NO_BLOCK: Error =
    Error::Unsupported { what: "a layer or the end of a block", why: "no block has begun" };

impl<B: Backend> BlockPrefill<'_, B> {
    /// The plan that keeps what is held.
    fn whole(&self) -> Plan {
        let Self { policy, geometry, budget, books, .. } = self;
        let layers = match &books.held {
            Some(held) => held.iter().map(|heads| heads.iter().cloned().collect()).collect(),
            None => {
                let all: Vec<Position> = (0..books.tokens).map(Position).collect();
                let heads = |l: &crate::LayerShape| vec![all.clone(); l.kv_heads()];
                geometry.layers().iter().map(|l| heads(l).into_iter().collect()).collect()
            }
        };
        let slots = books.slots(geometry);
        let report = Report {
            budget_slots: budget.resolve(geometry, books.tokens.into()),
            available_slots: slots,
            peak_slots: slots,
            ..Report::default()
        };
        let name = policy.config().name.clone();
        Plan::assemble(name, *budget, books.tokens, geometry, report, layers)
    }
}

impl Books {
    /// Slots of all heads.
    pub fn slots(&self, geometry: &Geometry) -> u64 {
        match &self.held {
            Some(held) => held.iter().flatten().map(|head| head.len() as u64).sum(),
            None => geometry.slots(self.tokens.into()),
        }
    }
}

/// Whether these may be the books of a cache of this geometry. Positions are the planner's to check.
fn check(books: &Books, geometry: &Geometry) -> Result<()> {
    let Some(held) = &books.held else { return Ok(()) };
    let shape = |what, expected: usize, got: usize| match expected == got {
        true => Ok(()),
        false => Err(Error::Shape { what, expected: expected as u64, got: got as u64 }),
    };
    shape("layers of the held positions", geometry.layers().len(), held.len())?;
    let mut layers = geometry.layers().iter().zip(held);
    layers
        .try_for_each(|(l, heads)| shape("heads of the held positions", l.kv_heads(), heads.len()))
}
