//! Being written.
use super::HostSlice;
use crate::backend::AttendView;
use crate::backend::ops::Attend;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
pub(super) fn run(
    _: &Attend,
    _: &[AttendView<'_, HostSlice<'_>>],
    _: &mut Ragged<f32>,
    _: Option<&mut Ragged<f32>>,
) -> Result<()> {
    Err(Error::Unsupported { what: "attend", why: "being written" })
}
