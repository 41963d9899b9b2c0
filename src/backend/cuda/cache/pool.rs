//! Pages for many caches on the device: `[pages, P, D]` for keys, as much for values, one dtype, one head dim. The memory
//! is ours, or an engine's.
//!
//! The books are the host's. A page is free, in a cache, or the engine's, which does with it what it likes: pages of
//! an engine with a block allocator of its own come by [`PagePool::admit`] (empty) or
//! [`PagedCache::adopt`](super::PagedCache::adopt) (with what they hold), and go back by [`PagePool::withdraw`].

use std::ops::Deref;

use super::super::driver::Memory;
use super::super::gather::units;
use super::super::views::aligned;
use super::super::{Cuda, DeviceSlice};
use super::slots::row_bytes;
use crate::cache::Pages;
use crate::cache::pages::PageSet;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Storage;

/// Pages of `P` rows, each in at most one table of one [`PagedCache`](super::PagedCache): [`crate::cache::PagePool`] on
/// the device.
pub struct PagePool {
    pub(super) cuda: Cuda,
    k: DeviceSlice<'static>,
    v: DeviceSlice<'static>,
    pub(super) books: Pages,
    /// Pages that are the engine's.
    away: PageSet,
    /// What `k` and `v` lie in, unless it is the engine's.
    _own: Option<[Memory; 2]>,
}

impl PagePool {
    /// `pages` free pages of `page` rows of `dim` elements.
    ///
    /// Errors: a zero dim or page size, more rows than memory, rows that are no multiple of 16 bytes.
    pub fn new(cuda: &Cuda, dtype: Dtype, dim: u32, page: u32, pages: u32) -> Result<Self> {
        let books = Pages::new(dtype, dim, page, pages, true)?;
        let row = row_bytes(dtype, dim);
        units(row)?;
        let what = "pages of a pool";
        let bytes = usize::try_from(u128::from(books.rows()) * u128::from(row))
            .map_err(|_| Error::OutOfMemory { what, bytes: u64::MAX })?;
        let own =
            [Memory::new(&cuda.driver, what, bytes)?, Memory::new(&cuda.driver, what, bytes)?];
        // The memory lives as long as the pool, which shortens the loans (`k`, `v`).
        let [k, v] = own.each_ref().map(|memory| DeviceSlice::of(memory, dtype).forever());
        let (cuda, away) = (cuda.clone(), PageSet::empty(pages));
        Ok(Self { cuda, k, v, books, away, _own: Some(own) })
    }

    /// Pages in an engine's memory, `[pages, P, D]` each from the first element of `k` and of `v` on. All of them stay the
    /// engine's until they are [admitted](Self::admit) or [adopted](super::PagedCache::adopt).
    ///
    /// A pool of blocks `[blocks, H, P, D]` (HND) is `blocks * H` pages: head `h` of block `b` is page `b * H + h`. With
    /// keys and values in one tensor `[blocks, 2, H, P, D]` it is page `2 * b * H + h` of both, if `v` starts `H` pages
    /// after `k`, and `(2 * blocks - 1) * H` the number of pages.
    ///
    /// Errors: a zero dim or page size, keys and values of two dtypes, memory that does not hold so many pages, addresses or
    /// rows that are no multiples of 16 bytes.
    ///
    /// # Safety
    /// For both slices the promise of [`DeviceSlice::new`], until the pool, its caches and what the stream does with them
    /// are gone. While a page is not the engine's, nobody else writes to it, and nobody reads it but in the order
    /// of the stream. Of the pages that are not, no page of keys shares memory with a page of values.
    #[allow(unsafe_code, reason = "the promise that every launch relies on")]
    pub unsafe fn lent(
        cuda: &Cuda,
        k: DeviceSlice<'_>,
        v: DeviceSlice<'_>,
        dim: u32,
        page: u32,
        pages: u32,
    ) -> Result<Self> {
        let dtype = k.dtype();
        if v.dtype() != dtype {
            let (what, got) = ("values of a page pool", v.dtype());
            return Err(Error::Dtype { what, expected: dtype, got });
        }
        let books = Pages::new(dtype, dim, page, pages, false)?;
        units(row_bytes(dtype, dim))?;
        let whole = |what, slice: DeviceSlice<'_>| {
            aligned(what, slice.address())?;
            let needed = u128::from(books.rows()) * u128::from(dim);
            match usize::try_from(needed) {
                Ok(elements) if elements <= slice.elements() => {
                    Ok(DeviceSlice { elements, ..slice }.forever())
                }
                _ => {
                    let needed = u64::try_from(needed).unwrap_or(u64::MAX);
                    let available = slice.elements() as u64;
                    Err(Error::OutOfStorage { what, needed, available })
                }
            }
        };
        let (k, v) = (whole("keys of a page pool", k)?, whole("values of a page pool", v)?);
        let (cuda, away) = (cuda.clone(), PageSet::full(pages));
        Ok(Self { cuda, k, v, books, away, _own: None })
    }

    /// Makes pages of the engine's free: caches take them when they need some.
    ///
    /// Errors: pages that are not the engine's, or that there are not.
    pub fn admit(&mut self, pages: &[u32]) -> Result<()> {
        self.claim(pages.iter().copied())?;
        self.books.give(pages.iter().copied());
        Ok(())
    }

    /// Hands free pages back to the engine: every block `b` of pages `b * pages_per_block ..` that all are free, ascending.
    /// An engine with blocks of `H` pages gets block numbers (twice the block numbers if keys and values share a tensor), one
    /// with single pages page numbers. What the stream still does with them comes before what the engine asks of it next.
    ///
    /// Errors: blocks of no page.
    pub fn withdraw(&mut self, pages_per_block: u32) -> Result<Vec<u32>> {
        if pages_per_block == 0 {
            return Err(Error::Zero { what: "pages of a block" });
        }
        let pages = |block: u32| block * pages_per_block..(block + 1) * pages_per_block;
        let blocks = 0..self.books.pages() / pages_per_block;
        let free: Vec<u32> =
            blocks.filter(|&block| pages(block).all(|page| self.books.is_free(page))).collect();
        for page in free.iter().flat_map(|&block| pages(block)) {
            self.books.take_page(page);
            self.away.insert(page);
        }
        Ok(free)
    }

    /// Whether a page is the engine's.
    pub fn is_engines(&self, page: u32) -> bool {
        self.away.holds(page)
    }

    /// Takes pages from the engine, all or none.
    pub(super) fn claim(&mut self, pages: impl Iterator<Item = u32> + Clone) -> Result<()> {
        for (i, page) in pages.clone().enumerate() {
            if !self.away.remove(page) {
                pages.take(i).for_each(|page| self.away.insert(page));
                return Err(Error::NotTheEngines { page, pages: self.books.pages() });
            }
        }
        Ok(())
    }

    /// Undoes a claim.
    pub(super) fn disclaim(&mut self, pages: impl Iterator<Item = u32>) {
        pages.for_each(|page| self.away.insert(page));
    }

    /// All keys, `[pages, P, D]`.
    pub fn k(&self) -> DeviceSlice<'_> {
        self.k
    }
    /// All values, `[pages, P, D]`.
    pub fn v(&self) -> DeviceSlice<'_> {
        self.v
    }
}

impl Deref for PagePool {
    type Target = Pages;
    fn deref(&self) -> &Pages {
        &self.books
    }
}
