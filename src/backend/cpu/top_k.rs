//! Being written.
use crate::backend::ops::TopK;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn run(_: &TopK<'_>, _: &[&Ragged<f32>]) -> Result<Ragged<u32>> {
    Err(Error::Unsupported { what: "top_k", why: "being written" })
}
pub(super) fn mass_count(_: f32, _: &[u32], _: &Ragged<f32>) -> Result<Vec<u32>> {
    Err(Error::Unsupported { what: "mass_count", why: "being written" })
}
pub(super) fn pin_top(_: &[u32], _: &Ragged<f32>, _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "pin_top", why: "being written" })
}
