//! Moves, selections, comparisons.

use super::lanes::*;
use super::{Entry, forms};

macro_rules! moves {
    ($kind:ident: $($n:literal $T:ident),+) => {
        forms! { $kind: $(
            concat!("mov.", $n) => (a: $T) -> $T { a }
            concat!("selp.", $n) => (a: $T, b: $T, p: Pred) -> $T { if p { a } else { b } }
        )+}
    };
}

/// The first operand where the third is not negative; `.ftz` makes a tiny negative a zero.
macro_rules! slct {
    ($($n:literal $T:ident),+) => {
        forms! { rare: $(
            concat!("slct.", $n, ".s32") => (a: $T, b: $T, c: S32) -> $T { if c >= 0 { a } else { b } }
            concat!("slct.", $n, ".f32") => (a: $T, b: $T, c: F32) -> $T { if c >= 0.0 { a } else { b } }
            concat!("slct.ftz.", $n, ".f32") => (a: $T, b: $T, c: Ftz) -> $T { if c >= 0.0 { a } else { b } }
        )+}
    };
}

/// `$before`, comparison, `$after` are the form; `$result` turns operands and comparison into the result.
macro_rules! compare_bits {
    ($kind:ident: $($before:literal $after:literal),+ => $B:ident -> $D:ident, $result:ident) => {
        forms! { $kind:
            $(concat!($before, "eq", $after)),+ => (a: $B, b: $B) -> $D { $result(a, b, |a, b| a == b) }
            $(concat!($before, "ne", $after)),+ => (a: $B, b: $B) -> $D { $result(a, b, |a, b| a != b) }
        }
    };
}

macro_rules! compare_signed {
    ($kind:ident: $($before:literal $after:literal),+ => $S:ident -> $D:ident, $result:ident) => {
        forms! { $kind:
            $(concat!($before, "lt", $after)),+ => (a: $S, b: $S) -> $D { $result(a, b, |a, b| a < b) }
            $(concat!($before, "le", $after)),+ => (a: $S, b: $S) -> $D { $result(a, b, |a, b| a <= b) }
            $(concat!($before, "gt", $after)),+ => (a: $S, b: $S) -> $D { $result(a, b, |a, b| a > b) }
            $(concat!($before, "ge", $after)),+ => (a: $S, b: $S) -> $D { $result(a, b, |a, b| a >= b) }
        }
    };
}

macro_rules! compare_unsigned {
    ($kind:ident: $($before:literal $after:literal),+ => $U:ident -> $D:ident, $result:ident) => {
        forms! { $kind:
            $(concat!($before, "lt", $after), concat!($before, "lo", $after)),+ => (a: $U, b: $U) -> $D { $result(a, b, |a, b| a < b) }
            $(concat!($before, "le", $after), concat!($before, "ls", $after)),+ => (a: $U, b: $U) -> $D { $result(a, b, |a, b| a <= b) }
            $(concat!($before, "gt", $after), concat!($before, "hi", $after)),+ => (a: $U, b: $U) -> $D { $result(a, b, |a, b| a > b) }
            $(concat!($before, "ge", $after), concat!($before, "hs", $after)),+ => (a: $U, b: $U) -> $D { $result(a, b, |a, b| a >= b) }
        }
    };
}

/// False where an operand is NaN, and with a `u` true there.
macro_rules! compare_floats {
    ($kind:ident: $($before:literal $after:literal),+ => $F:ident -> $D:ident, $result:ident) => {
        forms! { $kind:
            $(concat!($before, "eq", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a == b) }
            $(concat!($before, "ne", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a < b) | (a > b)) }
            $(concat!($before, "lt", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a < b) }
            $(concat!($before, "le", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a <= b) }
            $(concat!($before, "gt", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a > b) }
            $(concat!($before, "ge", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a >= b) }
            $(concat!($before, "equ", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a == b) | a.is_nan() | b.is_nan()) }
            $(concat!($before, "neu", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a != b) }
            $(concat!($before, "ltu", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a < b) | a.is_nan() | b.is_nan()) }
            $(concat!($before, "leu", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a <= b) | a.is_nan() | b.is_nan()) }
            $(concat!($before, "gtu", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a > b) | a.is_nan() | b.is_nan()) }
            $(concat!($before, "geu", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| (a >= b) | a.is_nan() | b.is_nan()) }
            $(concat!($before, "num", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| !a.is_nan() & !b.is_nan()) }
            $(concat!($before, "nan", $after)),+ => (a: $F, b: $F) -> $D { $result(a, b, |a, b| a.is_nan() | b.is_nan()) }
        }
    };
}

#[inline(always)]
fn truth<T>(a: T, b: T, holds: impl Fn(T, T) -> bool) -> bool {
    holds(a, b)
}

#[inline(always)]
fn ones<T>(a: T, b: T, holds: impl Fn(T, T) -> bool) -> u32 {
    if holds(a, b) { !0 } else { 0 }
}

#[inline(always)]
fn one<T>(a: T, b: T, holds: impl Fn(T, T) -> bool) -> f32 {
    if holds(a, b) { 1.0 } else { 0.0 }
}

#[inline(always)]
fn packed_ones(a: [f32; 2], b: [f32; 2], holds: impl Fn(f32, f32) -> bool) -> u32 {
    pack([0, 1].map(|i| if holds(a[i], b[i]) { !0 } else { 0 }))
}

