//! Being written.
use super::HostLayer;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn run(_: &[HostLayer<'_>], _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "value_norm", why: "being written" })
}
