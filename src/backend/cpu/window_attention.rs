//! Being written.
use super::HostLayer;
use crate::backend::ops::WindowAttention;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn run(
    _: &WindowAttention,
    _: &[HostLayer<'_>],
    _: &mut Ragged<f32>,
    _: Option<&mut Ragged<f32>>,
) -> Result<()> {
    Err(Error::Unsupported { what: "window_attention", why: "being written" })
}
