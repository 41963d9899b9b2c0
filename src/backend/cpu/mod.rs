//! The CPU backend: rayon over (segment, tile), the pool passed by value, no globals, no environment.
//!
//! It is the fallback everywhere and the reference that kernels are held to. Every reduction has a fixed
//! order, so results do not depend on the number of threads.

mod attend;
mod attention_spread;
mod descent;
mod expected_attention;
mod intrinsics;
mod isa;
mod key_scores;
mod lag;
mod pairs;
mod pool;
mod projection;
mod residual;
mod rows;
mod saliency;
mod tile;
mod top_k;
mod value_gram;
mod value_norm;
mod window_attention;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use super::ops::{
    Attend, AttentionSpread, ExpectedAttention, Lag, NormScale, Pool, Positional, Projection,
    Residuals, Saliency, TopK, ValueNorm, WindowAttention,
};
use super::{AttendView, Backend, check};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::{LayerView, Storage};
use tile::Aligned;

pub(crate) use intrinsics::{LINE, Streamed, prefetch};
pub use isa::Isa;
pub(crate) use tile::{gram, widen_rows};

/// Borrowed elements on the host.
#[derive(Debug, Clone, Copy)]
pub enum HostSlice<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    BF16(&'a [bf16]),
}

impl Storage for HostSlice<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            HostSlice::F32(_) => Dtype::F32,
            HostSlice::F16(_) => Dtype::F16,
            HostSlice::BF16(_) => Dtype::BF16,
        }
    }
    fn elements(&self) -> usize {
        match self {
            HostSlice::F32(s) => s.len(),
            HostSlice::F16(s) => s.len(),
            HostSlice::BF16(s) => s.len(),
        }
    }
}

/// A layer view on the host.
pub type HostLayer<'a> = LayerView<'a, HostSlice<'a>>;

/// The CPU as a backend.
#[derive(Clone)]
pub struct Cpu {
    pool: Option<Arc<rayon::ThreadPool>>,
    isa: Isa,
    /// Memory for logits, from one call to the next: the first touch of a page costs more than what is done there.
    logits: Arc<Mutex<Aligned>>,
}

/// Bytes of logits that are held between calls, at most.
const HELD: usize = 64 << 20;

impl Default for Cpu {
    fn default() -> Self {
        Self { pool: None, isa: Isa::best(), logits: Arc::default() }
    }
}

impl Cpu {
    /// Uses the caller's current rayon pool (the global one outside any).
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs on `pool`.
    pub fn with_pool(pool: Arc<rayon::ThreadPool>) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    /// Uses no instructions beyond these, nor those that the machine lacks. Results agree to rounding.
    pub fn with_isa(self, isa: Isa) -> Self {
        Self { isa: isa.min(Isa::best()), ..self }
    }

    /// What is held for logits, if no other call has it.
    fn take_logits(&self) -> Aligned {
        self.logits.try_lock().map(|mut held| std::mem::take(&mut *held)).unwrap_or_default()
    }

