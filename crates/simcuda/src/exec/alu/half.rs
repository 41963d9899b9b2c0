//! Arithmetic of f16, bf16 and their pairs, on f32 values. f32 has the 2p + 2 bits that make a second rounding harmless
//! after a sum, and holds a product exactly or, where it underflows, all that decides its rounding to bf16. Only the fused
//! operation needs more.

use super::float::{max, max_magnitude, min, min_magnitude, or_nan};
use super::lanes::*;
use super::{Entry, Env, forms};
use crate::num::approx::{self, pow2};
use crate::num::half::{bf16_from_f32, bf16_to_f32, f16_from_f32, f16_to_f32};
use crate::num::round::{Round, flush, relu, saturate, sum_to_odd, to_f32_odd};

/// The rows of an operation on single values and on pairs.
macro_rules! both {
    ($F:ident $x1:literal, $P:ident $x2:literal: $(
        $($form:literal),+ => |$($arg:ident),+| $value:expr;
    )*) => {
        forms! { common: $(
            $(concat!($form, $x1)),+ => ($($arg: $F),+) -> $F { $value }
            $(concat!($form, $x2)),+ => ($($arg: $P),+) -> $P {
                let low = { $(let $arg = $arg[0];)+ $value };
                let high = { $(let $arg = $arg[1];)+ $value };
                [low, high]
            }
        )*}
    };
}

macro_rules! arithmetic {
    ($F:ident $x1:literal, $P:ident $x2:literal, $fused:ident) => {
        both! { $F $x1, $P $x2:
            "add", "add.rn" => |a, b| a + b;
            "sub", "sub.rn" => |a, b| a - b;
            "mul", "mul.rn" => |a, b| a * b;
            "fma.rn" => |a, b, c| $fused(a, b, c);
            "fma.rn.relu" => |a, b, c| relu($fused(a, b, c));
            "min" => |a, b| min(a, b);
            "max" => |a, b| max(a, b);
            "min.NaN" => |a, b| or_nan(a, b, min(a, b));
            "max.NaN" => |a, b| or_nan(a, b, max(a, b));
            "min.xorsign.abs" => |a, b| min_magnitude(a, b);
            "max.xorsign.abs" => |a, b| max_magnitude(a, b);
            "min.NaN.xorsign.abs" => |a, b| or_nan(a, b, min_magnitude(a, b));
            "max.NaN.xorsign.abs" => |a, b| or_nan(a, b, max_magnitude(a, b));
        }
    };
}

const SATURATING: &[Entry] = both! { F16 ".f16", F16x2 ".f16x2":
    "add.sat", "add.rn.sat" => |a, b| saturate(a + b);
    "sub.sat", "sub.rn.sat" => |a, b| saturate(a - b);
    "mul.sat", "mul.rn.sat" => |a, b| saturate(a * b);
    "fma.rn.sat" => |a, b, c| saturate(fused_f16(a, b, c));
};

const SIGNS: &[Entry] = forms! { rare:
    "neg.f16" => (a: F16Bits) -> F16Bits { a ^ 0x8000 }
    "abs.f16" => (a: F16Bits) -> F16Bits { a & 0x7fff }
    "neg.bf16" => (a: BF16Bits) -> BF16Bits { a ^ 0x8000 }
    "abs.bf16" => (a: BF16Bits) -> BF16Bits { a & 0x7fff }
    "neg.f16x2" => (a: F16x2Bits) -> F16x2Bits { a ^ 0x8000_8000 }
    "abs.f16x2" => (a: F16x2Bits) -> F16x2Bits { a & 0x7fff_7fff }
    "neg.bf16x2" => (a: BF16x2Bits) -> BF16x2Bits { a ^ 0x8000_8000 }
    "abs.bf16x2" => (a: BF16x2Bits) -> BF16x2Bits { a & 0x7fff_7fff }
};

