//! Borrowed tensors as kernels see them: per head an address, a stride and, for pages, a table.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::driver::Ptr;
use super::floats::{Slot, Table};
use super::{DeviceLayer, DeviceSlice};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Layout, Rows};

/// What every row must be a multiple of, in address and stride: keys and values travel 16 bytes at a time.
const VECTOR: u64 = 16;

/// Rows of one head. The twin of `Rows` in `kernels/device.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct HeadRows {
    base: u64,
    /// Bytes from a row to the next, within a page.
    stride: i64,
    /// First entry of the head's page table among all tables; -1 without pages.
    table: i64,
    page: u32,
    /// `slot / page` is `slot * magic >> (31 + shift)`.
    magic: u32,
    shift: u32,
    unused: u32,
}

impl HeadRows {
    /// Rows at a fixed stride in bytes.
    pub(super) fn strided(base: u64, stride: usize) -> Self {
        Self { base, stride: stride as i64, table: -1, page: 0, magic: 0, shift: 0, unused: 0 }
    }

    /// Rows of `row` bytes in pages of `page` rows, from entry `table` of the page tables on.
    pub(super) fn paged(base: u64, row: u64, page: u32, table: usize) -> Self {
        let shift = u32::BITS - (page - 1).leading_zeros();
        let magic = (1u64 << (31 + shift)).div_ceil(page.into()) as u32;
        Self { base, stride: row as i64, table: table as i64, page, magic, shift, unused: 0 }
    }

    /// With its table, if it has one, among tables that start at `pages`, counted from address zero: heads whose tables lie in
    /// different allocations may then meet in one launch.
    pub(super) fn with_absolute_table(mut self, pages: Ptr<u32>) -> Self {
        if self.table >= 0 {
            self.table += (pages.address / size_of::<u32>() as u64) as i64;
        }
        self
    }
}

/// Checks an address or a number of bytes.
pub(super) fn aligned(what: &'static str, got: u64) -> Result<u64> {
    aligned_to(what, got, VECTOR)
}

fn aligned_to(what: &'static str, got: u64, expected: u64) -> Result<u64> {
    match got % expected {
        0 => Ok(got),
        _ => Err(Error::Misaligned { what, got, expected }),
    }
}

/// Heads of any number of tensors, on their way to the device.
#[derive(Default)]
pub(super) struct Heads {
    rows: Vec<HeadRows>,
    pages: Vec<u32>,
}

/// Where [`Heads`] will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadSlots {
    /// One per head.
    pub rows: Slot<HeadRows>,
    /// Page tables of all.
    pub pages: Slot<u32>,
}

