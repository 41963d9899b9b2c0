//! Borrowed tensors as kernels see them: per head an address, a stride and, for pages, a table.

use bytemuck::{Pod, Zeroable};

use super::floats::{Slot, Table};
use super::{DeviceLayer, DeviceSlice};
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
    /// Rows `stride` bytes apart from `base` on.
    pub(super) fn strided(base: u64, stride: usize) -> Self {
        Self { base, stride: stride as i64, table: -1, page: 0, magic: 0, shift: 0, unused: 0 }
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
    /// Adds all heads of a tensor.
    ///
    /// Errors: rows that do not start at multiples of 16 bytes or are no multiple of 16 bytes long.
    pub(super) fn push(
        &mut self,
        what: &'static str,
        tensor: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
        let size = tensor.dtype().size() as u64;
        let base = tensor.storage().address();
        let row = tensor.dim() as u64 * size;
        let aligned = |got: u64| match got % VECTOR {
            0 => Ok(got),
            _ => Err(Error::Misaligned { what, got, expected: VECTOR }),
        };
        aligned(row)?;
        for head in 0..tensor.heads() {
            let start = |row: usize| aligned(base + tensor.start(head, row) as u64 * size);
            let strided = HeadRows::strided(base, row as usize);
            let of_head = match tensor.layout() {
                _ if tensor.len(head) == 0 => strided,
                Layout::Strided { row_stride, .. } => {
                    let stride = aligned(row_stride as u64 * size)? as i64;
                    HeadRows { base: start(0)?, stride, ..strided }
                }
                Layout::Ragged { .. } => HeadRows { base: start(0)?, ..strided },
                Layout::Paged { page, tables, .. } => {
                    aligned(base)?;
                    let table = self.pages.len() as i64;
                    self.pages.extend_from_slice(&tables[head]);
                    let shift = u32::BITS - (page - 1).leading_zeros();
                    let magic = (1u64 << (31 + shift)).div_ceil(page.into()) as u32;
                    HeadRows { table, page, magic, shift, ..strided }
                }
            };
            self.rows.push(of_head);
        }
        Ok(())
    }

    /// Keys of all segments of some views.
    pub(super) fn keys(layers: &[DeviceLayer<'_>]) -> Result<Self> {
        let mut heads = Self::default();
        layers.iter().try_for_each(|layer| heads.push("keys", layer.k()))?;
        Ok(heads)
    }

    /// Values of all segments of some views.
    pub(super) fn values(layers: &[DeviceLayer<'_>]) -> Result<Self> {
        let mut heads = Self::default();
        layers.iter().try_for_each(|layer| heads.push("values", layer.v()))?;
        Ok(heads)
    }

    pub(super) fn into_table(self, table: &mut Table) -> HeadSlots {
        HeadSlots { rows: table.push(&self.rows), pages: table.push(&self.pages) }
    }
}
