//! Attention of the newest tokens: launches `kernels/attend.cu`.

use super::{Cuda, DeviceSlice, Floats, check};
use crate::backend::AttendView;
use crate::backend::ops::Attend;
use crate::error::{Error, Result};

const UNDONE: Error =
    Error::Unsupported { what: "this operation on CUDA", why: "it is not written yet" };

pub(super) fn run(
    _: &Cuda,
    _: &Attend,
    sequences: &[AttendView<'_, DeviceSlice<'_>>],
    out: &mut Floats,
    lse: Option<&mut Floats>,
) -> Result<()> {
    check::attend(sequences, out, lse.as_deref())?;
    Err(UNDONE)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![]
}
