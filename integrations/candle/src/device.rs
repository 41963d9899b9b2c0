//! Candle tensors on a GPU, lent to the core's CUDA backend without a copy: an address, strides, and candle's own stream.
//!
//! The core's work is queued behind candle's on the same stream, and candle's next behind it: neither waits for the
//! other. What the core borrows must stay alive until then, which holds for tensors that outlive the next
//! synchronisation, and for dropped ones too, since candle frees memory in stream order.
//!
//! Candle's default device uses the stream of the calling thread: score and attend on the thread that runs the model.

use std::ops::Deref;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::{Error, Layout, Result, Storage, Tensor, bail};
use kvbudget::backend::cuda::{Cuda, DeviceSlice};
use kvbudget::{Dtype, Rows};

/// The core's backend on a candle device.
pub struct Device {
    // Dropped first: its stream is the other's.
    backend: Cuda,
    _candle: CudaDevice,
}

impl Device {
    /// Shares the device's context and stream.
    ///
    /// Errors: as [`Cuda::new`].
    #[allow(unsafe_code, reason = "the stream of one library is lent to another")]
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        // SAFETY: a stream of the device's primary context, which candle retains; `_candle` keeps it alive for as long as
        // the backend. Which thread may use it is said above.
        let backend =
            unsafe { Cuda::on_stream(stream.context().ordinal(), stream.cu_stream().cast()) };
        Ok(Self { backend: backend.map_err(Error::wrap)?, _candle: device.clone() })
    }

    /// The backend, for policies, planners and attention.
    pub fn backend(&self) -> &Cuda {
        &self.backend
    }
}

/// A tensor on loan.
pub struct Lent<'t> {
    /// Candle's read guard, whose type is that of another crate.
    storage: Box<dyn Deref<Target = Storage> + 't>,
    layout: &'t Layout,
}

impl<'t> Lent<'t> {
    /// Borrows `tensor`, whose last dimension must be contiguous.
    ///
    /// Errors: not on a GPU, not f32, f16 or bf16, or gaps in the last dimension.
    pub fn new(tensor: &'t Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        if layout.dims().last().is_some_and(|&n| n > 1) && layout.stride().last() != Some(&1) {
            bail!("rows of {:?} with strides {:?} have gaps", layout.dims(), layout.stride());
        }
        let lent = Self { storage: Box::new(storage), layout };
        lent.elements()?;
        Ok(lent)
    }

    /// A `[N, H, D]` tensor, tokens first, as rows of `H` heads.
    pub fn tokens_first(&self) -> Result<Rows<'_, DeviceSlice<'_>>> {
        let ((tokens, heads, dim), stride) = (self.layout.shape().dims3()?, self.layout.stride());
        self.rows(heads, tokens, dim, stride[1], stride[0])
    }

    /// An `[H, N, D]` tensor, heads first, as rows of `H` heads.
    pub fn heads_first(&self) -> Result<Rows<'_, DeviceSlice<'_>>> {
        let ((heads, tokens, dim), stride) = (self.layout.shape().dims3()?, self.layout.stride());
        self.rows(heads, tokens, dim, stride[0], stride[1])
    }

    /// A matrix, as the rows of one head.
    pub fn matrix(&self) -> Result<Rows<'_, DeviceSlice<'_>>> {
        let (rows, dim) = self.layout.shape().dims2()?;
        self.rows(1, rows, dim, 0, self.layout.stride()[0])
    }

    fn rows(
        &self,
        heads: usize,
        len: usize,
        dim: usize,
        head_stride: usize,
        row_stride: usize,
    ) -> Result<Rows<'_, DeviceSlice<'_>>> {
        let (heads, len, dim) = (heads as u32, len as u32, dim as u32);
        Rows::strided(self.elements()?, heads, len, dim, head_stride, row_stride)
            .map_err(Error::wrap)
    }

    /// The elements from the tensor's first on.
    fn elements(&self) -> Result<DeviceSlice<'_>> {
        let Storage::Cuda(storage) = &**self.storage else { bail!("expected a tensor on a GPU") };
        let from = self.layout.start_offset();
        match &storage.slice {
            CudaStorageSlice::F32(s) => Ok(lend(s, from, Dtype::F32)),
            CudaStorageSlice::F16(s) => Ok(lend(s, from, Dtype::F16)),
            CudaStorageSlice::BF16(s) => Ok(lend(s, from, Dtype::BF16)),
            _ => bail!("expected a tensor of f32, f16 or bf16, got {:?}", storage.dtype()),
        }
    }
}

#[allow(unsafe_code, reason = "the memory of one library is lent to another")]
fn lend<T>(slice: &CudaSlice<T>, from: usize, dtype: Dtype) -> DeviceSlice<'_> {
    let (address, _written) = slice.device_ptr(slice.stream());
    let elements = slice.len().saturating_sub(from);
    // SAFETY: the slice holds so many elements of that type from there on. It is freed and written in the order of its
    // stream, which is the backend's.
    unsafe { DeviceSlice::new(address + (from * dtype.size()) as u64, elements, dtype) }
}
