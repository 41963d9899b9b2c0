//! Being written.
use super::HostLayer;
use crate::backend::ops::Positional;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn key_norm(_: &[HostLayer<'_>], _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "key_norm", why: "being written" })
}
pub(super) fn key_diff(_: &[HostLayer<'_>], _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "key_diff", why: "being written" })
}
pub(super) fn positional(_: Positional, _: &[HostLayer<'_>], _: &mut Ragged<f32>) -> Result<()> {
    Err(Error::Unsupported { what: "positional", why: "being written" })
}
