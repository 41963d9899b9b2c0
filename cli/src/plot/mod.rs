//! Pictures: a plan as a map, results as curves. Figures are shapes in memory, saved as SVG or PNG by suffix.

pub mod error;
mod figure;
pub mod map;

pub use figure::Figure;
