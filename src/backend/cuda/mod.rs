//! The CUDA backend: the kernels of `kernels/`, launched through cudarc's driver API.
//!
//! It needs a driver for CUDA 12.0 or later and a device of compute capability 8.0 or later when it is opened, and
//! neither nvcc nor a GPU to be built. All work goes to one stream, the caller's if one is lent: nothing waits for the
//! device but what returns numbers to the host. Equal input gives equal bits: no kernel's result depends on
//! the order in which blocks run.
//!
//! Keys, values and queries travel 16 bytes at a time: rows must start at multiples of 16 bytes and be multiples
//! of 16 bytes long. Head dims up to 256; f16 and bf16 use tensor cores, f32 does not.

mod append;
mod attend;
mod attention_spread;
pub mod cache;
mod driver;
mod expected_attention;
mod floats;
mod gather;
mod key_scores;
mod lag;
mod launch;
mod lists;
mod mass_count;
mod output;
mod pool;
mod projection;
mod ptx;
mod rank;
mod residual;
mod rows;
mod saliency;
mod selection;
mod top_k;
mod value_gram;
mod value_norm;
mod views;
mod window_attention;

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use super::ops::{
    Attend, AttentionSpread, ExpectedAttention, Lag, NormScale, Pool, Positional, Projection,
    Residuals, Saliency, TopK, ValueNorm, WindowAttention,
};
use super::{AttendView, Backend, check};
use crate::dtype::{Dtype, Element};
use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::{LayerView, Storage};
use driver::{Driver, Memory};

pub use floats::Floats;
pub use output::{Output, RowsMut};
pub use rows::Counts;
pub use top_k::Selection;

/// Borrowed elements in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a> {
    address: u64,
    elements: usize,
    dtype: Dtype,
    lender: PhantomData<&'a ()>,
}

impl DeviceSlice<'_> {
    /// Memory of an engine: `elements` elements from `address` on.
    ///
    /// # Safety
    /// On the device of the backend that will use it, the memory holds that many elements of that type, and until the
    /// backend's stream has done what was asked of it, nobody frees it, and nobody writes to it but in the order of
    /// that stream.
    #[allow(unsafe_code, reason = "the promise that every launch relies on")]
    pub unsafe fn new(address: u64, elements: usize, dtype: Dtype) -> Self {
        Self { address, elements, dtype, lender: PhantomData }
    }

    /// Without the lender's lifetime, for holders who see to it themselves.
    fn forever(self) -> DeviceSlice<'static> {
        let Self { address, elements, dtype, .. } = self;
        DeviceSlice { address, elements, dtype, lender: PhantomData }
    }

    /// All elements of an allocation of ours.
    fn of(memory: &Memory, dtype: Dtype) -> DeviceSlice<'_> {
        let (address, elements) = (memory.at::<u8>(0).address, memory.bytes() / dtype.size());
        DeviceSlice { address, elements, dtype, lender: PhantomData }
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Storage for DeviceSlice<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn elements(&self) -> usize {
        self.elements
    }
}

/// A layer view on the device.
pub type DeviceLayer<'a> = LayerView<'a, DeviceSlice<'a>>;

/// Elements in device memory of their own.
pub struct Tensor {
    memory: Memory,
    dtype: Dtype,
}

impl Tensor {
    /// Borrows all elements.
    pub fn lend(&self) -> DeviceSlice<'_> {
        DeviceSlice::of(&self.memory, self.dtype)
    }
}

/// A CUDA device as a backend.
#[derive(Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
}

impl Cuda {
    /// Device `ordinal`, its primary context and default stream.
    ///
    /// Errors: no driver, one too old, no such device, one too old.
    #[allow(unsafe_code, reason = "the default stream is always there")]
    pub fn new(ordinal: usize) -> Result<Self> {
        // SAFETY: null is the default stream.
        unsafe { Self::on_stream(ordinal, std::ptr::null_mut()) }
    }

