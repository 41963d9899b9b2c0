//! LagKV scores: launches `kernels/lag.cu`.

use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Lag;
use crate::error::{Error, Result};

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

pub(super) fn run(_: &Cuda, op: &Lag, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::lag(op, layers, out)?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
