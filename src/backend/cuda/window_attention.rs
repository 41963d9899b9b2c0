//! Scores from the last queries: launches `kernels/window_attention.cu`.

use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::WindowAttention;
use crate::error::{Error, Result};

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

pub(super) fn run(
    _: &Cuda,
    op: &WindowAttention,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
    mean: Option<&mut Floats>,
) -> Result<()> {
    check::window_attention(op, layers, out, mean.as_deref())?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
