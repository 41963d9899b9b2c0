//! Parameters of the backend operations: plain data, no device and no paper.
//!
//! A *segment* is one KV head of one layer of one sequence. Operations over several layer views number
//! their segments view after view, head after head.

use std::ops::Range;

use crate::ragged::Ragged;

/// How several values become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Reduce {
    /// Arithmetic mean.
    Mean,
    /// Largest.
    Max,
}

/// What a pooling window computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Pooling {
    /// Mean with zero padding and a divisor that is always the kernel size, as `avg_pool1d` has it.
    Avg,
    /// Maximum; windows shrink at the edges.
    Max,
}

/// Attention of the last queries, or of a probe's, reduced to one score per slot.
///
/// `P[hq, w, t] = softmax_t(q[hq, w] · k[t] / √D)` over all slots visible to the query (causal by
/// position, window slots included in the denominator), then reduced over `w` and over the group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowAttention {
    /// Query rows used: the last ones of the observation, all of them for sequences (or probes) no longer than that.
    pub window: u32,
    /// Reduction over the query rows, first.
    pub over_window: Reduce,
    /// Reduction over the query heads that share a KV head, second.
    pub over_group: Reduce,
    /// Average-pool every row over the scored slots with this odd kernel, then scale the row back to the mass
    /// it had there (DefensiveKV, lines 5 and 6 of its code).
    pub row_pool: Option<u32>,
    /// Also score the slots inside the window. Otherwise they get 0, and pooling sees only the past.
    pub score_window: bool,
    /// Slots less than this many positions before a query get nothing from it, though they are in its denominator.
    /// Not together with `row_pool`.
    pub gap: u32,
    /// Look with the views' probe queries: they stand behind the last token, so that each sees all slots, and all are scored.
    /// A lent log-sum-exp is not theirs. Not together with `gap`: they have no distance to a slot.
    pub probe: bool,
}

impl WindowAttention {
    /// One reduction over window and group, for the slots before the window. Nothing is pooled, no slot is too near.
    pub const fn plain(window: u32, reduce: Reduce) -> Self {
        Self {
            window,
            over_window: reduce,
            over_group: reduce,
            row_pool: None,
            score_window: false,
            gap: 0,
            probe: false,
        }
    }
}

/// How far each slot's value reaches along what the last queries read.
///
/// `score[t] = Σ_g Σ_w A[hq, w, t] · (v[t] · y[hq, w])` with `y[hq, w] = Σ_{t in anchor} A[hq, w, t] · v[t]` for the query
/// heads hq of the group, and `A` the softmax rows of [`WindowAttention`] over all slots, zero at those that a query does not
/// see. Negative where a value points away from what is read. Finite or NaN: what is not finite makes, as sums and
/// products do, all scores of its head NaN, but a value outside the anchor only its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Projection<'a> {
    /// Query rows used: the last ones of the observation, all of them for sequences no longer than that.
    pub window: u32,
    /// Each row's weights are its maxima over this odd number of neighbouring slots, also those that the query does not see;
    /// windows shrink at the ends of the head.
    pub row_pool: Option<u32>,
    /// Divide each `y` by its length; a `y` of zeros stays.
    pub normalise: bool,
    /// Slots of each segment that are read.
    pub anchor: &'a [Range<u32>],
}

/// How much attention the last queries pay to each slot, and how much that changes from one to the next.
///
/// Of the softmax rows `P` of [`WindowAttention`], which run over all slots, at those before the window:
/// `score[t] = mean_g (mean_w P + gamma · var_w P)`; 0 inside the window. `var` is the sample variance (divisor `W - 1`), 0 of a single
/// query. And their sums over a segment: `Σ -P ln P`, its terms 0 where `P` is, and `Σ_g Σ_t var_w P`. NaN of a row is in all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpread {
    /// Query rows used: the last ones of the observation, all of them for sequences no longer than that.
    pub window: u32,
    /// What a variance counts for beside a mean; finite.
    pub gamma: f32,
}

/// Attention that queries are expected to pay: normally distributed ones, of the mean `μ` and the covariance `Σ` that a view lends
/// for each query head (`with_expected`).
///
/// `score[t] = mean_g softmax_t(μ·k[t]/√D + k[t]ᵀΣk[t]/(2D))` over the slots that are no sinks; those get 0. A logit that is no finite number,
/// as that of a key with such an element, makes all of its head's scores NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpectedAttention {
    /// Slots of positions below this are sinks.
    pub sinks: u32,
}

