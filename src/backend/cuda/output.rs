//! Where attention may write: rows of ours, or an engine's memory in the engine's dtype.

use super::append::{Strided, strided};
use super::{DeviceSlice, Floats, check};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Layout, Rows, Storage};

/// Rows of an engine that an operation overwrites.
pub struct RowsMut<'a>(Rows<'a, DeviceSlice<'a>>);

impl<'a> RowsMut<'a> {
    /// Rows at fixed strides in memory of an engine, to be written as f32, or as f16 or bf16, rounded to nearest even.
    ///
    /// Errors: rows that are not at fixed strides, or share elements with each other; addresses, strides or rows that are no
    /// multiples of 16 bytes.
    ///
    /// # Safety
    /// The promise of [`DeviceSlice::new`], and that nobody else reads or writes the rows but in the order of the stream.
    #[allow(unsafe_code, reason = "the promise that every launch relies on")]
    pub unsafe fn new(rows: Rows<'a, DeviceSlice<'a>>) -> Result<Self> {
        if strided("outputs", &rows)?.is_none() {
            let why = "a decode step copies no tables to the device";
            return Err(Error::Unsupported { what: "outputs without fixed strides", why });
        }
        super::views::aligned("outputs", (rows.dim() * rows.dtype().size()) as u64)?;
        if let Layout::Strided { len, head_stride, row_stride } = rows.layout() {
            // Either the rows of a head lie within its stride, or the heads within that of a row.
            let (heads, len, dim) = (rows.heads() as u128, u128::from(len), rows.dim() as u128);
            let (head, row) = (head_stride as u128, row_stride as u128);
            let nested = |inner: (u128, u128), outer: (u128, u128)| {
                (inner.0 <= 1 || inner.1 >= dim)
                    && (outer.0 <= 1 || outer.1 >= inner.0.saturating_sub(1) * inner.1 + dim)
            };
            let (heads, rows) = ((heads, head), (len, row));
            if !nested(rows, heads) && !nested(heads, rows) {
                return Err(Error::Overlap { what: "rows of outputs", with: "each other" });
            }
        }
        Ok(Self(rows))
    }
}

/// Where attention writes `[Hq, M, D]`.
pub enum Output<'a> {
    /// `Hq` rows of `M·D`, in f32.
    Floats(&'a mut Floats),
    /// An engine's rows.
    Rows(RowsMut<'a>),
}

impl<'a> From<&'a mut Floats> for Output<'a> {
    fn from(floats: &'a mut Floats) -> Self {
        Self::Floats(floats)
    }
}

impl<'a> From<RowsMut<'a>> for Output<'a> {
    fn from(rows: RowsMut<'a>) -> Self {
        Self::Rows(rows)
    }
}

impl Output<'_> {
    /// Checks the shape.
    pub(super) fn check(&self, [heads, tokens, dim]: [usize; 3]) -> Result<()> {
        let heads_are = |got| check::expect("output rows (query heads)", heads, got);
        match self {
            Self::Floats(out) => {
                heads_are(out.lens().len())?;
                let elements = "output elements of a query head";
                let mut lens = out.lens().iter();
                lens.try_for_each(|&len| check::expect(elements, tokens * dim, len as usize))
            }
            Self::Rows(RowsMut(out)) => {
                heads_are(out.heads())?;
                check::expect("outputs of a query head", tokens, out.len(0))?;
                check::expect("head dim of outputs", dim, out.dim())
            }
        }
    }

    /// Checks that an input lies elsewhere.
    pub(super) fn check_apart(&self, with: &'static str, input: &DeviceSlice<'_>) -> Result<()> {
        match self {
            Self::Rows(RowsMut(out)) if overlap(&reach(out), input) => {
                Err(Error::Overlap { what: "outputs", with })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Self::Floats(_) => Dtype::F32,
            Self::Rows(RowsMut(out)) => out.dtype(),
        }
    }

    /// Where rows of `dim` elements are, which were checked.
    pub(super) fn strided(&self, dim: usize) -> Result<Strided> {
        match self {
            Self::Floats(out) => {
                // Rows of one length lie at a fixed distance.
                let heads = out.lens().len();
                let first = out.row(0).address;
                let next = out.row(heads.min(2) - 1).address;
                Ok((first, (next - first) as i64, (dim * size_of::<f32>()) as i64))
            }
            Self::Rows(RowsMut(out)) => Ok(strided("outputs", out)?.expect("checked by `new`")),
        }
    }
}

/// The part of its storage that a tensor reaches.
pub(super) fn reach<'a>(rows: &Rows<'a, DeviceSlice<'a>>) -> DeviceSlice<'a> {
    let ends = (0..rows.heads()).filter(|&h| rows.len(h) > 0);
    let ends = ends.map(|h| rows.start(h, rows.len(h) - 1) + rows.dim());
    DeviceSlice { elements: ends.max().unwrap_or(0), ..rows.storage() }
}

fn overlap(a: &DeviceSlice<'_>, b: &DeviceSlice<'_>) -> bool {
    let end =
        |slice: &DeviceSlice<'_>| slice.address + (slice.elements() * slice.dtype().size()) as u64;
    a.address < end(b) && b.address < end(a)
}
