//! Seeded bugs of `expected_attention.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::expected_attention;

mutants! {
}
