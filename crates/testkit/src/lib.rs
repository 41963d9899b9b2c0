//! What the test suites share: the oracle, test tensors, comparisons, and one conformance suite for every backend.
//!
//! Three tiers, never two: the naive loops of [`naive`] judge the CPU backend, and both judge the others.
//! [`mutate`] judges the judge: a backend that is wrong in one element must fail.

pub mod compare;
pub mod data;
pub mod generate;
pub mod mutate;
pub mod naive;
pub mod suite;

/// Instantiates every case of the suite as its own `#[test]`, for the device that an expression makes:
/// `conformance!(cpu, Cpu::new());`.
#[macro_export]
macro_rules! conformance {
    ($device:ident, $make:expr) => {
        mod $device {
            use super::*;
            $crate::for_each_case!(conformance_tests, $make);
        }
    };
}

/// Part of [`conformance!`].
#[doc(hidden)] // Exported since macros of macros must be.
#[macro_export]
macro_rules! conformance_tests {
    ($make:expr; $($op:ident: $($case:ident)*;)*) => {
        $(mod $op {
            use super::*;
            $(
                #[test]
                fn $case() {
                    $crate::suite::$op::$case(&$make);
                }
            )*
        })*
    };
}

/// Part of [`suite::cases`].
#[doc(hidden)] // As above.
#[macro_export]
macro_rules! case_table {
    ($device:ty; $($op:ident: $($case:ident)*;)*) => {
        vec![$($((
            concat!(stringify!($op), "::", stringify!($case)),
            $crate::suite::$op::$case::<$device> as fn(&$device),
        ),)*)*]
    };
}
