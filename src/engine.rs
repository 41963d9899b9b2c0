//! The contract with engines: what an engine tells the manager of a sequence's cache, in which order, and what it is told back.
//!
//! One event carries all tensors: [`layer_done`](CacheManager::layer_done) lends a [`LayerView`], and [`needs`](CacheManager::needs)
//! says what it must hold. So a new method is a new part of the view, not a new event.
//!
//! ```text
//! spans, begin_block(n)                the block's n tokens run through the model and are appended to every layer
//!     layer_done(l, view) -> [Keep]    for every layer in order; with a probe in needs, while the probe runs
//! end_block() -> Plan                  the cache holds what the plan says
//! append(n), roll_back(to)             a question, an answer; and their end
//! switch(books) -> books               another cache takes the place of this one
//! ```
//!
//! A probe is a run of tokens over the cache, block included, at the positions that follow. Its queries are lent
//! ([`LayerView::with_probe`]), its keys and values never: they are rolled back before the layer is lent. Without a probe
//! layers may be lent while the block itself runs.
//!
//! Positions are logical and go on counting; no manager renumbers them. Moving bytes (eviction, copies to the host and back) is
//! the engine's, and so are clusters, prompts and schedules. Which method asks for what: `docs/engines.md`.

use crate::backend::Backend;
use crate::error::Result;
use crate::ids::{LayerId, Position};
use crate::plan::Plan;
use crate::ragged::Ragged;
use crate::score::Needs;
use crate::spans::Spans;
use crate::view::LayerView;

/// What the heads of a layer keep: everything else may be overwritten now.
#[derive(Debug, Clone, PartialEq)]
pub struct Keep {
    /// The layer; not always the one just lent, where layers contest a budget.
    pub layer: LayerId,
    /// Kept positions of each head, ascending.
    pub positions: Ragged<Position>,
}

/// What a sequence's cache holds, in positions: all that a manager knows of it between events.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Books {
    /// Tokens seen: the position of the next one.
    pub tokens: u32,
    /// Positions held, `[layer][head]`, ascending; none while every head holds all.
    pub held: Option<Vec<Vec<Vec<Position>>>>,
    /// What stretches are; they may name tokens that are still to come.
    pub spans: Spans,
}

/// Manages the cache of one sequence.
///
/// Methods fail for events out of order, and with the errors of scoring. After an error in the middle of a block the sequence
/// is to be dropped: its layers have seen different numbers of tokens.
pub trait CacheManager<B: Backend> {
    /// What views must carry.
    fn needs(&self) -> Needs;

    /// What stretches of the sequence are, those named before included.
    fn spans(&mut self, spans: Spans) -> Result<()>;

    /// A block of `tokens` new tokens goes into the cache; none if they were [appended](Self::append) before. Whether anything has
    /// to be evicted: if not, no probe need be run and no layer be lent.
    ///
    /// Errors: a block that has not ended.
    fn begin_block(&mut self, tokens: u32) -> Result<bool>;

    /// A layer holds the block and is lent. Says what stays of the layers that this settles; the others stay as they are.
    ///
    /// Errors: another layer than the next, a view that lacks what the method needs or holds other positions.
    fn layer_done(
        &mut self,
        layer: LayerId,
        view: &LayerView<'_, B::Storage<'_>>,
    ) -> Result<Vec<Keep>>;

    /// Every layer has been lent. What the cache holds now, within the budget.
    ///
    /// Errors: layers that are missing.
    fn end_block(&mut self) -> Result<Plan>;

    /// So many tokens went into the cache and stay until something else is said.
    fn append(&mut self, tokens: u32) -> Result<()>;

    /// The sequence is back at `tokens` tokens: slots of later positions are gone.
    ///
    /// Errors: more tokens than were seen, or fewer than when something was evicted last.
    fn roll_back(&mut self, tokens: u32) -> Result<()>;

    /// Another cache of the same geometry takes the place of this one, whose books are handed back.
    ///
    /// Errors: books of other layers or heads.
    fn switch(&mut self, books: Books) -> Result<Books>;
}
