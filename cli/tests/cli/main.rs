//! The built binary from outside: every subcommand, every class of bad input, and the numbers of `eval` against
//! a computation of their own.

mod bad_dumps;
mod bad_plans;
mod commands;
mod expected;
mod frames;
mod mutations;
mod numbers;
mod probes;
mod support;
mod value_norms;
