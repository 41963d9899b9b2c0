//! Candle tensors on the CPU, lent to the core without a copy.
//!
//! A tensor's memory is behind a lock, which [`Lent`] holds while rows are borrowed. Only the last dimension
//! must be contiguous; tokens and heads keep their strides, so that `[N, H, D]` views cut out of one fused
//! projection go in as they are.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Error, Layout, Result, Storage, Tensor, bail};
use kvbudget::backend::cpu::HostSlice;
use kvbudget::{Dtype, Rows};

/// A CPU tensor on loan.
pub struct Lent<'t> {
    /// Candle's read guard, whose type is that of another crate.
    storage: Box<dyn Deref<Target = Storage> + 't>,
    layout: &'t Layout,
}

impl<'t> Lent<'t> {
    /// Borrows `tensor`, whose last dimension must be contiguous: see [`rows_contiguous`].
    ///
    /// Errors: not on the CPU, not f32, f16 or bf16, or gaps in the last dimension.
    pub fn new(tensor: &'t Tensor) -> Result<Self> {
        if !has_contiguous_rows(tensor) {
            bail!("rows of {:?} with strides {:?} have gaps", tensor.dims(), tensor.stride());
        }
        let (storage, layout) = tensor.storage_and_layout();
        let lent = Self { storage: Box::new(storage), layout };
        lent.elements(0)?;
        Ok(lent)
    }

    /// Some tokens of a `[N, H, D]` tensor.
    pub fn tokens(&self, range: Range<usize>) -> Result<Rows<'_, HostSlice<'_>>> {
        let (tokens, heads, dim) = self.layout.shape().dims3()?;
        if range.start > range.end || range.end > tokens {
            bail!("expected a range of {tokens} tokens, got {range:?}");
        }
        let stride = self.layout.stride();
        let storage = self.elements(range.start * stride[0])?;
        let (heads, dim) = (heads as u32, dim as u32);
        Rows::strided(storage, heads, range.len() as u32, dim, stride[1], stride[0])
            .map_err(Error::wrap)
    }

    /// All tokens of a `[N, H, D]` tensor.
    pub fn all_tokens(&self) -> Result<Rows<'_, HostSlice<'_>>> {
        self.tokens(0..self.layout.dims()[0])
    }

    /// All of a matrix, as the rows of one head.
    pub fn matrix(&self) -> Result<Rows<'_, HostSlice<'_>>> {
        let (rows, dim) = self.layout.shape().dims2()?;
        let (storage, stride) = (self.elements(0)?, self.layout.stride()[0]);
        Rows::strided(storage, 1, rows as u32, dim as u32, 0, stride).map_err(Error::wrap)
    }

    /// The elements from number `skip` of the tensor on.
    fn elements(&self, skip: usize) -> Result<HostSlice<'_>> {
        let from = self.layout.start_offset() + skip;
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(s)) => Ok(HostSlice::F32(s.get(from..).unwrap_or(&[]))),
            Storage::Cpu(CpuStorage::F16(s)) => Ok(HostSlice::F16(s.get(from..).unwrap_or(&[]))),
            Storage::Cpu(CpuStorage::BF16(s)) => Ok(HostSlice::BF16(s.get(from..).unwrap_or(&[]))),
            Storage::Cpu(_) => bail!("expected a tensor of f32, f16 or bf16"),
            _ => bail!("expected a tensor on the CPU"),
        }
    }
}

/// The tensor itself if its last dimension is contiguous, else a copy.
pub fn rows_contiguous(tensor: &Tensor) -> Result<Tensor> {
    if has_contiguous_rows(tensor) { Ok(tensor.clone()) } else { tensor.contiguous() }
}

fn has_contiguous_rows(tensor: &Tensor) -> bool {
    matches!((tensor.dims().last(), tensor.stride().last()), (Some(&n), Some(&s)) if s == 1 || n <= 1)
}

/// The core's name of a candle dtype.
pub fn dtype(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        other => bail!("expected f32, f16 or bf16, got {}", other.as_str()),
    }
}
