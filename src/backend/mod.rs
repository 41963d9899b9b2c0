//! What a device must do, and the devices that do it.
//!
//! One method per operation; each has the same stem in `backend/cpu/`, in the naive f64 twin of the test
//! kit and, with CUDA, in `kernels/`. No method knows a paper, no policy knows a device: they meet in the
//! parameter structs of [`ops`]. Every operation takes many sequences at once: a slice of layer views,
//! whose heads are the *segments*, view after view.
//!
//! All reductions have a fixed order: the same input gives the same bits whatever the number of threads.

mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
#[allow(clippy::type_complexity, reason = "a kernel's signature is the type of its launches")]
pub mod cuda;
pub mod ops;

use std::ops::Range;

use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::{LayerView, Rows, Storage};
use ops::{
    Attend, AttentionSpread, ExpectedAttention, Lag, NormScale, Pool, Positional, Projection,
    Residuals, Saliency, TopK, ValueNorm, WindowAttention,
};

/// The query rows, keys and values of one [`Backend::attend`] call for one sequence.
#[derive(Debug, Clone, Copy)]
pub struct AttendView<'a, S> {
    /// Queries `[Hq, M, D]` of the newest `M` tokens.
    pub q: Rows<'a, S>,
    /// Keys `[H, len, D]`; the last `M` rows of each head belong to those tokens.
    pub k: Rows<'a, S>,
    /// Values `[H, len, D]`.
    pub v: Rows<'a, S>,
}

/// A device. See the module documentation for the contract that all methods share.
pub trait Backend: Send + Sync {
    /// Borrowed tensor memory.
    type Storage<'a>: Storage;
    /// Owned f32 rows of different lengths: scores, norms, outputs.
    type Floats: Send + Sync;
    /// Selected slots of every segment, ascending.
    type Selection: Send + Sync;
    /// A number per row.
    type Counts: Send + Sync;

    /// Zeroed rows.
    fn zeros(&self, lens: &[u32]) -> Result<Self::Floats>;
    /// Reads rows back.
    fn to_host(&self, rows: &Self::Floats) -> Result<Ragged<f32>>;
    /// Writes rows.
    fn upload(&self, rows: Ragged<f32>) -> Result<Self::Floats>;
    /// A copy of some of the rows.
    fn slice(&self, rows: &Self::Floats, range: Range<usize>) -> Result<Self::Floats>;
    /// Length of each row.
    fn lens(&self, rows: &Self::Floats) -> Vec<u32>;
    /// NaN in each row.
    fn count_nan(&self, rows: &Self::Floats) -> Result<Self::Counts>;
    /// Reads numbers back.
    fn counts_to_host(&self, counts: &Self::Counts) -> Result<Vec<u64>>;

