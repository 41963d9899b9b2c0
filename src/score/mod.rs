//! Scorers: which slots matter. One file per method, each written once for all devices out of backend
//! operations; a larger score is kept longer, NaN ranks lowest.

mod andpro;
mod cake;
mod defensive;
mod expected;
mod guikv;
mod h2o;
mod keys;
mod lagkv;
mod probe;
mod reach;
mod reconstruct;
mod snapkv;
mod streaming;
mod subspace;

pub use andpro::{AnDPro, Anchor};
pub use cake::Cake;
pub use defensive::Defensive;
pub use expected::Expected;
pub use guikv::GuiKv;
pub use h2o::H2o;
pub use keys::{KNorm, KeyDiff};
pub use lagkv::LagKv;
pub use probe::Probe;
pub use reach::Reach;
pub use reconstruct::{Reconstruct, Reconstruction};
pub use snapkv::{SnapKv, Tova};
pub use streaming::{Random, Streaming};
pub use subspace::Subspace;

use crate::backend::Backend;
use crate::backend::ops::{NormScale, Pooling, Reduce, ValueNorm};
use crate::error::{Error, Result};
use crate::ids::LayerId;
use crate::parameters::{Parameters, named};
use crate::view::LayerView;

named!(Pooling { Avg => "avg", Max => "max" });
named!(Reduce { Mean => "mean", Max => "max" });
named!(ValueNorm { L1 => "l1", L2 => "l2", Plain => "plain" });
named!(NormScale { None => "none", Layer => "layer", Heads => "heads" });

/// What a scorer found for one layer: the same at every budget.
#[derive(Debug, Clone)]
pub struct Scored<F> {
    /// Scores `[H, len]` of each view.
    pub scores: F,
    /// Attention mass `[H, len]` by which some slots come before all others but protected ones, whatever their
    /// scores: as many as [`Scorer::first_set`] says.
    pub first: Option<F>,
    /// The scores times the value norms, by which a two-stage policy selects in its second stage.
    pub weighted: Option<F>,
    /// Slots that others make redundant: as many as [`Scorer::dropped`] says lose their scores.
    pub redundant: Option<Redundant<F>>,
    /// Entropy and variance of attention, `[H, 2]` of each view, by which layers share out the budget if the policy says so
    /// ([`Preference`](crate::allocate::Preference)).
    pub spread: Option<F>,
}

/// Slots that may lose their scores.
#[derive(Debug, Clone)]
pub struct Redundant<F> {
    /// `[H, len]` of each view: the larger, the sooner a slot is dropped; `-∞` where it never is.
    pub by: F,
    /// Slots of each segment that may be dropped.
    pub slots: Vec<u32>,
}

impl<F> From<F> for Scored<F> {
    /// Scores alone.
    fn from(scores: F) -> Self {
        Self { scores, first: None, weighted: None, redundant: None, spread: None }
    }
}

/// What a first set or a drop is measured against: one sequence and its budget.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Tokens seen.
    pub tokens: u32,
    /// Mean budget per head, in slots.
    pub slots_per_head: u64,
    /// Recent tokens protected.
    pub recent: u32,
}

/// The size of a first set, by head: the fewest slots that hold so much mass, but no more than so many. With units
/// larger than a slot, as many whole units as they fill.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FirstSet {
    /// Attention mass; what a row lacks to 1 is held already.
    pub mass: f32,
    /// Slots at most.
    pub slots: u64,
}

/// Queries that a method looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Queries {
    /// None.
    #[default]
    None,
    /// Those of the last so many tokens.
    Last(u32),
    /// Those of all tokens.
    All,
}

/// What a method looks at beside keys, values and positions: what an engine must keep for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Queries, after RoPE.
    pub queries: Queries,
    /// Queries of a probe: tokens run over the cache and rolled back, or masks.
    pub probe: bool,
    /// The output projection.
    pub o_proj: bool,
    /// Norms of hidden rows.
    pub hidden_norms: bool,
    /// Mean and covariance of the queries to come.
    pub expected_queries: bool,
    /// What stretches of the sequence are.
    pub spans: bool,
    /// Scores of a second pass: see [`Reconstruction`].
    pub second_pass: bool,
}

