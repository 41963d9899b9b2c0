//! What competes, beside scores: protected positions and units that are kept or freed whole.
//!
//! The order itself is [`crate::backend::ops::TopK`]'s contract.

pub mod align;
pub mod protect;

pub use align::Align;
pub use protect::Protect;
