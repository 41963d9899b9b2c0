//! f32 and f64 arithmetic, and the approximate functions.

use super::lanes::*;
use super::{Entry, Env, forms};
use crate::num::approx::{self, Bound, pow2};
use crate::num::round::{self, Round, saturate};
use std::convert::identity;

/// What takes any rounding, `.ftz` and `.sat`. To nearest may go unsaid in the first three.
macro_rules! arithmetic {
    ($kind:ident: $F:ident, $finish:ident, $flags:literal: $Round:ident $($rnd:literal)?, $rnd_fma:literal) => {
        forms! { $kind:
            $(concat!("add", $rnd, $flags),)? concat!("add", $rnd_fma, $flags)
                => (a: $F, b: $F) -> $F { $finish(round::add(a, b, Round::$Round)) }
            $(concat!("sub", $rnd, $flags),)? concat!("sub", $rnd_fma, $flags)
                => (a: $F, b: $F) -> $F { $finish(round::add(a, -b, Round::$Round)) }
            $(concat!("mul", $rnd, $flags),)? concat!("mul", $rnd_fma, $flags)
                => (a: $F, b: $F) -> $F { $finish(round::mul(a, b, Round::$Round)) }
            concat!("fma", $rnd_fma, $flags), concat!("mad", $rnd_fma, $flags)
                => (a: $F, b: $F, c: $F) -> $F { $finish(round::fma(a, b, c, Round::$Round)) }
        }
    };
}

/// What takes any rounding and `.ftz`.
macro_rules! division {
    ($kind:ident: $F:ident, $flags:literal: $Round:ident $rnd:literal) => {
        forms! { $kind:
            concat!("div", $rnd, $flags) => (a: $F, b: $F) -> $F { round::div(a, b, Round::$Round) }
            concat!("rcp", $rnd, $flags) => (a: $F) -> $F { round::div(1.0, a, Round::$Round) }
            concat!("sqrt", $rnd, $flags) => (a: $F) -> $F { round::sqrt(a, Round::$Round) }
        }
    };
}

macro_rules! extremes {
    ($kind:ident: $F:ident, $ftz:literal) => {
        forms! { $kind:
            concat!("min", $ftz, ".f32") => (a: $F, b: $F) -> $F { min(a, b) }
            concat!("max", $ftz, ".f32") => (a: $F, b: $F) -> $F { max(a, b) }
            concat!("min", $ftz, ".NaN.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, min(a, b)) }
            concat!("max", $ftz, ".NaN.f32") => (a: $F, b: $F) -> $F { or_nan(a, b, max(a, b)) }
            concat!("min", $ftz, ".xorsign.abs.f32") => (a: $F, b: $F) -> $F { min_magnitude(a, b) }
            concat!("max", $ftz, ".xorsign.abs.f32") => (a: $F, b: $F) -> $F { max_magnitude(a, b) }
            concat!("min", $ftz, ".NaN.xorsign.abs.f32")
                => (a: $F, b: $F) -> $F { or_nan(a, b, min_magnitude(a, b)) }
            concat!("max", $ftz, ".NaN.xorsign.abs.f32")
                => (a: $F, b: $F) -> $F { or_nan(a, b, max_magnitude(a, b)) }
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
        // Subnormals pass through, and infinity gives 1.
        let bound = if a.is_subnormal() | a.is_infinite() { Bound::Ulp(0.0) } else { Bound::Relative(pow2(11)) };
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
    arithmetic!(common: F32, identity, ".f32": Nearest "", ".rn"),
    arithmetic!(common: F32, identity, ".f32": Zero, ".rz"),
    arithmetic!(common: F32, identity, ".f32": Down, ".rm"),
    arithmetic!(common: F32, identity, ".f32": Up, ".rp"),
    arithmetic!(rare: F32, saturate, ".sat.f32": Nearest "", ".rn"),
    arithmetic!(rare: F32, saturate, ".sat.f32": Zero, ".rz"),
    arithmetic!(rare: F32, saturate, ".sat.f32": Down, ".rm"),
    arithmetic!(rare: F32, saturate, ".sat.f32": Up, ".rp"),
    arithmetic!(rare: Ftz, identity, ".ftz.f32": Nearest "", ".rn"),
    arithmetic!(rare: Ftz, identity, ".ftz.f32": Zero, ".rz"),
    arithmetic!(rare: Ftz, identity, ".ftz.f32": Down, ".rm"),
    arithmetic!(rare: Ftz, identity, ".ftz.f32": Up, ".rp"),
    arithmetic!(rare: Ftz, saturate, ".ftz.sat.f32": Nearest "", ".rn"),
    arithmetic!(rare: Ftz, saturate, ".ftz.sat.f32": Zero, ".rz"),
    arithmetic!(rare: Ftz, saturate, ".ftz.sat.f32": Down, ".rm"),
    arithmetic!(rare: Ftz, saturate, ".ftz.sat.f32": Up, ".rp"),
    division!(common: F32, ".f32": Nearest ".rn"),
    division!(common: F32, ".f32": Zero ".rz"),
    division!(common: F32, ".f32": Down ".rm"),
    division!(common: F32, ".f32": Up ".rp"),
    division!(rare: Ftz, ".ftz.f32": Nearest ".rn"),
    division!(rare: Ftz, ".ftz.f32": Zero ".rz"),
    division!(rare: Ftz, ".ftz.f32": Down ".rm"),
    division!(rare: Ftz, ".ftz.f32": Up ".rp"),
    extremes!(common: F32, ""),
    extremes!(rare: Ftz, ".ftz"),
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
    if (a < b) | b.is_nan() | ((a == b) & a.is_sign_negative()) { a } else { b }
}

/// The larger one, the one that is a number, +0 of two zeros.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    if (a > b) | b.is_nan() | ((a == b) & b.is_sign_negative()) { a } else { b }
}

#[inline(always)]
pub fn or_nan(a: f32, b: f32, value: f32) -> f32 {
    if a.is_nan() | b.is_nan() { f32::NAN } else { value }
}

/// `.xorsign.abs`: the smaller magnitude, negative if just one operand is.
#[inline(always)]
pub fn min_magnitude(a: f32, b: f32) -> f32 {
    xor_sign(a, b, min(a.abs(), b.abs()))
}

#[inline(always)]
pub fn max_magnitude(a: f32, b: f32) -> f32 {
    xor_sign(a, b, max(a.abs(), b.abs()))
}

#[inline(always)]
fn xor_sign(a: f32, b: f32, magnitude: f32) -> f32 {
    f32::from_bits(magnitude.to_bits() ^ (a.to_bits() ^ b.to_bits()) & 1 << 31)
}