/// Smoothing over neighbouring slots.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pool<'a> {
    /// Mean or maximum.
    pub kind: Pooling,
    /// Odd window size, centred.
    pub kernel: u32,
    /// Slots of each segment that take part: the first ones.
    pub lens: &'a [u32],
}

/// LagKV: variation of keys and values within a partition, scaled by the next partition's range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lag {
    /// Slots at the start that are not partitioned.
    pub sinks: u32,
    /// Slots per partition.
    pub lag: u32,
    /// Compare raw scores across partitions instead of ranks inside each.
    pub cross_scoring: bool,
}

/// How tokens of one stretch stand out from each other by the norms of their hidden rows (GUI-KV):
/// `weight · softmax(z / temperature)` over the stretch, with `z = (r - mean r) / (s + 1e-8)` and the sample deviation `s`
/// of the norms `r`, 0 for a single token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saliency<'a> {
    /// What all tokens of a stretch share.
    pub weight: f32,
    /// Positive: the larger, the more alike they share.
    pub temperature: f32,
    /// A stretch of positions for each view; views without, whose ranges are empty, need no norms.
    pub stretches: &'a [Range<u32>],
}

/// What is left of keys outside subspaces: `ρ = ‖k - Σ_i (b_i · k) b_i‖₂` (GUI-KV).
#[derive(Debug, Clone, Copy)]
pub struct Residuals<'a> {
    /// Orthonormal vectors `b_i` of each segment, one after the other: `[rank, D]`, any rank up to `D`.
    pub bases: &'a Ragged<f32>,
    /// Slots of each segment that are measured: disjoint and ascending.
    pub slots: &'a Ragged<Range<u32>>,
}

/// Scores without looking at tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positional {
    /// Strictly increasing in the slot's position, up to `2^31`: later is better. The values themselves mean
    /// nothing.
    Recency,
    /// Uniform in [0, 1), a function of seed, layer, head and position alone.
    Random {
        /// The seed.
        seed: u64,
        /// Layer number of the views (all views of a call belong to the same layer).
        layer: u32,
    },
}

/// How large what a value writes into the layer's output is: the mean over the query heads of its group of a norm of
/// `y = v · W_o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum ValueNorm {
    /// `‖y‖₁` (CriticalKV): a projection's arithmetic.
    #[default]
    L1,
    /// `‖y‖₂`, as `√(vᵀ (W_oᵀ W_o) v)`, for `D/len + D/hidden` of that arithmetic. Orders a head's slots nearly as L1 does.
    ///
    /// Not scaled to L1: the factor, `√(2·hidden/π)` where the channels of `y` are Gaussian, is one for the whole model and
    /// changes no order. Heads that write to few channels have less than that: against others they gain by L2.
    ///
    /// NaN for a value with an element that is not finite, or so large that the square is not (from about 1e19).
    L2,
    /// `‖v‖₂` of the value itself: no projection is needed, one pass over V (ExpectedAttention).
    Plain,
}

impl ValueNorm {
    /// Whether it takes the output projection.
    pub const fn projects(self) -> bool {
        !matches!(self, ValueNorm::Plain)
    }
}

/// What value norms are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum NormScale {
    /// Nothing.
    None,
    /// The sum over all slots of the layer (DefensiveKV, Alg. 2).
    Layer,
    /// The sum over the layer's heads at the same position (DefensiveKV's code).
    Heads,
}

/// Segments that compete for one budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contest {
    /// The segments, consecutive.
    pub segments: Range<usize>,
    /// Slots to select, at most the sum of the segments' lengths.
    pub budget: u64,
    /// Slots that each segment gets before the rest is contested: one per segment, at most its length.
    pub floors: Vec<u64>,
}

/// Exact selection of the best slots. Order: protected first, whatever their scores; then score descending
/// (`-0 = +0`, NaN lowest); then segment ascending, then slot ascending.
///
/// In each contest, every segment keeps its `floor` best; the rest of the budget goes to the best of
/// what is left of all. Output slots ascend within each segment.
#[derive(Debug, Clone, Copy)]
pub struct TopK<'a> {
    /// Contests over disjoint, ascending segment ranges that cover all segments.
    pub contests: &'a [Contest],
    /// Slot ranges of each segment that come first, disjoint and ascending.
    pub protected: &'a Ragged<Range<u32>>,
}

/// Attention of the newest tokens over what their heads still hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attend {
    /// Factor on `q · k`, usually `1 / √D`.
    pub scale: f32,
}
