use super::{Cuda, DeviceLayer, Floats};
use crate::backend::ops::Projection;
use crate::error::{Error, Result};
pub(super) fn run(
    _: &Cuda,
    _: &Projection<'_>,
    _: &[DeviceLayer<'_>],
    _: &mut Floats,
) -> Result<()> {
    Err(Error::Unsupported { what: "projection on CUDA", why: "not yet" })
}