    /// Device `ordinal`, its primary context, and an engine's stream (a `CUstream`): work is ordered with the engine's own.
    /// The stream is used, never owned; no other is created.
    ///
    /// Errors: as [`Self::new`].
    ///
    /// # Safety
    /// `stream` is a stream of the device's primary context, or null, and lives longer than all clones of this and all that they
    /// made. The handles 1 and 2 (legacy, per thread) mean what they mean on the calling thread: with 2, use this on one thread.
    #[allow(unsafe_code, reason = "a handle cannot be checked")]
    pub unsafe fn on_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        // SAFETY: the caller's promise.
        let driver = unsafe { Driver::new(ordinal, stream) }?;
        Ok(Self { driver: Arc::new(driver) })
    }

    /// Runs another PTX in place of that of `kernels/{file}.cu`: kernels of the same names and parameters. To be called
    /// before the first clone and the first launch; later it does nothing.
    #[doc(hidden)]
    pub fn with_ptx(mut self, file: &str, ptx: &str) -> Self {
        if let Some(driver) = Arc::get_mut(&mut self.driver) {
            driver.replace(file, ptx.to_owned());
        }
        self
    }

    /// Copies elements to the device.
    pub fn tensor<T: Element>(&self, elements: &[T]) -> Result<Tensor> {
        let memory = Memory::new(&self.driver, "a tensor", size_of_val(elements))?;
        memory.write(0, elements)?;
        Ok(Tensor { memory, dtype: T::DTYPE })
    }

    /// [`Backend::pool`] into new rows and [`Backend::top_k`] of those, in one launch less and with one reading of the scores
    /// less: the same rows and the same selection, bit for bit.
    ///
    /// Errors: as of both.
    pub fn pool_top_k(
        &self,
        pool: &Pool<'_>,
        op: &TopK<'_>,
        rows: &Floats,
    ) -> Result<(Floats, Selection)> {
        top_k::pool_and_select(self, pool, op, rows)
    }

    /// Waits until the device has done everything asked so far.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }
}

impl Backend for Cuda {
    type Storage<'a> = DeviceSlice<'a>;
    type Floats = Floats;
    type Selection = Selection;
    type Counts = Counts;

    fn zeros(&self, lens: &[u32]) -> Result<Floats> {
        Floats::zeroed(self, lens)
    }
    fn to_host(&self, rows: &Floats) -> Result<Ragged<f32>> {
        rows.to_host()
    }
    fn upload(&self, rows: Ragged<f32>) -> Result<Floats> {
        Floats::upload(self, &rows)
    }
    fn slice(&self, rows: &Floats, range: Range<usize>) -> Result<Floats> {
        check::slice(&range, rows)?;
        rows.slice(self, range)
    }
    fn lens(&self, rows: &Floats) -> Vec<u32> {
        rows.lens().to_vec()
    }
    fn count_nan(&self, rows: &Floats) -> Result<Counts> {
        rows::count_nan(self, rows)
    }
    fn counts_to_host(&self, counts: &Counts) -> Result<Vec<u64>> {
        counts.to_host()
    }

