//! Being written.
use super::HostLayer;
use crate::backend::ops::Lag;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn run(_: &Lag, _: &[HostLayer<'_>], _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "lag", why: "being written" })
}