    /// Attention of the last queries, or a probe's, into `out`, `[H, len]` per view. With `mean`, also the mean over window
    /// and group of the unpooled rows (zero inside the window), from the same pass.
    fn window_attention(
        &self,
        op: &WindowAttention,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
        mean: Option<&mut Self::Floats>,
    ) -> Result<()>;
    /// How far each slot's value reaches along what the last queries read, into `out`, `[H, len]` per view.
    fn projection(
        &self,
        op: &Projection<'_>,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Mean and variance of the last queries' attention into `out`, `[H, len]` per view; entropy and variance of each segment into
    /// `sums`, `[H, 2]` per view.
    fn attention_spread(
        &self,
        op: AttentionSpread,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
        sums: &mut Self::Floats,
    ) -> Result<()>;
    /// Attention that the views' expected queries pay, into `out`, `[H, len]` per view.
    fn expected_attention(
        &self,
        op: ExpectedAttention,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Smooths rows over neighbouring slots, in place.
    fn pool(&self, op: &Pool<'_>, rows: &mut Self::Floats) -> Result<()>;
    /// `mean_g ‖v · W_o[h·G + g]‖` per slot: with L1, an upper bound on what a value can move in the layer's output
    /// (CriticalKV). Or, without the projection, `‖v‖`: see [`ValueNorm`].
    fn value_norm(
        &self,
        op: ValueNorm,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Divides norms in place; a zero divisor leaves zeros.
    fn scale_norms(
        &self,
        op: NormScale,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        norms: &mut Self::Floats,
    ) -> Result<()>;
    /// `-‖k‖₂` per slot (KNorm).
    fn key_norm(
        &self,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// `-cos(k, mean of the head's unit keys)` per slot (KeyDiff).
    fn key_diff(
        &self,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Reads back the keys of a range of slots of each segment, as f32: a row holds `[slots, D]`. Waits for the device.
    fn keys(
        &self,
        slots: &[Range<u32>],
        layers: &[LayerView<'_, Self::Storage<'_>>],
    ) -> Result<Ragged<f32>>;
    /// `-ρ` of the slots of [`Residuals`], `-∞` of all others.
    fn residual_norms(
        &self,
        op: &Residuals<'_>,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Adds what [`Saliency`] says to the scores of the slots that hold the stretch's tokens.
    fn saliency(
        &self,
        op: &Saliency<'_>,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        rows: &mut Self::Floats,
    ) -> Result<()>;
    /// LagKV scores. Sinks, the last full partition and what follows it get 1; a head shorter than the sinks and
    /// two partitions gets 1 for its sinks and a ramp from 0 towards 1 after them.
    fn lag(
        &self,
        op: &Lag,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;
    /// Scores that need positions only.
    fn positional(
        &self,
        op: Positional,
        layers: &[LayerView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
    ) -> Result<()>;

    /// Raises the first `lens[s]` entries of each row to at least their mean (DefensiveKV's prior).
    fn floor_at_mean(&self, lens: &[u32], rows: &mut Self::Floats) -> Result<()>;
    /// `norms = (rows + epsilon) · norms`, elementwise.
    fn weigh(&self, epsilon: f32, rows: &Self::Floats, norms: &mut Self::Floats) -> Result<()>;
    /// `rows = max(rows, by)` over what `rows` has; rows of `by` may be longer. NaN of either side stays.
    fn raise(&self, by: &Self::Floats, rows: &mut Self::Floats) -> Result<()>;
    /// For each row, the smallest number of its largest entries that sums to `thresholds[s] - (1 - sum)`:
    /// entries are attention mass, what they lack to 1 is mass already safe. At most `caps[s]`.
    fn mass_count(&self, thresholds: &[f32], caps: &[u32], mass: &Self::Floats)
    -> Result<Vec<u32>>;
    /// Sum of each row's entries outside the given ranges, in units of `2^-40`: each is rounded half up, so that sums have no
    /// order. What is below zero counts for nothing, nor does NaN; sums stop at the largest number.
    fn free_mass(&self, protected: &Ragged<Range<u32>>, rows: &Self::Floats) -> Result<Vec<u64>>;
    /// Sets `rows` to +∞ where `by` has its `counts[s]` best entries (order of [`TopK`]).
    fn pin_top(&self, counts: &[u32], by: &Self::Floats, rows: &mut Self::Floats) -> Result<()>;
    /// Lowers `rows` to at most 0 where `by` has its `counts[s]` best entries (order of [`TopK`]), but for those that are
    /// `-∞` or NaN: these stand for slots that are not to be dropped. NaN stays.
    fn drop_top(&self, counts: &[u32], by: &Self::Floats, rows: &mut Self::Floats) -> Result<()>;
    /// Replaces scores by places: the `n`-th slot of a row in the order of [`TopK`], protected ones first, gets
    /// `weights[s] / n`. A contest of such rows shares out in proportion to the weights (the method of highest
    /// averages). +∞ and NaN stay what they are.
    fn rank(
        &self,
        protected: &Ragged<Range<u32>>,
        weights: &[f32],
        rows: &mut Self::Floats,
    ) -> Result<()>;
    /// Replaces the rows of each view by their sum over its heads, which must have equal lengths.
    fn share_heads(&self, heads: &[usize], rows: &mut Self::Floats) -> Result<()>;
    /// Mean over each unit of consecutive slots.
    fn coarsen(&self, units: &Ragged<Range<u32>>, rows: &Self::Floats) -> Result<Self::Floats>;

    /// Exact selection over the given rows of all `parts`: segments are numbered part after part.
    fn top_k(
        &self,
        op: &TopK<'_>,
        parts: &[(&Self::Floats, Range<usize>)],
    ) -> Result<Self::Selection>;
    /// Slots selected in each segment.
    fn selected(&self, selection: &Self::Selection) -> Result<Vec<u32>>;
    /// Reads a selection back.
    fn selection_to_host(&self, selection: &Self::Selection) -> Result<Ragged<u32>>;
    /// The entries of `rows` at the given slots.
    fn pick(&self, slots: &Ragged<u32>, rows: &Self::Floats) -> Result<Self::Floats>;

    /// Softmax attention of the newest `M` tokens, causal among themselves: query `i` of a head sees all
    /// but the last `M - 1 - i` slots. `out` has `Hq` rows of `M·D` per sequence; `lse`, if given, `Hq`
    /// rows of `M`. Allocates nothing.
    fn attend(
        &self,
        op: &Attend,
        sequences: &[AttendView<'_, Self::Storage<'_>>],
        out: &mut Self::Floats,
        lse: Option<&mut Self::Floats>,
    ) -> Result<()>;
}
