//! f32 and f64 arithmetic, and the approximate functions.

use super::lanes::*;
use super::{Entry, Env, forms};
use crate::num::approx::{self, Bound, pow2};
use crate::num::round::{self, Round, saturate};

/// Rounding, `.ftz` and `.sat` of the four operations that have all of them.
macro_rules! arithmetic {
    ($kind:ident: $F:ident, $flags:literal, $finish:expr) => {
        forms! { $kind:
            concat!("add", $flags, ".f32"), concat!("add.rn", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(a + b) }
            concat!("add.rz", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, b, Round::Zero)) }
            concat!("add.rm", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, b, Round::Down)) }
            concat!("add.rp", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, b, Round::Up)) }
            concat!("sub", $flags, ".f32"), concat!("sub.rn", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(a - b) }
            concat!("sub.rz", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, -b, Round::Zero)) }
            concat!("sub.rm", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, -b, Round::Down)) }
            concat!("sub.rp", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::add(a, -b, Round::Up)) }
            concat!("mul", $flags, ".f32"), concat!("mul.rn", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(a * b) }
            concat!("mul.rz", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::mul(a, b, Round::Zero)) }
            concat!("mul.rm", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::mul(a, b, Round::Down)) }
            concat!("mul.rp", $flags, ".f32") => (a: $F, b: $F) -> $F { $finish(round::mul(a, b, Round::Up)) }
            concat!("fma.rn", $flags, ".f32"), concat!("mad.rn", $flags, ".f32") => (a: $F, b: $F, c: $F) -> $F { $finish(a.mul_add(b, c)) }
            concat!("fma.rz", $flags, ".f32"), concat!("mad.rz", $flags, ".f32") => (a: $F, b: $F, c: $F) -> $F { $finish(round::fma(a, b, c, Round::Zero)) }
            concat!("fma.rm", $flags, ".f32"), concat!("mad.rm", $flags, ".f32") => (a: $F, b: $F, c: $F) -> $F { $finish(round::fma(a, b, c, Round::Down)) }
            concat!("fma.rp", $flags, ".f32"), concat!("mad.rp", $flags, ".f32") => (a: $F, b: $F, c: $F) -> $F { $finish(round::fma(a, b, c, Round::Up)) }
        }
    };
}

