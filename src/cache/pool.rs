//! Pages for many caches: `[pages, P, D]` for keys, as much for values, one dtype, one head dim.

use std::ops::Deref;

use super::buffer::Buffer;
use super::pages::Pages;
use crate::backend::cpu::HostSlice;
use crate::dtype::Dtype;
use crate::error::Result;

/// Pages of `P` rows, each in at most one table of one [`PagedCache`](super::PagedCache).
#[derive(Debug)]
pub struct PagePool {
    pub(super) k: Buffer,
    pub(super) v: Buffer,
    pub(super) books: Pages,
}

impl PagePool {
    /// `pages` free pages of `page` rows of `dim` elements.
    ///
    /// Errors: a zero dim or page size, more rows than memory.
    pub fn new(dtype: Dtype, dim: u32, page: u32, pages: u32) -> Result<Self> {
        let books = Pages::new(dtype, dim, page, pages, true)?;
        let k = Buffer::zeroed(dtype, dim, books.rows())?;
        let v = Buffer::zeroed(dtype, dim, books.rows())?;
        Ok(Self { k, v, books })
    }

    /// All keys, `[pages, P, D]`.
    pub fn k(&self) -> HostSlice<'_> {
        self.k.storage()
    }
    /// All values, `[pages, P, D]`.
    pub fn v(&self) -> HostSlice<'_> {
        self.v.storage()
    }
}

impl Deref for PagePool {
    type Target = Pages;
    fn deref(&self) -> &Pages {
        &self.books
    }
}
