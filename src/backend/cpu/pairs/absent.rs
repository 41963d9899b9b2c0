//! A target without the tile unit: it cannot be opened, so none of the rest is called.

use half::bf16;

use super::Line;

pub(super) fn permitted() -> bool {
    false
}

pub(super) fn configure() {}
pub(super) fn release() {}
pub(super) fn zero() {}
pub(super) fn load_left(_steps: usize, _step: usize, _rows: &[bf16]) {}
pub(super) fn load_right(_columns: &[Line]) {}
pub(super) fn multiply() {}
pub(super) fn store(_to: &mut [f32], _pitch: usize) {}