/// One method: scores `[H, len]` for each view of one layer.
pub trait Scorer<B: Backend>: Send + Sync {
    /// What views must carry.
    fn needs(&self) -> Needs;
    /// Scores one layer of many sequences.
    fn score(
        &self,
        backend: &B,
        layer: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>>;
    /// How many slots come first by [`Scored::first`].
    fn first_set(&self, _: &Room) -> FirstSet {
        FirstSet::default()
    }
    /// How many slots of a head that holds `len` are dropped, of the `redundant` ones: see [`Scored::redundant`].
    fn dropped(&self, _: &Room, _len: u32, _redundant: u32) -> u32 {
        0
    }
}

/// A parameter that is a part of something.
fn check_part(name: &'static str, part: f32) -> Result<()> {
    if (0.0..=1.0).contains(&part) {
        return Ok(());
    }
    Err(Error::Parameter { name, expected: "a number from 0 to 1", got: part.to_string() })
}

/// Lengths of all segments of the views.
pub(crate) fn segment_lens<S: crate::view::Storage>(layers: &[LayerView<'_, S>]) -> Vec<u32> {
    layers.iter().flat_map(|l| (0..l.shape().kv_heads()).map(|h| l.k().len(h) as u32)).collect()
}

/// Slots of each segment that lie before its sequence's last `window` tokens.
pub(crate) fn past_lens<S: crate::view::Storage>(
    layers: &[LayerView<'_, S>],
    window: u32,
) -> Vec<u32> {
    layers
        .iter()
        .flat_map(|l| {
            let end = l.tokens().saturating_sub(window);
            (0..l.shape().kv_heads()).map(move |h| l.slots_before(h, end) as u32)
        })
        .collect()
}

/// A scorer as plain data: the closed set of methods, each with its parameters.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "method", rename_all = "lowercase")
)]
pub enum ScorerConfig {
    /// Window attention.
    SnapKv(SnapKv),
    /// Last token's attention.
    Tova(Tova),
    /// Worst-case window attention.
    Defensive(Defensive),
    /// Projection of values on the window's outputs.
    AnDPro(AnDPro),
    /// Mean and variance of window attention.
    Cake(Cake),
    /// Attention of all queries.
    H2o(H2o),
    /// Position only.
    Streaming(Streaming),
    /// Seeded noise.
    Random(Random),
    /// Small keys.
    KNorm(KNorm),
    /// Unusual keys.
    KeyDiff(KeyDiff),
    /// Variation against the next partition.
    LagKv(LagKv),
    /// Window attention over frames, less what later frames repeat.
    GuiKv(GuiKv),
    /// Long-range attention of all queries.
    Reach(Reach),
    /// Attention of a second pass that repeats the context.
    Reconstruct(Reconstruct),
    /// Attention of a probe.
    Probe(Probe),
    /// Attention of the queries to come.
    Expected(Expected),
}

/// The same match for every use of the closed set.
macro_rules! each {
    ($config:expr, $scorer:ident => $use:expr) => {
        match $config {
            ScorerConfig::SnapKv($scorer) => $use,
            ScorerConfig::Tova($scorer) => $use,
            ScorerConfig::Defensive($scorer) => $use,
            ScorerConfig::AnDPro($scorer) => $use,
            ScorerConfig::Cake($scorer) => $use,
            ScorerConfig::H2o($scorer) => $use,
            ScorerConfig::Streaming($scorer) => $use,
            ScorerConfig::Random($scorer) => $use,
            ScorerConfig::KNorm($scorer) => $use,
            ScorerConfig::KeyDiff($scorer) => $use,
            ScorerConfig::LagKv($scorer) => $use,
            ScorerConfig::GuiKv($scorer) => $use,
            ScorerConfig::Reach($scorer) => $use,
            ScorerConfig::Reconstruct($scorer) => $use,
            ScorerConfig::Probe($scorer) => $use,
            ScorerConfig::Expected($scorer) => $use,
        }
    };
}

impl ScorerConfig {
    /// The scorer on a backend.
    pub fn build<B: Backend>(&self) -> Box<dyn Scorer<B>> {
        each!(self, scorer => Box::new(scorer.clone()))
    }
}

impl Parameters for ScorerConfig {
    fn list(&self) -> Vec<(&'static str, String)> {
        each!(self, scorer => scorer.list())
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        each!(self, scorer => scorer.set(key, value))
    }
}
