//! Pages for many caches: `[pages, P, D]` for keys, as much for values, one dtype, one head dim.
//!
//! The lowest free page is taken first, so the same calls give the same tables. Taking a page and giving
//! it back allocate nothing.

use std::sync::Arc;

use super::buffer::Buffer;
use crate::backend::cpu::HostSlice;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;

/// Pages of `P` rows, each in at most one table of one [`PagedCache`](super::PagedCache).
#[derive(Debug)]
pub struct PagePool {
    pub(super) k: Buffer,
    pub(super) v: Buffer,
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
    /// Errors: a zero dim or page size, more rows than memory.
    pub fn new(dtype: Dtype, dim: u32, page: u32, pages: u32) -> Result<Self> {
        if dim == 0 {
            return Err(Error::Zero { what: "row dimension" });
        }
        if page == 0 {
            return Err(Error::Zero { what: "page size" });
        }
        if u64::from(page) > MAX_LEN {
            return Err(Error::TooLarge {
                what: "page size",
                got: u64::from(page),
                limit: MAX_LEN,
            });
        }
        let rows = u64::from(page) * u64::from(pages);
        let k = Buffer::zeroed(dtype, dim, rows)?;
        let v = Buffer::zeroed(dtype, dim, rows)?;
        Ok(Self { k, v, dtype, dim, page, pages, free: Free::all(pages), tag: Arc::new(()) })
    }

    /// All keys, `[pages, P, D]`.
    pub fn k(&self) -> HostSlice<'_> {
        self.k.storage()
    }
    /// All values, `[pages, P, D]`.
    pub fn v(&self) -> HostSlice<'_> {
        self.v.storage()
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

    /// Gives pages back.
    pub(super) fn give(&mut self, pages: &[u32]) {
        for &page in pages {
            self.free.give(page);
        }
    }
}

/// A set of pages, one bit each.
#[derive(Debug)]
pub(crate) struct Free {
    bits: Vec<u64>,
    /// No bit is set in the words before this one.
    first: usize,
    pub(crate) count: u32,
}

impl Free {
    pub(crate) fn all(pages: u32) -> Self {
        let mut bits = vec![u64::MAX; pages.div_ceil(u64::BITS) as usize];
        if let (Some(last), rest @ 1..) = (bits.last_mut(), pages % u64::BITS) {
            *last = (1 << rest) - 1;
        }
        Self { bits, first: 0, count: pages }
    }

    pub(crate) fn holds(&self, page: u32) -> bool {
        let word = self.bits.get((page / u64::BITS) as usize);
        word.is_some_and(|word| word >> (page % u64::BITS) & 1 == 1)
    }

    pub(crate) fn take(&mut self) -> Option<u32> {
        self.first += self.bits[self.first..].iter().position(|&word| word != 0)?;
        let word = &mut self.bits[self.first];
        let page = self.first as u32 * u64::BITS + word.trailing_zeros();
        *word &= *word - 1;
        self.count -= 1;
        Some(page)
    }

    pub(crate) fn give(&mut self, page: u32) {
        debug_assert!(!self.holds(page), "page {page} given back twice");
        let word = (page / u64::BITS) as usize;
        self.bits[word] |= 1 << (page % u64::BITS);
        self.first = self.first.min(word);
        self.count += 1;
    }
}
