//! The books of a page pool, wherever its rows lie: what a page is, and which are free.
//!
//! The lowest free page is taken first, so the same calls give the same tables. Taking a page and giving it back
//! allocate nothing.

use std::sync::Arc;

use super::slots::expect;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;

/// Pages of a pool, numbered from 0: what a [`PagePool`](super::PagePool) tells of itself.
#[derive(Debug)]
pub struct Pages {
    dtype: Dtype,
    dim: u32,
    page: u32,
    pages: u32,
    free: PageSet,
    /// Tells this pool from others: caches hold a clone.
    tag: Arc<()>,
}

impl Pages {
    /// `pages` pages of `page` rows of `dim` elements, all of them free or none.
    pub(crate) fn new(
        dtype: Dtype,
        dim: u32,
        page: u32,
        pages: u32,
        all_free: bool,
    ) -> Result<Self> {
        if dim == 0 {
            return Err(Error::Zero { what: "row dimension" });
        }
        if page == 0 {
            return Err(Error::Zero { what: "page size" });
        }
        if u64::from(page) > MAX_LEN {
            return Err(Error::TooLarge { what: "page size", got: page.into(), limit: MAX_LEN });
        }
        let free = if all_free { PageSet::full(pages) } else { PageSet::empty(pages) };
        Ok(Self { dtype, dim, page, pages, free, tag: Arc::new(()) })
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

    /// Rows of all pages.
    pub(crate) fn rows(&self) -> u64 {
        u64::from(self.page) * u64::from(self.pages)
    }

    /// Pages that so many slots fill.
    pub(crate) fn of_slots(&self, slots: u32) -> usize {
        slots.div_ceil(self.page) as usize
    }

    pub(crate) fn tag(&self) -> Arc<()> {
        Arc::clone(&self.tag)
    }

    /// Whether a cache's pages are of this pool.
    pub(crate) fn check_owner(&self, tag: &Arc<()>) -> Result<()> {
        if Arc::ptr_eq(&self.tag, tag) {
            return Ok(());
        }
        Err(Error::Unsupported { what: "page pool", why: "the cache's pages are of another pool" })
    }

    /// Whether rows of a layer fit the pages.
    pub(crate) fn check_layer(&self, dtype: Dtype, dim: usize) -> Result<()> {
        if dtype != self.dtype {
            let (expected, got) = (self.dtype, dtype);
            return Err(Error::Dtype { what: "layer for a page pool", expected, got });
        }
        expect("head dim of a page pool", self.dim as usize, dim)
    }

    /// Whether `needed` pages are free.
    pub(crate) fn check_free(&self, needed: u64) -> Result<()> {
        let free = u64::from(self.free.count);
        if needed > free { Err(Error::OutOfPages { needed, free }) } else { Ok(()) }
    }

    /// The lowest free pages, ascending: `count` of them, which were checked to be free.
    pub(crate) fn take(&mut self, count: usize) -> impl Iterator<Item = u32> + '_ {
        std::iter::from_fn(|| self.free.lowest()).take(count)
    }

    /// One page that is free.
    #[cfg(feature = "cuda")]
    pub(crate) fn take_page(&mut self, page: u32) {
        self.free.remove(page);
    }

    /// Gives pages back.
    pub(crate) fn give(&mut self, pages: impl IntoIterator<Item = u32>) {
        for page in pages {
            debug_assert!(!self.free.holds(page), "page {page} given back twice");
            self.free.insert(page);
        }
    }
}

/// A set of pages, one bit each.
#[derive(Debug)]
pub(crate) struct PageSet {
    bits: Vec<u64>,
    /// No bit is set in the words before this one.
    first: usize,
    count: u32,
}

impl PageSet {
    pub(crate) fn empty(pages: u32) -> Self {
        Self { bits: vec![0; pages.div_ceil(u64::BITS) as usize], first: 0, count: 0 }
    }

    pub(crate) fn full(pages: u32) -> Self {
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

    /// Removes the lowest page.
    fn lowest(&mut self) -> Option<u32> {
        self.first += self.bits[self.first..].iter().position(|&word| word != 0)?;
        let word = &mut self.bits[self.first];
        let page = self.first as u32 * u64::BITS + word.trailing_zeros();
        *word &= *word - 1;
        self.count -= 1;
        Some(page)
    }

    /// Adds a page that is not in it.
    pub(crate) fn insert(&mut self, page: u32) {
        let word = (page / u64::BITS) as usize;
        self.bits[word] |= 1 << (page % u64::BITS);
        self.first = self.first.min(word);
        self.count += 1;
    }

    /// Removes a page; whether it was in it.
    #[cfg(feature = "cuda")]
    pub(crate) fn remove(&mut self, page: u32) -> bool {
        let held = self.holds(page);
        if held {
            self.bits[(page / u64::BITS) as usize] &= !(1 << (page % u64::BITS));
            self.count -= 1;
        }
        held
    }
}
