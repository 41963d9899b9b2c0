//! Any bytes as a plan: `cargo +nightly fuzz run plan`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvbudget_cli::fuzz::plan(bytes));
