//! Value norms through the output projection: launches `kernels/value_norm.cu`.

use super::{Cuda, DeviceLayer, Floats, check};
use crate::error::{Error, Result};

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

pub(super) fn run(_: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::segments(layers, out)?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