    fn window_attention(
        &self,
        op: &WindowAttention,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
        mean: Option<&mut Floats>,
    ) -> Result<()> {
        window_attention::run(self, op, layers, out, mean)
    }
    fn projection(
        &self,
        op: &Projection<'_>,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
    ) -> Result<()> {
        projection::run(self, op, layers, out)
    }
    fn attention_spread(
        &self,
        op: AttentionSpread,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
        sums: &mut Floats,
    ) -> Result<()> {
        attention_spread::run(self, op, layers, out, sums)
    }
    fn expected_attention(
        &self,
        op: ExpectedAttention,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
    ) -> Result<()> {
        expected_attention::run(self, op, layers, out)
    }
    fn pool(&self, op: &Pool<'_>, rows: &mut Floats) -> Result<()> {
        pool::run(self, op, rows)
    }
    fn value_norm(
        &self,
        op: ValueNorm,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
    ) -> Result<()> {
        value_norm::run(self, op, layers, out)
    }
    fn scale_norms(
        &self,
        op: NormScale,
        layers: &[DeviceLayer<'_>],
        norms: &mut Floats,
    ) -> Result<()> {
        rows::scale_norms(self, op, layers, norms)
    }
    fn key_norm(&self, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
        key_scores::key_norm(self, layers, out)
    }
    fn key_diff(&self, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
        key_scores::key_diff(self, layers, out)
    }
    fn keys(&self, slots: &[Range<u32>], layers: &[DeviceLayer<'_>]) -> Result<Ragged<f32>> {
        residual::keys(self, slots, layers)
    }
    fn residual_norms(
        &self,
        op: &Residuals<'_>,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
    ) -> Result<()> {
        residual::norms(self, op, layers, out)
    }
    fn saliency(
        &self,
        op: &Saliency<'_>,
        layers: &[DeviceLayer<'_>],
        rows: &mut Floats,
    ) -> Result<()> {
        saliency::run(self, op, layers, rows)
    }
    fn lag(&self, op: &Lag, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
        lag::run(self, op, layers, out)
    }
    fn positional(
        &self,
        op: Positional,
        layers: &[DeviceLayer<'_>],
        out: &mut Floats,
    ) -> Result<()> {
        key_scores::positional(self, op, layers, out)
    }

    fn floor_at_mean(&self, lens: &[u32], rows: &mut Floats) -> Result<()> {
        rows::floor_at_mean(self, lens, rows)
    }
    fn weigh(&self, epsilon: f32, rows: &Floats, norms: &mut Floats) -> Result<()> {
        rows::weigh(self, epsilon, rows, norms)
    }
    fn raise(&self, by: &Floats, rows: &mut Floats) -> Result<()> {
        rows::raise(self, by, rows)
    }
    fn mass_count(&self, thresholds: &[f32], caps: &[u32], mass: &Floats) -> Result<Vec<u32>> {
        mass_count::run(self, thresholds, caps, mass)
    }
    fn free_mass(&self, protected: &Ragged<Range<u32>>, rows: &Floats) -> Result<Vec<u64>> {
        mass_count::free_mass(self, protected, rows)
    }
    fn pin_top(&self, counts: &[u32], by: &Floats, rows: &mut Floats) -> Result<()> {
        top_k::pin_top(self, counts, by, rows)
    }
    fn drop_top(&self, counts: &[u32], by: &Floats, rows: &mut Floats) -> Result<()> {
        top_k::drop_top(self, counts, by, rows)
    }
    fn rank(
        &self,
        protected: &Ragged<Range<u32>>,
        weights: &[f32],
        rows: &mut Floats,
    ) -> Result<()> {
        rank::run(self, protected, weights, rows)
    }
    fn share_heads(&self, heads: &[usize], rows: &mut Floats) -> Result<()> {
        rows::share_heads(self, heads, rows)
    }
    fn coarsen(&self, units: &Ragged<Range<u32>>, rows: &Floats) -> Result<Floats> {
        rows::coarsen(self, units, rows)
    }

    fn top_k(&self, op: &TopK<'_>, parts: &[(&Floats, Range<usize>)]) -> Result<Selection> {
        top_k::run(self, op, parts)
    }
    fn selected(&self, selection: &Selection) -> Result<Vec<u32>> {
        selection.counts()
    }
    fn selection_to_host(&self, selection: &Selection) -> Result<Ragged<u32>> {
        selection.to_host()
    }
    fn pick(&self, slots: &Ragged<u32>, rows: &Floats) -> Result<Floats> {
        rows::pick(self, slots, rows)
    }

    fn attend(
        &self,
        op: &Attend,
        sequences: &[AttendView<'_, DeviceSlice<'_>>],
        out: &mut Floats,
        lse: Option<&mut Floats>,
    ) -> Result<()> {
        attend::run(self, op, sequences, out, lse)
    }
}

/// Every family of kernels that is launched.
#[cfg(test)]
fn signatures() -> Vec<ptx::tests::Signature> {
    [
        append::signatures(),
        gather::signatures(),
        pool::signatures(),
        projection::signatures(),
        rows::signatures(),
        selection::signatures(),
        top_k::signatures(),
        mass_count::signatures(),
        rank::signatures(),
        window_attention::signatures(),
        value_gram::signatures(),
        value_norm::signatures(),
        key_scores::signatures(),
        lag::signatures(),
        residual::signatures(),
        saliency::signatures(),
        attend::signatures(),
        attention_spread::signatures(),
        expected_attention::signatures(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
