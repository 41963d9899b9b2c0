//! Pages for many caches on the device: `[pages, P, D]` for keys, as much for values, one dtype, one head dim.
//!
//! The books are the host's: the lowest free page is taken first, so the same calls give the same tables.

use std::sync::Arc;

use super::super::driver::Memory;
use super::super::gather::units;
use super::super::{Cuda, DeviceSlice};
use super::slots::row_bytes;
use crate::cache::pool::Free;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;

/// Pages of `P` rows, each in at most one table of one [`PagedCache`](super::PagedCache): [`crate::cache::PagePool`] on
/// the device.
pub struct PagePool {
    pub(super) cuda: Cuda,
    pub(super) k: Memory,
    pub(super) v: Memory,
    dtype: Dtype,
    dim: u32,
    page: u32,
    pages: u32,
    free: Free,
    /// Tells this pool from others: caches hold a clone.
    tag: Arc<()>,
}

impl PagePool {
    /// `pages` free pages of `page` rows of `dim` elements.
    ///
    /// Errors: a zero dim or page size, more rows than memory, rows that are no multiple of 16 bytes.
    pub fn new(cuda: &Cuda, dtype: Dtype, dim: u32, page: u32, pages: u32) -> Result<Self> {
        if dim == 0 {
            return Err(Error::Zero { what: "row dimension" });
        }
        if page == 0 {
            return Err(Error::Zero { what: "page size" });
        }
        if u64::from(page) > MAX_LEN {
            return Err(Error::TooLarge { what: "page size", got: page.into(), limit: MAX_LEN });
        }
        let row = row_bytes(dtype, dim);
        units(row)?;
        let what = "pages of a pool";
        let bytes = u128::from(page) * u128::from(pages) * u128::from(row);
        let bytes =
            usize::try_from(bytes).map_err(|_| Error::OutOfMemory { what, bytes: u64::MAX })?;
        let k = Memory::new(&cuda.driver, what, bytes)?;
        let v = Memory::new(&cuda.driver, what, bytes)?;
        let (cuda, free, tag) = (cuda.clone(), Free::all(pages), Arc::new(()));
        Ok(Self { cuda, k, v, dtype, dim, page, pages, free, tag })
    }

    /// All keys, `[pages, P, D]`.
    pub fn k(&self) -> DeviceSlice<'_> {
        self.lend(&self.k)
    }
    /// All values, `[pages, P, D]`.
    pub fn v(&self) -> DeviceSlice<'_> {
        self.lend(&self.v)
    }
    fn lend<'a>(&self, memory: &'a Memory) -> DeviceSlice<'a> {
        DeviceSlice::of(memory, self.dtype)
    }
    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Elements per row.
    pub fn dim(&self) -> u32 {
        self.dim
    }
    /// Rows per page.
    pub fn page(&self) -> u32 {
        self.page
    }
    /// Pages, free or not.
    pub fn pages(&self) -> u32 {
        self.pages
    }
    /// Pages that are free.
    pub fn free_pages(&self) -> u32 {
        self.free.count
    }
    /// Whether a page is free; no page beyond the last one is.
    pub fn is_free(&self, page: u32) -> bool {
        self.free.holds(page)
    }

    pub(super) fn tag(&self) -> &Arc<()> {
        &self.tag
    }

    /// Whether `needed` pages are free.
    pub(super) fn check_free(&self, needed: u64) -> Result<()> {
        let free = u64::from(self.free.count);
        if needed > free { Err(Error::OutOfPages { needed, free }) } else { Ok(()) }
    }

    /// The lowest free pages, ascending: `count` of them, which were checked to be free.
    pub(super) fn take(&mut self, count: usize) -> impl Iterator<Item = u32> + '_ {
        std::iter::from_fn(|| self.free.take()).take(count)
    }

    /// Gives pages back. What the stream still does with them comes before what their next owner does.
    pub(super) fn give(&mut self, pages: impl IntoIterator<Item = u32>) {
        for page in pages {
            self.free.give(page);
        }
    }
}