/// What has no `.sat`.
macro_rules! functions {
    ($kind:ident: $F:ident, $ftz:literal) => {
        forms! { $kind:
            concat!("div.rn", $ftz, ".f32") => (a: $F, b: $F) -> $F { a / b }
            concat!("div.rz", $ftz, ".f32") => (a: $F, b: $F) -> $F { round::div(a, b, Round::Zero) }
            concat!("div.rm", $ftz, ".f32") => (a: $F, b: $F) -> $F { round::div(a, b, Round::Down) }
            concat!("div.rp", $ftz, ".f32") => (a: $F, b: $F) -> $F { round::div(a, b, Round::Up) }
            concat!("rcp.rn", $ftz, ".f32") => (a: $F) -> $F { 1.0 / a }
            concat!("rcp.rz", $ftz, ".f32") => (a: $F) -> $F { round::div(1.0, a, Round::Zero) }
            concat!("rcp.rm", $ftz, ".f32") => (a: $F) -> $F { round::div(1.0, a, Round::Down) }
            concat!("rcp.rp", $ftz, ".f32") => (a: $F) -> $F { round::div(1.0, a, Round::Up) }
            concat!("sqrt.rn", $ftz, ".f32") => (a: $F) -> $F { a.sqrt() }
            concat!("sqrt.rz", $ftz, ".f32") => (a: $F) -> $F { round::sqrt(a, Round::Zero) }
            concat!("sqrt.rm", $ftz, ".f32") => (a: $F) -> $F { round::sqrt(a, Round::Down) }
            concat!("sqrt.rp", $ftz, ".f32") => (a: $F) -> $F { round::sqrt(a, Round::Up) }

            concat!("min", $ftz, ".f32") => (a: $F, b: $F) -> $F { min(a, b) }
            concat!("max", $ftz, ".f32") => (a: $F, b: $F) -> $F { max(a, b) }
            concat!("min", $ftz, ".NaN.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, min(a, b)) }
            concat!("max", $ftz, ".NaN.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, max(a, b)) }
            concat!("min", $ftz, ".xorsign.abs.f32") => (a: $F, b: $F) -> $F { xor_sign(a, b, min(a.abs(), b.abs())) }
            concat!("max", $ftz, ".xorsign.abs.f32") => (a: $F, b: $F) -> $F { xor_sign(a, b, max(a.abs(), b.abs())) }
            concat!("min", $ftz, ".NaN.xorsign.abs.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, xor_sign(a, b, min(a.abs(), b.abs()))) }
            concat!("max", $ftz, ".NaN.xorsign.abs.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, xor_sign(a, b, max(a.abs(), b.abs()))) }
        }
    };
}

/// Approximations: an exact value and how far the result may be from it.
macro_rules! approximate {
    ($F:ident, $ftz:literal) => {
        forms! { common:
            concat!("rcp.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                env.approximate(1, [a, 0.0], 1.0 / f64::from(a), Bound::Ulp(1.0))
            }
            concat!("sqrt.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                env.approximate(2, [a, 0.0], f64::from(a).sqrt(), Bound::Relative(pow2(23)))
            }
            concat!("rsqrt.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                // 2^-22.9
                env.approximate(3, [a, 0.0], 1.0 / f64::from(a).sqrt(), Bound::Relative(1.277_653e-7))
            }
            concat!("ex2.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                let bound = if a == 0.0 { Bound::Ulp(0.0) } else { Bound::Ulp(2.0) };
                env.approximate(4, [a, 0.0], approx::exp2(a.into()), bound)
            }
            concat!("lg2.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                let bound = if a > 0.5 && a < 2.0 { Bound::Absolute(pow2(22)) } else { Bound::Relative(pow2(22)) };
                env.approximate(5, [a, 0.0], approx::log2(a.into()), bound)
            }
            concat!("sin.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                env.approximate(6, [a, 0.0], f64::from(a).sin(), trigonometric_bound(a))
            }
            concat!("cos.approx", $ftz, ".f32") => (a: $F; env) -> $F {
                let bound = if a == 0.0 { Bound::Ulp(0.0) } else { trigonometric_bound(a) };
                env.approximate(7, [a, 0.0], f64::from(a).cos(), bound)
            }
            concat!("div.full", $ftz, ".f32") => (a: $F, b: $F; env) -> $F {
                env.approximate(8, [a, b], f64::from(a) / f64::from(b), Bound::Ulp(2.0))
            }
            concat!("div.approx", $ftz, ".f32") => (a: $F, b: $F; env) -> $F {
                // As a * (1 / b), which loses the largest divisors: 0 for them, and NaN for infinity by one of them.
                let large = b.abs() > f32::from_bits((127 + 126) << 23) && b.abs() < f32::INFINITY;
                let reciprocal = if large { 0f64.copysign(b.into()) } else { 1.0 / f64::from(b) };
                let exact = if large { f64::from(a) * reciprocal } else { f64::from(a) / f64::from(b) };
                env.approximate(9, [a, b], exact, Bound::Ulp(2.0))
            }
        }
    };
}

const SIGNS: &[Entry] = forms! { common:
    "abs.f32" => (a: F32Bits) -> F32Bits { a & !(1 << 31) }
    "neg.f32" => (a: F32Bits) -> F32Bits { a ^ 1 << 31 }
};

const OTHERS: &[Entry] = forms! { rare:
    "tanh.approx.f32" => (a: F32; env) -> F32 {
        // Subnormals pass through.
        let bound = if a.is_subnormal() { Bound::Ulp(0.0) } else { Bound::Relative(pow2(11)) };
        env.approximate(10, [a, 0.0], f64::from(a).tanh(), bound)
    }
    "abs.ftz.f32" => (a: Ftz) -> F32 { a.abs() }
    "neg.ftz.f32" => (a: Ftz) -> F32 { -a }

    "abs.f64" => (a: F64Bits) -> F64Bits { a & !(1 << 63) }
    "neg.f64" => (a: F64Bits) -> F64Bits { a ^ 1 << 63 }
    "add.f64", "add.rn.f64" => (a: F64, b: F64) -> F64 { a + b }
    "sub.f64", "sub.rn.f64" => (a: F64, b: F64) -> F64 { a - b }
    "mul.f64", "mul.rn.f64" => (a: F64, b: F64) -> F64 { a * b }
    "fma.rn.f64", "mad.rn.f64" => (a: F64, b: F64, c: F64) -> F64 { a.mul_add(b, c) }
    "div.rn.f64" => (a: F64, b: F64) -> F64 { a / b }
    "rcp.rn.f64" => (a: F64) -> F64 { 1.0 / a }
    "sqrt.rn.f64" => (a: F64) -> F64 { a.sqrt() }
    "min.f64" => (a: F64, b: F64) -> F64 { if a < b || b.is_nan() || (a == b && a.is_sign_negative()) { a } else { b } }
    "max.f64" => (a: F64, b: F64) -> F64 { if a > b || b.is_nan() || (a == b && b.is_sign_negative()) { a } else { b } }
};

pub static TABLES: &[&[Entry]] = &[
    arithmetic!(common: F32, "", std::convert::identity),
    arithmetic!(rare: F32, ".sat", saturate),
    arithmetic!(rare: Ftz, ".ftz", std::convert::identity),
    arithmetic!(rare: Ftz, ".ftz.sat", saturate),
    functions!(common: F32, ""),
    functions!(rare: Ftz, ".ftz"),
    approximate!(F32, ""),
    approximate!(Ftz, ".ftz"),
    SIGNS,
    OTHERS,
];

impl Env {
    /// `exact` rounded to f32 or, on request, moved within `bound`.
    #[inline(always)]
    fn approximate(self, form: u64, inputs: [f32; 2], exact: f64, bound: Bound) -> f32 {
        match self.perturb {
            None => exact as f32,
            Some(seed) => {
                let random = approx::hash(seed, form, inputs.map(f32::to_bits));
                approx::perturbed_f32(exact, bound, random)
            }
        }
    }
}

/// Errors are documented up to 100 pi; beyond it the same is assumed.
#[inline(always)]
fn trigonometric_bound(a: f32) -> Bound {
    // 2^-20.5 and 2^-14.7
    Bound::Absolute(if a.abs() <= std::f32::consts::TAU { 6.743_496e-7 } else { 3.757_1e-5 })
}

/// The smaller one, the one that is a number, -0 of two zeros.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    if a < b || b.is_nan() || (a == b && a.is_sign_negative()) { a } else { b }
}

/// The larger one, the one that is a number, +0 of two zeros.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    if a > b || b.is_nan() || (a == b && b.is_sign_negative()) { a } else { b }
}

#[inline(always)]
pub fn or_nan(a: f32, b: f32, value: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { value }
}

/// The magnitude of `value`, negative if just one of the others is.
#[inline(always)]
pub fn xor_sign(a: f32, b: f32, value: f32) -> f32 {
    f32::from_bits(value.to_bits() ^ (a.to_bits() ^ b.to_bits()) & 1 << 31)
}