#[inline(always)]
fn packed_one(a: [f32; 2], b: [f32; 2], holds: impl Fn(f32, f32) -> bool) -> [f32; 2] {
    [0, 1].map(|i| if holds(a[i], b[i]) { 1.0 } else { 0.0 })
}

const OTHERS: &[Entry] = forms! { rare:
    "mov.pred" => (a: Pred) -> Pred { a }
    "copysign.f32" => (a: F32Bits, b: F32Bits) -> F32Bits { a & 1 << 31 | b & !(1 << 31) }
    "copysign.f64" => (a: F64Bits, b: F64Bits) -> F64Bits { a & 1 << 63 | b & !(1 << 63) }
    "testp.finite.f32" => (a: F32) -> Pred { a.is_finite() }
    "testp.infinite.f32" => (a: F32) -> Pred { a.is_infinite() }
    "testp.number.f32" => (a: F32) -> Pred { !a.is_nan() }
    "testp.notanumber.f32" => (a: F32) -> Pred { a.is_nan() }
    "testp.normal.f32" => (a: F32) -> Pred { a.is_normal() || a == 0.0 }
    "testp.subnormal.f32" => (a: F32) -> Pred { a.is_subnormal() }
    "testp.finite.f64" => (a: F64) -> Pred { a.is_finite() }
    "testp.infinite.f64" => (a: F64) -> Pred { a.is_infinite() }
    "testp.number.f64" => (a: F64) -> Pred { !a.is_nan() }
    "testp.notanumber.f64" => (a: F64) -> Pred { a.is_nan() }
    "testp.normal.f64" => (a: F64) -> Pred { a.is_normal() || a == 0.0 }
    "testp.subnormal.f64" => (a: F64) -> Pred { a.is_subnormal() }
};

pub static TABLES: &[&[Entry]] = &[
    moves!(rare: "b16" B16, "u16" U16, "s16" S16),
    moves!(common: "b32" B32, "u32" U32, "s32" S32, "f32" F32Bits),
    moves!(common: "b64" B64, "u64" U64, "s64" S64, "f64" F64Bits),
    slct!("b16" B16, "u16" U16, "s16" S16),
    slct!("b32" B32, "u32" U32, "s32" S32, "f32" F32Bits),
    slct!("b64" B64, "u64" U64, "s64" S64, "f64" F64Bits),
    compare_bits!(rare: "setp." ".b16" => B16 -> Pred, truth),
    compare_bits!(common: "setp." ".b32" => B32 -> Pred, truth),
    compare_bits!(common: "setp." ".b64" => B64 -> Pred, truth),
    compare_bits!(rare: "setp." ".u16", "setp." ".s16" => U16 -> Pred, truth),
    compare_bits!(common: "setp." ".u32", "setp." ".s32" => U32 -> Pred, truth),
    compare_bits!(common: "setp." ".u64", "setp." ".s64" => U64 -> Pred, truth),
    compare_signed!(rare: "setp." ".s16" => S16 -> Pred, truth),
    compare_signed!(common: "setp." ".s32" => S32 -> Pred, truth),
    compare_signed!(common: "setp." ".s64" => S64 -> Pred, truth),
    compare_unsigned!(rare: "setp." ".u16" => U16 -> Pred, truth),
    compare_unsigned!(common: "setp." ".u32" => U32 -> Pred, truth),
    compare_unsigned!(common: "setp." ".u64" => U64 -> Pred, truth),
    compare_floats!(rare: "setp." ".f16" => F16 -> Pred, truth),
    compare_floats!(rare: "setp." ".bf16" => BF16 -> Pred, truth),
    compare_floats!(common: "setp." ".f32" => F32 -> Pred, truth),
    compare_floats!(rare: "setp." ".ftz.f32" => Ftz -> Pred, truth),
    compare_floats!(rare: "setp." ".f64" => F64 -> Pred, truth),
    compare_bits!(rare: "set." ".u32.b32", "set." ".s32.b32" => B32 -> U32, ones),
    compare_bits!(rare: "set." ".u32.u32", "set." ".s32.u32", "set." ".u32.s32", "set." ".s32.s32" => U32 -> U32, ones),
    compare_signed!(rare: "set." ".u32.s32", "set." ".s32.s32" => S32 -> U32, ones),
    compare_unsigned!(rare: "set." ".u32.u32", "set." ".s32.u32" => U32 -> U32, ones),
    compare_floats!(rare: "set." ".u32.f32", "set." ".s32.f32" => F32 -> U32, ones),
    compare_floats!(rare: "set." ".ftz.u32.f32", "set." ".ftz.s32.f32" => Ftz -> U32, ones),
    compare_floats!(rare: "set." ".f32.f32" => F32 -> F32, one),
    compare_floats!(rare: "set." ".ftz.f32.f32" => Ftz -> F32, one),
    compare_floats!(rare: "set." ".f16.f16" => F16 -> F16, one),
    compare_floats!(rare: "set." ".bf16.bf16" => BF16 -> BF16, one),
    compare_floats!(rare: "set." ".f16x2.f16x2" => F16x2 -> F16x2, packed_one),
    compare_floats!(rare: "set." ".bf16x2.bf16x2" => BF16x2 -> BF16x2, packed_one),
    compare_floats!(rare: "set." ".u32.f16x2", "set." ".s32.f16x2" => F16x2 -> U32, packed_ones),
    compare_floats!(rare: "set." ".u32.bf16x2", "set." ".s32.bf16x2" => BF16x2 -> U32, packed_ones),
    OTHERS,
];
