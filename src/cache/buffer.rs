//! One tensor of a cache, `[rows, dim]`, in memory of its own.
//!
//! Rows are moved as bytes, so the code is one for all dtypes. Memory is zeroed by the system, which touches no page
//! before a row is written to it. Large tensors are asked for in huge pages: of small ones, the first write to
//! each costs more than all that is copied there.

use std::hint::black_box;
use std::ops::Range;

use memmap2::MmapMut;

use crate::backend::cpu::{HostSlice, LINE, prefetch};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Rows;

/// Bytes from which a tensor is mapped. Huge pages have 2 MB, the last of which is used in part.
const MAPPED_BYTES: u128 = 4 << 20;

/// Rows of `dim` elements.
pub(super) struct Buffer {
    memory: Memory,
    elements: usize,
    dtype: Dtype,
}

/// From a cache line on, which is also aligned for every dtype.
enum Memory {
    Words { words: Vec<u32>, start: usize },
    Mapped(MmapMut),
}

impl Memory {
    /// More than the system gives is an error.
    fn zeroed(bytes: u128) -> Result<Self> {
        const WHAT: &str = "bytes of a cache tensor";
        if bytes < MAPPED_BYTES {
            // `vec!` aborts where the allocator refuses, so ask before. Opaque, or the question is optimised away.
            let needed = bytes.div_ceil(4) as usize;
            let room = needed + LINE / size_of::<u32>();
            let words = black_box(reserved::<u32>(WHAT, room as u128)?).capacity();
            let mut words = vec![0; words];
            let start = words.as_ptr().align_offset(LINE / size_of::<u32>());
            words.truncate(start + needed);
            return Ok(Self::Words { words, start });
        }
        let map = usize::try_from(bytes).ok().and_then(|bytes| MmapMut::map_anon(bytes).ok());
        let refused =
            Error::OutOfMemory { what: WHAT, bytes: u64::try_from(bytes).unwrap_or(u64::MAX) };
        let map = map.ok_or(refused)?;
        // Advice: where it is not taken, pages are small.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self::Mapped(map))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Words { words, start } => bytemuck::cast_slice(&words[*start..]),
            Self::Mapped(map) => map,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Words { words, start } => bytemuck::cast_slice_mut(&mut words[*start..]),
            Self::Mapped(map) => map,
        }
    }
}

impl Buffer {
    /// `rows` rows of zeros. More than the system gives is an error.
    pub(super) fn zeroed(dtype: Dtype, dim: u32, rows: u64) -> Result<Self> {
        let memory = Memory::zeroed(bytes(dtype, dim, rows))?;
        Ok(Self { memory, elements: rows as usize * dim as usize, dtype })
    }

    /// Memory for so many rows in place of this one's; none if this one's is enough.
    pub(super) fn grown(&self, (dtype, dim, rows): (Dtype, u32, u64)) -> Result<Option<Self>> {
        match bytes(dtype, dim, rows) > self.memory.bytes().len() as u128 {
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
        let bytes = &self.memory.bytes()[..self.len()];
        match self.dtype {
            Dtype::F32 => HostSlice::F32(bytemuck::cast_slice(bytes)),
            Dtype::F16 => HostSlice::F16(bytemuck::cast_slice(bytes)),
            Dtype::BF16 => HostSlice::BF16(bytemuck::cast_slice(bytes)),
        }
    }

    /// The elements as bytes, to write.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len();
        &mut self.memory.bytes_mut()[..len]
    }

    /// Bytes of all rows.
    pub(super) fn len(&self) -> usize {
        self.elements * self.dtype.size()
    }
}

/// Bytes that so many rows take.
fn bytes(dtype: Dtype, dim: u32, rows: u64) -> u128 {
    u128::from(rows) * u128::from(dim) * dtype.size() as u128
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
    let rows = from..from + dst.len() / (src.dim() * src.dtype().size());
    let mut rest = dst;
    for bytes in stretches(src, head, rows) {
        let (now, later) = rest.split_at_mut(bytes.len());
        now.copy_from_slice(bytes);
        rest = later;
    }
}

/// Rows of a head, as far as they lie one after the other.
pub(super) fn stretches<'s>(
    src: &'s Rows<'_, HostSlice<'s>>,
    head: usize,
    rows: Range<usize>,
) -> impl Iterator<Item = &'s [u8]> {
    let size = src.dtype().size();
    let (bytes, dim) = (bytes_of(src.storage()), src.dim());
    src.runs(head, rows.start, rows.end).flat_map(move |run| {
        let (pieces, rows) = if run.stride == dim { (1, run.rows) } else { (run.rows, 1) };
        (0..pieces).map(move |i| &bytes[(run.start + i * run.stride) * size..][..rows * dim * size])
    })
}

/// Asks for a row that is copied soon.
pub(super) fn prefetch_row(src: &Rows<'_, HostSlice<'_>>, head: usize, slot: usize) {
    let size = src.dtype().size();
    let start = src.start(head, slot) * size;
    prefetch_all(bytes_of(src.storage()), start..start + src.dim() * size);
}

/// Asks for bytes that are copied soon.
pub(super) fn prefetch_all(bytes: &[u8], range: Range<usize>) {
    range.step_by(LINE).for_each(|at| prefetch(bytes, at));
}

fn bytes_of(slice: HostSlice<'_>) -> &[u8] {
    match slice {
        HostSlice::F32(s) => bytemuck::cast_slice(s),
        HostSlice::F16(s) => bytemuck::cast_slice(s),
        HostSlice::BF16(s) => bytemuck::cast_slice(s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_either_kind_is_zero_and_keeps_what_is_written() {
        let rows = MAPPED_BYTES as u64 / 4;
        for rows in [0, 1, rows - 1, rows, rows + 1] {
            let mut buffer = Buffer::zeroed(Dtype::F32, 1, rows).unwrap();
            assert!(matches!(buffer.storage(), HostSlice::F32(x) if x.iter().all(|&x| x == 0.0)));
            assert_eq!(matches!(buffer.memory, Memory::Mapped(_)), rows * 4 >= MAPPED_BYTES as u64);
            buffer.bytes_mut().fill(1);
            let one = f32::from_bits(0x0101_0101);
            assert!(matches!(buffer.storage(), HostSlice::F32(x) if x == vec![one; rows as usize]));
            // Half as large, it fits where it is; twice as large, it does not.
            assert!(buffer.grown((Dtype::BF16, 1, rows)).unwrap().is_none());
            assert!(buffer.grown((Dtype::F32, 2, rows + 1)).unwrap().is_some());
        }
    }

    #[test]
    fn memory_that_nobody_has_is_refused() {
        for rows in [1 << 50, u64::MAX] {
            let refused = Buffer::zeroed(Dtype::F32, u32::MAX, rows);
            assert!(matches!(refused, Err(Error::OutOfMemory { .. })), "{rows}");
        }
    }
}