const APPROXIMATE: &[Entry] = forms! { rare:
    "ex2.approx.f16" => (a: F16; env) -> F16 { env.ex2_f16(a) }
    "ex2.approx.f16x2" => (a: F16x2; env) -> F16x2 { a.map(|a| env.ex2_f16(a)) }
    "ex2.approx.ftz.bf16" => (a: BF16; env) -> BF16 { env.ex2_bf16(a) }
    "ex2.approx.ftz.bf16x2" => (a: BF16x2; env) -> BF16x2 { a.map(|a| env.ex2_bf16(a)) }
    "tanh.approx.f16" => (a: F16; env) -> F16 { env.tanh_f16(a) }
    "tanh.approx.f16x2" => (a: F16x2; env) -> F16x2 { a.map(|a| env.tanh_f16(a)) }
    "tanh.approx.bf16" => (a: BF16; env) -> BF16 { env.tanh_bf16(a) }
    "tanh.approx.bf16x2" => (a: BF16x2; env) -> BF16x2 { a.map(|a| env.tanh_bf16(a)) }
};

pub static TABLES: &[&[Entry]] = &[
    arithmetic!(F16 ".f16", F16x2 ".f16x2", fused_f16),
    arithmetic!(BF16 ".bf16", BF16x2 ".bf16x2", fused_bf16),
    SATURATING,
    SIGNS,
    APPROXIMATE,
];

/// f64 loses bits of this sum only where they are too small by far to be more than a hint of inexactness in f16.
#[inline(always)]
fn fused_f16(a: f32, b: f32, c: f32) -> f32 {
    to_f32_odd(f64::from(a) * f64::from(b) + f64::from(c))
}

#[inline(always)]
fn fused_bf16(a: f32, b: f32, c: f32) -> f32 {
    to_f32_odd(sum_to_odd(f64::from(a) * f64::from(b), c.into()))
}

/// Errors are documented as relative for `ex2`, absolute for `tanh`.
impl Env {
    #[inline(always)]
    fn ex2_f16(self, a: f32) -> f32 {
        let exact = approx::exp2(a.into());
        // 2^-9.9
        self.approximate_half(11, a, exact, if a == 0.0 { 0.0 } else { 1.046_65e-3 * exact }, f16)
    }

    #[inline(always)]
    fn ex2_bf16(self, a: f32) -> f32 {
        let exact = approx::exp2(flush(a).into());
        let error = if a == 0.0 { 0.0 } else { pow2(7) * exact };
        flush(self.approximate_half(12, a, exact, error, bf16))
    }

    #[inline(always)]
    fn tanh_f16(self, a: f32) -> f32 {
        // 2^-10.987; subnormals pass through, and infinity gives 1.
        let error = if (a.abs() < 6.103_515_6e-5) | a.is_infinite() { 0.0 } else { 4.927e-4 };
        self.approximate_half(13, a, f64::from(a).tanh(), error, f16)
    }

    #[inline(always)]
    fn tanh_bf16(self, a: f32) -> f32 {
        let error = if a.is_subnormal() | a.is_infinite() { 0.0 } else { pow2(8) };
        self.approximate_half(14, a, f64::from(a).tanh(), error, bf16)
    }

    #[inline(always)]
    fn approximate_half(
        self,
        form: u64,
        a: f32,
        exact: f64,
        error: f64,
        format: fn(f64, Round) -> f64,
    ) -> f32 {
        match self.perturb {
            None => to_f32_odd(exact),
            Some(seed) => {
                let random = approx::hash(seed, form, [a.to_bits(), 0]);
                approx::perturbed(exact, error, random, format) as f32
            }
        }
    }
}

fn f16(x: f64, round: Round) -> f64 {
    f16_to_f32(f16_from_f32(to_f32_odd(x), round)).into()
}

fn bf16(x: f64, round: Round) -> f64 {
    bf16_to_f32(bf16_from_f32(to_f32_odd(x), round)).into()
}
