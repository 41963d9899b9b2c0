//! Any bytes as a dump: `cargo +nightly fuzz run dump`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvbudget_cli::fuzz::dump(bytes));
