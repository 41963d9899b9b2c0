//! One tensor of a cache, `[rows, dim]`, in memory of its own.
//!
//! Rows are moved as bytes, so the code is one for all dtypes. The bytes live in 4-byte words: aligned for
//! every dtype, and zeroed by the allocator, which touches no page before a row is written to it.

use std::hint::black_box;

use crate::backend::cpu::HostSlice;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Rows;

/// Rows of `dim` elements.
pub(super) struct Buffer {
    words: Vec<u32>,
    elements: usize,
    dtype: Dtype,
}

impl Buffer {
    /// `rows` rows of zeros. More than the allocator gives is an error.
    pub(super) fn zeroed(dtype: Dtype, dim: u32, rows: u64) -> Result<Self> {
        let words = words(dtype, dim, rows);
        // `vec!` aborts where the allocator refuses, so ask before. Opaque, or the question is optimised away.
        let words = black_box(reserved::<u32>("words of a cache tensor", words)?).capacity();
        Ok(Self { words: vec![0; words], elements: rows as usize * dim as usize, dtype })
    }

    /// Memory for so many rows in place of this one's; none if this one's is enough.
    pub(super) fn grown(&self, (dtype, dim, rows): (Dtype, u32, u64)) -> Result<Option<Self>> {
        match words(dtype, dim, rows) > self.words.len() as u128 {
            true => Self::zeroed(dtype, dim, rows).map(Some),
            false => Ok(None),
        }
    }

    /// Becomes that many rows, for which there is memory; they hold what they happen to.
    pub(super) fn reshape(&mut self, (dtype, dim, rows): (Dtype, u32, u64)) {
        (self.dtype, self.elements) = (dtype, rows as usize * dim as usize);
    }

    /// The elements, typed.
    pub(super) fn storage(&self) -> HostSlice<'_> {
        let n = self.elements;
        match self.dtype {
            Dtype::F32 => HostSlice::F32(&bytemuck::cast_slice(&self.words)[..n]),
            Dtype::F16 => HostSlice::F16(&bytemuck::cast_slice(&self.words)[..n]),
            Dtype::BF16 => HostSlice::BF16(&bytemuck::cast_slice(&self.words)[..n]),
        }
    }

    /// The elements as bytes, to write.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.elements * self.dtype.size();
        &mut bytemuck::cast_slice_mut(&mut self.words)[..len]
    }

    /// Bytes of all rows.
    pub(super) fn len(&self) -> usize {
        self.elements * self.dtype.size()
    }
}

/// Words that so many rows take.
fn words(dtype: Dtype, dim: u32, rows: u64) -> u128 {
    (u128::from(rows) * u128::from(dim) * dtype.size() as u128).div_ceil(4)
}

// Gigabytes of rows help nobody in a log.
impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} × {})", self.elements, self.dtype)
    }
}

/// An empty list with room for `len` entries. More than the allocator gives is an error.
pub(super) fn reserved<T>(what: &'static str, len: u128) -> Result<Vec<T>> {
    let mut list = Vec::new();
    match usize::try_from(len).map(|len| list.try_reserve_exact(len)) {
        Ok(Ok(())) => Ok(list),
        _ => {
            let bytes = len.saturating_mul(size_of::<T>() as u128);
            Err(Error::OutOfMemory { what, bytes: u64::try_from(bytes).unwrap_or(u64::MAX) })
        }
    }
}

/// Fills `dst` with the rows `from ..` of `head`.
pub(super) fn copy_rows(dst: &mut [u8], src: &Rows<'_, HostSlice<'_>>, head: usize, from: usize) {
    let size = src.dtype().size();
    let row = src.dim() * size;
    let bytes = bytes_of(src.storage());
    let mut rest = &mut *dst;
    for run in src.runs(head, from, from + rest.len() / row) {
        let (now, later) = rest.split_at_mut(run.rows * row);
        rest = later;
        if run.stride == src.dim() {
            now.copy_from_slice(&bytes[run.start * size..][..now.len()]);
        } else {
            for (i, out) in now.chunks_exact_mut(row).enumerate() {
                out.copy_from_slice(&bytes[(run.start + i * run.stride) * size..][..row]);
            }
        }
    }
}

fn bytes_of(slice: HostSlice<'_>) -> &[u8] {
    match slice {
        HostSlice::F32(s) => bytemuck::cast_slice(s),
        HostSlice::F16(s) => bytemuck::cast_slice(s),
        HostSlice::BF16(s) => bytemuck::cast_slice(s),
    }
}