impl Heads {
    /// Adds all heads of a tensor; where they are among all.
    ///
    /// Errors: rows that do not start at multiples of 16 bytes or are no multiple of 16 bytes long.
    pub(super) fn push(
        &mut self,
        what: &'static str,
        tensor: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<Range<usize>> {
        self.add(what, tensor, VECTOR)
    }

    /// As [`Self::push`], for rows that are read element by element.
    pub(super) fn push_scalars(
        &mut self,
        what: &'static str,
        tensor: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<Range<usize>> {
        self.add(what, tensor, tensor.dtype().size() as u64)
    }

    /// One of the heads added so far.
    pub(super) fn row(&self, head: usize) -> HeadRows {
        self.rows[head]
    }

    fn add(
        &mut self,
        what: &'static str,
        tensor: &Rows<'_, DeviceSlice<'_>>,
        vector: u64,
    ) -> Result<Range<usize>> {
        let first = self.rows.len();
        let size = tensor.dtype().size() as u64;
        let base = tensor.storage().address();
        let row = tensor.dim() as u64 * size;
        let aligned = |got| aligned_to(what, got, vector);
        aligned(row)?;
        for head in 0..tensor.heads() {
            let start = || aligned(base + tensor.start(head, 0) as u64 * size);
            let of_head = match tensor.layout() {
                _ if tensor.len(head) == 0 => HeadRows::strided(base, 0),
                Layout::Strided { row_stride, .. } => {
                    HeadRows::strided(start()?, aligned(row_stride as u64 * size)? as usize)
                }
                Layout::Ragged { .. } => HeadRows::strided(start()?, row as usize),
                Layout::Paged { page, tables, .. } => {
                    let table = self.pages.len();
                    self.pages.extend_from_slice(&tables[head]);
                    HeadRows::paged(aligned(base)?, row, page, table)
                }
            };
            self.rows.push(of_head);
        }
        Ok(first..self.rows.len())
    }

    /// Keys of all segments of some views.
    pub(super) fn keys(layers: &[DeviceLayer<'_>]) -> Result<Self> {
        let mut heads = Self::default();
        layers.iter().try_for_each(|layer| heads.push("keys", layer.k()).map(drop))?;
        Ok(heads)
    }

    /// Values of all segments of some views.
    pub(super) fn values(layers: &[DeviceLayer<'_>]) -> Result<Self> {
        let mut heads = Self::default();
        layers.iter().try_for_each(|layer| heads.push("values", layer.v()).map(drop))?;
        Ok(heads)
    }

    pub(super) fn into_table(self, table: &mut Table) -> HeadSlots {
        HeadSlots { rows: table.push(&self.rows), pages: table.push(&self.pages) }
    }
}

/// Consecutive segments whose rows have one type and length: what a launch takes.
pub(super) struct Uniform {
    /// As the names of kernels have it.
    pub dtype: &'static str,
    pub dim: usize,
    /// Vectors of a row.
    pub chunks: u32,
    /// Of the views that were given.
    pub layers: Range<usize>,
    pub segments: Range<usize>,
}

/// Largest head dim of the kernels.
const MOST_DIM: usize = 256;

impl Uniform {
    /// All segments of some views. Usually they are all alike.
    ///
    /// Errors: a head dim above what kernels take.
    pub(super) fn of(layers: &[DeviceLayer<'_>]) -> Result<Vec<Self>> {
        let format = |layer: &DeviceLayer<'_>| (layer.k().dtype(), layer.k().dim());
        let (mut first, mut first_layer) = (0, 0);
        let alike = layers.chunk_by(|a, b| format(a) == format(b)).map(|alike| {
            let (dtype, dim) = format(&alike[0]);
            if dim > MOST_DIM {
                let (got, limit) = (dim as u64, MOST_DIM as u64);
                return Err(Error::TooLarge { what: "head dim on CUDA", got, limit });
            }
            let end = first + alike.iter().map(|layer| layer.shape().kv_heads()).sum::<usize>();
            let segments = std::mem::replace(&mut first, end)..end;
            let end = first_layer + alike.len();
            let layers = std::mem::replace(&mut first_layer, end)..end;
            let chunks = (dim * dtype.size() / VECTOR as usize) as u32;
            let dtype = match dtype {
                Dtype::F32 => "f32",
                Dtype::F16 => "f16",
                Dtype::BF16 => "bf16",
            };
            Ok(Self { dtype, dim, chunks, layers, segments })
        });
        alike.collect()
    }
}

/// Positions of the slots of all segments, on their way to the device.
pub(super) struct Positions {
    /// Where each segment's positions start among all; -1 where slot = position.
    starts: Vec<i64>,
    all: Vec<u32>,
    /// One past the last position that a slot has.
    end: u32,
}

/// Where [`Positions`] will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct PositionSlots {
    /// One per segment.
    pub starts: Slot<i64>,
    /// Positions of all.
    pub all: Slot<u32>,
}

impl Positions {
    pub(super) fn new(layers: &[DeviceLayer<'_>]) -> Self {
        let (mut starts, mut all, mut end) = (Vec::new(), Vec::new(), 0);
        for layer in layers {
            for head in 0..layer.shape().kv_heads() {
                let Some(positions) = layer.positions() else {
                    starts.push(-1);
                    end = end.max(layer.k().len(head) as u32);
                    continue;
                };
                starts.push(all.len() as i64);
                // They ascend.
                end = end.max(positions[head].last().map_or(0, |last| last.0 + 1));
                all.extend_from_slice(bytemuck::cast_slice::<_, u32>(&positions[head]));
            }
        }
        Self { starts, all, end }
    }

    pub(super) fn end(&self) -> u32 {
        self.end
    }

    pub(super) fn into_table(self, table: &mut Table) -> PositionSlots {
        PositionSlots { starts: table.push(&self.starts), all: table.push(&self.all) }
    }
}
