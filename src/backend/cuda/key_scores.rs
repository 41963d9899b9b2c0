//! Scores that look at keys alone, or at positions alone: launches `kernels/key_scores.cu`.

use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Positional;
use crate::error::{Error, Result};

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

pub(super) fn key_norm(_: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::segments(layers, out)?;
    Err(UNDONE)
}

pub(super) fn key_diff(_: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::segments(layers, out)?;
    Err(UNDONE)
}

pub(super) fn positional(
    _: &Cuda,
    _: Positional,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::segments(layers, out)?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