    fn hold_logits(&self, logits: Aligned) {
        if let Ok(mut held) = self.logits.try_lock()
            && (held.bytes()..=HELD).contains(&logits.bytes())
        {
            *held = logits;
        }
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Backend for Cpu {
    type Storage<'a> = HostSlice<'a>;
    type Floats = Ragged<f32>;
    type Selection = Ragged<u32>;
    type Counts = Vec<u64>;

    fn zeros(&self, lens: &[u32]) -> Result<Ragged<f32>> {
        Ok(Ragged::filled(lens.iter().map(|&n| n as usize), 0.0))
    }
    fn to_host(&self, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
        Ok(rows.clone())
    }
    fn upload(&self, rows: Ragged<f32>) -> Result<Ragged<f32>> {
        Ok(rows)
    }
    fn slice(&self, rows: &Ragged<f32>, range: Range<usize>) -> Result<Ragged<f32>> {
        check::slice(&range, rows)?;
        Ok(range.map(|i| rows.row(i).to_vec()).collect())
    }
    fn lens(&self, rows: &Ragged<f32>) -> Vec<u32> {
        rows.lens().map(|n| n as u32).collect()
    }
    fn count_nan(&self, rows: &Ragged<f32>) -> Result<Vec<u64>> {
        Ok(rows.iter().map(|row| row.iter().filter(|x| x.is_nan()).count() as u64).collect())
    }
    fn counts_to_host(&self, counts: &Vec<u64>) -> Result<Vec<u64>> {
        Ok(counts.clone())
    }

    fn window_attention(
        &self,
        op: &WindowAttention,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
        mean: Option<&mut Ragged<f32>>,
    ) -> Result<()> {
        let mut logits = self.take_logits();
        let done = self.run(|| window_attention::run(self.isa, &mut logits, op, layers, out, mean));
        self.hold_logits(logits);
        done
    }
    fn projection(
        &self,
        op: &Projection<'_>,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| projection::run(self.isa, op, layers, out))
    }
    fn attention_spread(
        &self,
        op: AttentionSpread,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
        sums: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| attention_spread::run(self.isa, op, layers, out, sums))
    }
    fn expected_attention(
        &self,
        op: ExpectedAttention,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| expected_attention::run(self.isa, op, layers, out))
    }
    fn pool(&self, op: &Pool<'_>, rows: &mut Ragged<f32>) -> Result<()> {
        self.run(|| pool::run(op, rows))
    }
    fn value_norm(
        &self,
        op: ValueNorm,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| value_norm::run(self.isa, op, layers, out))
    }
    fn scale_norms(
        &self,
        op: NormScale,
        layers: &[HostLayer<'_>],
        norms: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| rows::scale_norms(op, layers, norms))
    }
    fn key_norm(&self, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
        self.run(|| key_scores::key_norm(self.isa, layers, out))
    }
    fn key_diff(&self, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
        self.run(|| key_scores::key_diff(self.isa, layers, out))
    }
    fn keys(&self, slots: &[Range<u32>], layers: &[HostLayer<'_>]) -> Result<Ragged<f32>> {
        self.run(|| residual::keys(slots, layers))
    }
    fn residual_norms(
        &self,
        op: &Residuals<'_>,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| residual::norms(op, layers, out))
    }
    fn saliency(
        &self,
        op: &Saliency<'_>,
        layers: &[HostLayer<'_>],
        rows: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| saliency::run(op, layers, rows))
    }
    fn lag(&self, op: &Lag, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
        self.run(|| lag::run(self.isa, op, layers, out))
    }
    fn positional(
        &self,
        op: Positional,
        layers: &[HostLayer<'_>],
        out: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| key_scores::positional(op, layers, out))
    }

    fn floor_at_mean(&self, lens: &[u32], rows: &mut Ragged<f32>) -> Result<()> {
        rows::floor_at_mean(lens, rows)
    }
    fn weigh(&self, epsilon: f32, rows: &Ragged<f32>, norms: &mut Ragged<f32>) -> Result<()> {
        rows::weigh(epsilon, rows, norms)
    }
    fn raise(&self, by: &Ragged<f32>, rows: &mut Ragged<f32>) -> Result<()> {
        rows::raise(by, rows)
    }
    fn mass_count(&self, thresholds: &[f32], caps: &[u32], mass: &Ragged<f32>) -> Result<Vec<u32>> {
        self.run(|| top_k::mass_count(thresholds, caps, mass))
    }
    fn free_mass(&self, protected: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Vec<u64>> {
        self.run(|| top_k::free_mass(protected, rows))
    }
    fn pin_top(&self, counts: &[u32], by: &Ragged<f32>, rows: &mut Ragged<f32>) -> Result<()> {
        self.run(|| top_k::pin_top(self.isa, counts, by, rows))
    }
    fn drop_top(&self, counts: &[u32], by: &Ragged<f32>, rows: &mut Ragged<f32>) -> Result<()> {
        self.run(|| top_k::drop_top(self.isa, counts, by, rows))
    }
    fn rank(
        &self,
        protected: &Ragged<Range<u32>>,
        weights: &[f32],
        rows: &mut Ragged<f32>,
    ) -> Result<()> {
        self.run(|| rows::rank(protected, weights, rows))
    }
    fn share_heads(&self, heads: &[usize], rows: &mut Ragged<f32>) -> Result<()> {
        rows::share_heads(heads, rows)
    }
    fn coarsen(&self, units: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
        rows::coarsen(units, rows)
    }

    fn top_k(&self, op: &TopK<'_>, parts: &[(&Ragged<f32>, Range<usize>)]) -> Result<Ragged<u32>> {
        self.run(|| top_k::run(self.isa, op, parts))
    }
    fn selected(&self, selection: &Ragged<u32>) -> Result<Vec<u32>> {
        Ok(selection.lens().map(|n| n as u32).collect())
    }
    fn selection_to_host(&self, selection: &Ragged<u32>) -> Result<Ragged<u32>> {
        Ok(selection.clone())
    }
    fn pick(&self, slots: &Ragged<u32>, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
        rows::pick(slots, rows)
    }

    fn attend(
        &self,
        op: &Attend,
        sequences: &[AttendView<'_, HostSlice<'_>>],
        out: &mut Ragged<f32>,
        lse: Option<&mut Ragged<f32>>,
    ) -> Result<()> {
        self.run(|| attend::run(self.isa, op, sequences, out, lse))
    }
}
