//! The command line as a library, so that tests and fuzzers reach the readers and the numbers directly.

pub mod commands;
pub mod dump;
pub mod eval;
pub mod fuzz;
pub mod planning;
pub mod plot;
pub mod policies;
pub mod stored;
