//! Exact selection: launches `kernels/top_k.cu`.

use std::ops::Range;

use super::{Cuda, Floats, check};
use crate::backend::ops::TopK;
use crate::error::{Error, Result};
use crate::ragged::Ragged;

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

/// Selected slots of every segment, on the device.
pub struct Selection {}

impl Selection {
    pub(super) fn counts(&self) -> Result<Vec<u32>> {
        Err(UNDONE)
    }
    pub(super) fn to_host(&self) -> Result<Ragged<u32>> {
        Err(UNDONE)
    }
}

pub(super) fn run(_: &Cuda, _: &TopK<'_>, _: &[(&Floats, Range<usize>)]) -> Result<Selection> {
    Err(UNDONE)
}

pub(super) fn mass_count(
    _: &Cuda,
    thresholds: &[f32],
    caps: &[u32],
    mass: &Floats,
) -> Result<Vec<u32>> {
    check::mass_count(thresholds, caps, mass)?;
    Err(UNDONE)
}

pub(super) fn pin_top(_: &Cuda, counts: &[u32], by: &Floats, rows: &mut Floats) -> Result<()> {
    check::pin_top(counts, by, rows)?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
