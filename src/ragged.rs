//! Rows of different lengths back to back: scores, positions, selections and cache layouts all are.
//!
//! `offsets[i]..offsets[i + 1]` is row `i`. Offsets are checked on construction, so that later code may slice.

use crate::error::{Error, Result};

/// A list of rows in one allocation.
#[derive(Debug, Clone, PartialEq)]
pub struct Ragged<T> {
    offsets: Vec<usize>,
    data: Vec<T>,
}

impl<T> Default for Ragged<T> {
    fn default() -> Self {
        Self { offsets: vec![0], data: Vec::new() }
    }
}

impl<T> Ragged<T> {
    /// Offsets must start at 0, ascend, and end at `data.len()`.
    pub fn new(offsets: Vec<usize>, data: Vec<T>) -> Result<Self> {
        let len = data.len();
        let bad = |index: usize, got: usize| Error::RaggedOffsets {
            index,
            got: got as u64,
            len: len as u64,
        };
        match (offsets.first(), offsets.last()) {
            (Some(0), Some(&last)) if last == len => {}
            (Some(0), Some(&last)) => return Err(bad(offsets.len() - 1, last)),
            (first, _) => return Err(bad(0, first.copied().unwrap_or(usize::MAX))),
        }
        if let Some(i) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
            return Err(bad(i, offsets[i]));
        }
        Ok(Self { offsets, data })
    }

    /// Rows of the given lengths, all elements `value`.
    pub fn filled(lens: impl IntoIterator<Item = usize>, value: T) -> Self
    where
        T: Clone,
    {
        let mut offsets = vec![0];
        let mut end = 0;
        for len in lens {
            end += len;
            offsets.push(end);
        }
        Self { offsets, data: vec![value; end] }
    }

    /// Appends a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = T>) {
        self.data.extend(row);
        self.offsets.push(self.data.len());
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.offsets.len() - 1
    }
    /// Length of row `i`.
    pub fn len(&self, i: usize) -> usize {
        self.offsets[i + 1] - self.offsets[i]
    }
    /// Elements of all rows.
    pub fn total(&self) -> usize {
        self.data.len()
    }
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[T] {
        &self.data[self.offsets[i]..self.offsets[i + 1]]
    }
    /// Row `i`, to write.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.data[self.offsets[i]..self.offsets[i + 1]]
    }
    /// All rows in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> {
        self.offsets.windows(2).map(|w| &self.data[w[0]..w[1]])
    }
    /// All rows in order, to write; disjoint, so that threads may share them.
    pub fn rows_mut(&mut self) -> Vec<&mut [T]> {
        let mut rest = self.data.as_mut_slice();
        let mut out = Vec::with_capacity(self.offsets.len() - 1);
        for w in self.offsets.windows(2) {
            let (row, tail) = rest.split_at_mut(w[1] - w[0]);
            out.push(row);
            rest = tail;
        }
        out
    }
    /// Lengths of the rows.
    pub fn lens(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.offsets.windows(2).map(|w| w[1] - w[0])
    }
    /// Row boundaries, `rows() + 1` of them (the `cu_len` of variable-length attention).
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }
    /// All elements, row after row.
    pub fn data(&self) -> &[T] {
        &self.data
    }
}

impl<T> FromIterator<Vec<T>> for Ragged<T> {
    fn from_iter<I: IntoIterator<Item = Vec<T>>>(rows: I) -> Self {
        let mut out = Self::default();
        for row in rows {
            out.push(row);
        }
        out
    }
}
