//! `cvt`.

use super::lanes::*;
use super::{Entry, forms};
use crate::num::half::{bf16_from_f32, f16_from_f32};
use crate::num::round::{
    Round, integer_to_f64, integer_to_odd, relu, saturate, to_f32, to_f32_odd,
};
use std::convert::identity;

macro_rules! integer_to_integer {
    ($kind:ident: $d:literal $D:ident $t:ident) => {
        forms! { $kind:
            concat!("cvt.", $d, ".u8") => (a: U8) -> $D { a as $t }
            concat!("cvt.", $d, ".s8") => (a: S8) -> $D { a as $t }
            concat!("cvt.", $d, ".u16") => (a: U16) -> $D { a as $t }
            concat!("cvt.", $d, ".s16") => (a: S16) -> $D { a as $t }
            concat!("cvt.", $d, ".u32") => (a: U32) -> $D { a as $t }
            concat!("cvt.", $d, ".s32") => (a: S32) -> $D { a as $t }
            concat!("cvt.", $d, ".u64") => (a: U64) -> $D { a as $t }
            concat!("cvt.", $d, ".s64") => (a: S64) -> $D { a as $t }
        }
    };
}

/// Only for sources that the destination does not hold all of.
macro_rules! saturating {
    ($d:literal $D:ident $t:ident: $($s:literal $S:ident),+) => {
        forms! { rare: $(
            concat!("cvt.sat.", $d, ".", $s) => (a: $S) -> $D {
                i128::from(a).clamp(i128::from($t::MIN), i128::from($t::MAX)) as $t
            }
        )+}
    };
}

/// `$odd` is the integer in f64, exact or rounded to odd.
macro_rules! integer_to_half {
    ($d:literal $D:ident $round:ident: $s:literal $S:ident, $a:ident => $odd:expr) => {
        forms! { rare:
            concat!("cvt.rn.", $d, ".", $s) => ($a: $S) -> $D { $round(to_f32_odd($odd), Round::Nearest) }
            concat!("cvt.rz.", $d, ".", $s) => ($a: $S) -> $D { $round(to_f32_odd($odd), Round::Zero) }
            concat!("cvt.rm.", $d, ".", $s) => ($a: $S) -> $D { $round(to_f32_odd($odd), Round::Down) }
            concat!("cvt.rp.", $d, ".", $s) => ($a: $S) -> $D { $round(to_f32_odd($odd), Round::Up) }
        }
    };
}

macro_rules! integer_to_f32 {
    ($kind:ident: $s:literal $S:ident, $a:ident => $odd:expr) => {
        forms! { $kind:
            concat!("cvt.rn.f32.", $s) => ($a: $S) -> F32 { $a as f32 }
            concat!("cvt.rz.f32.", $s) => ($a: $S) -> F32 { to_f32($odd, Round::Zero) }
            concat!("cvt.rm.f32.", $s) => ($a: $S) -> F32 { to_f32($odd, Round::Down) }
            concat!("cvt.rp.f32.", $s) => ($a: $S) -> F32 { to_f32($odd, Round::Up) }
        }
    };
}

macro_rules! integer_to_f64 {
    ($s:literal $S:ident) => {
        forms! { rare:
            concat!("cvt.rn.f64.", $s) => (a: $S) -> F64 { a as f64 }
            concat!("cvt.rz.f64.", $s) => (a: $S) -> F64 { integer_to_f64(a.into(), Round::Zero) }
            concat!("cvt.rm.f64.", $s) => (a: $S) -> F64 { integer_to_f64(a.into(), Round::Down) }
            concat!("cvt.rp.f64.", $s) => (a: $S) -> F64 { integer_to_f64(a.into(), Round::Up) }
        }
    };
}

/// Integers that the format holds: no direction makes a difference.
macro_rules! integer_to_wider {
    ($d:literal $D:ident $t:ident: $($s:literal $S:ident),+) => {
        forms! { rare: $(
            concat!("cvt.rn.", $d, ".", $s), concat!("cvt.rz.", $d, ".", $s), concat!("cvt.rm.", $d, ".", $s), concat!("cvt.rp.", $d, ".", $s)
                => (a: $S) -> $D { $t::from(a) }
        )+}
    };
}

/// Always saturates. A NaN gives 0 where `$nan` is 0, else the top bit alone.
macro_rules! float_to_integer {
    ($kind:ident: $flags:literal $f:literal $F:ident: $($d:literal $D:ident $t:ident $nan:literal),+) => {
        forms! { $kind: $(
            concat!("cvt.rni", $flags, ".", $d, $f)
                => (a: $F) -> $D { if $nan != 0 && a.is_nan() { 1 << ($t::BITS - 1) } else { a.round_ties_even() as $t } }
            concat!("cvt.rzi", $flags, ".", $d, $f)
                => (a: $F) -> $D { if $nan != 0 && a.is_nan() { 1 << ($t::BITS - 1) } else { a as $t } }
            concat!("cvt.rmi", $flags, ".", $d, $f)
                => (a: $F) -> $D { if $nan != 0 && a.is_nan() { 1 << ($t::BITS - 1) } else { a.floor() as $t } }
            concat!("cvt.rpi", $flags, ".", $d, $f)
                => (a: $F) -> $D { if $nan != 0 && a.is_nan() { 1 << ($t::BITS - 1) } else { a.ceil() as $t } }
        )+}
    };
}

/// To an integral value of the same format.
macro_rules! integral {
    ($kind:ident: $flags:literal $f:literal $F:ident, $finish:expr) => {
        forms! { $kind:
            concat!("cvt.rni", $flags, $f, $f) => (a: $F) -> $F { $finish(a.round_ties_even()) }
            concat!("cvt.rzi", $flags, $f, $f) => (a: $F) -> $F { $finish(a.trunc()) }
            concat!("cvt.rmi", $flags, $f, $f) => (a: $F) -> $F { $finish(a.floor()) }
            concat!("cvt.rpi", $flags, $f, $f) => (a: $F) -> $F { $finish(a.ceil()) }
        }
    };
}

/// A conversion in the four directions; `$value` is in terms of `$round`.
macro_rules! rounded {
    ($kind:ident: $flags:literal: $a:ident: $S:ident, $round:ident => $D:ident, $value:expr) => {
        forms! { $kind:
            concat!("cvt.rn", $flags) => ($a: $S) -> $D { let $round = Round::Nearest; $value }
            concat!("cvt.rz", $flags) => ($a: $S) -> $D { let $round = Round::Zero; $value }
            concat!("cvt.rm", $flags) => ($a: $S) -> $D { let $round = Round::Down; $value }
            concat!("cvt.rp", $flags) => ($a: $S) -> $D { let $round = Round::Up; $value }
        }
    };
}

/// The conversions from f32 that know two directions.
macro_rules! from_f32 {
    ($kind:ident: $n:literal, $r:expr) => {
        forms! { $kind:
            concat!("cvt.", $n, ".relu.f16.f32") => (a: F32) -> F16Bits { f16_from_f32(relu(a), $r) }
            concat!("cvt.", $n, ".bf16.f32") => (a: F32) -> BF16Bits { bf16_from_f32(a, $r) }
            concat!("cvt.", $n, ".relu.bf16.f32") => (a: F32) -> BF16Bits { bf16_from_f32(relu(a), $r) }
            // The first operand goes to the upper half.
            concat!("cvt.", $n, ".f16x2.f32") => (a: F32, b: F32) -> F16x2Bits { pack([b, a].map(|x| f16_from_f32(x, $r))) }
            concat!("cvt.", $n, ".relu.f16x2.f32") => (a: F32, b: F32) -> F16x2Bits { pack([b, a].map(|x| f16_from_f32(relu(x), $r))) }
            concat!("cvt.", $n, ".bf16x2.f32") => (a: F32, b: F32) -> BF16x2Bits { pack([b, a].map(|x| bf16_from_f32(x, $r))) }
            concat!("cvt.", $n, ".relu.bf16x2.f32") => (a: F32, b: F32) -> BF16x2Bits { pack([b, a].map(|x| bf16_from_f32(relu(x), $r))) }
        }
    };
}

const COMMON: &[Entry] = forms! { common:
    "cvt.f32.f16" => (a: F16) -> F32 { a }
    "cvt.f32.bf16" => (a: BF16) -> F32 { a }
    "cvt.f64.f32" => (a: F32) -> F64 { a.into() }
    "cvt.sat.f32.f32" => (a: F32) -> F32 { saturate(a) }
};

const OTHERS: &[Entry] = forms! { rare:
    "cvt.ftz.f32.f16" => (a: F16) -> Ftz { a }
    "cvt.sat.f32.f16" => (a: F16) -> F32 { saturate(a) }
    "cvt.ftz.sat.f32.f16" => (a: F16) -> Ftz { saturate(a) }
    "cvt.ftz.f32.bf16" => (a: BF16) -> Ftz { a }
    "cvt.f64.f16" => (a: F16) -> F64 { a.into() }
    "cvt.f64.bf16" => (a: BF16) -> F64 { a.into() }
    "cvt.ftz.f64.f32" => (a: Ftz) -> F64 { a.into() }
    "cvt.sat.f64.f32" => (a: F32) -> F64 { saturate(a).into() }
    "cvt.sat.f64.f16" => (a: F16) -> F64 { saturate(a).into() }
    "cvt.f32.f32" => (a: F32) -> F32 { a }
    "cvt.ftz.f32.f32" => (a: Ftz) -> Ftz { a }
    "cvt.ftz.sat.f32.f32" => (a: Ftz) -> Ftz { saturate(a) }
    "cvt.f64.f64" => (a: F64) -> F64 { a }
    "cvt.sat.f64.f64" => (a: F64) -> F64 { if a >= 1.0 { 1.0 } else if a > 0.0 { a } else { 0.0 } }
    "cvt.f16.f16" => (a: F16) -> F16 { a }
    "cvt.sat.f16.f16" => (a: F16) -> F16 { saturate(a) }
    "cvt.bf16.bf16" => (a: BF16) -> BF16 { a }
    "cvt.rna.tf32.f32" => (a: F32) -> B32 {
        // A multiple of 2^13 in the bits; ties away from zero.
        let bits = a.to_bits();
        if a.is_nan() { 0x7fff_ffff } else if a.is_infinite() { bits } else { (bits + 0x1000) & !0x1fff }
    }
};

pub static TABLES: &[&[Entry]] = &[
    integer_to_integer!(rare: "u8" U8 u8),
    integer_to_integer!(rare: "s8" S8 i8),
    integer_to_integer!(rare: "u16" U16 u16),
    integer_to_integer!(rare: "s16" S16 i16),
    integer_to_integer!(common: "u32" U32 u32),
    integer_to_integer!(common: "s32" S32 i32),
    integer_to_integer!(common: "u64" U64 u64),
    integer_to_integer!(common: "s64" S64 i64),
    saturating!("u8" U8 u8: "s8" S8, "u16" U16, "s16" S16, "u32" U32, "s32" S32, "u64" U64, "s64" S64),
    saturating!("s8" S8 i8: "u8" U8, "u16" U16, "s16" S16, "u32" U32, "s32" S32, "u64" U64, "s64" S64),
    saturating!("u16" U16 u16: "s8" S8, "s16" S16, "u32" U32, "s32" S32, "u64" U64, "s64" S64),
    saturating!("s16" S16 i16: "u16" U16, "u32" U32, "s32" S32, "u64" U64, "s64" S64),
    saturating!("u32" U32 u32: "s8" S8, "s16" S16, "s32" S32, "u64" U64, "s64" S64),
    saturating!("s32" S32 i32: "u32" U32, "u64" U64, "s64" S64),
    saturating!("u64" U64 u64: "s8" S8, "s16" S16, "s32" S32, "s64" S64),
    saturating!("s64" S64 i64: "u64" U64),
    integer_to_half!("f16" F16Bits f16_from_f32: "u8" U8, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "s8" S8, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "u16" U16, a => a.into()),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "u16" U16, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "s16" S16, a => a.into()),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "s16" S16, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "u32" U32, a => a.into()),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "u32" U32, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "s32" S32, a => a.into()),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "s32" S32, a => a.into()),
    integer_to_half!("f16" F16Bits f16_from_f32: "u64" U64, a => integer_to_odd(a.into())),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "u64" U64, a => integer_to_odd(a.into())),
    integer_to_half!("f16" F16Bits f16_from_f32: "s64" S64, a => integer_to_odd(a.into())),
    integer_to_half!("bf16" BF16Bits bf16_from_f32: "s64" S64, a => integer_to_odd(a.into())),
    integer_to_wider!("f32" F32 f32: "u8" U8, "s8" S8, "u16" U16, "s16" S16),
    integer_to_f32!(common: "u32" U32, a => a.into()),
    integer_to_f32!(common: "s32" S32, a => a.into()),
    integer_to_f32!(rare: "u64" U64, a => integer_to_odd(a.into())),
    integer_to_f32!(rare: "s64" S64, a => integer_to_odd(a.into())),
    integer_to_wider!("f64" F64 f64: "u8" U8, "s8" S8, "u16" U16, "s16" S16, "u32" U32, "s32" S32),
    integer_to_f64!("u64" U64),
    integer_to_f64!("s64" S64),
    float_to_integer!(rare: "" ".f16" F16: "u8" U8 u8 0, "s8" S8 i8 0, "u16" U16 u16 0, "s16" S16 i16 0),
    float_to_integer!(rare: "" ".f16" F16: "u32" U32 u32 0, "s32" S32 i32 0),
    float_to_integer!(rare: "" ".f16" F16: "u64" U64 u64 1, "s64" S64 i64 1),
    float_to_integer!(rare: "" ".bf16" BF16: "u16" U16 u16 0, "s16" S16 i16 0),
    float_to_integer!(rare: "" ".bf16" BF16: "u32" U32 u32 0, "s32" S32 i32 0),
    float_to_integer!(rare: "" ".bf16" BF16: "u64" U64 u64 1, "s64" S64 i64 1),
    float_to_integer!(rare: "" ".f32" F32: "u8" U8 u8 0, "s8" S8 i8 0, "u16" U16 u16 0, "s16" S16 i16 0),
    float_to_integer!(common: "" ".f32" F32: "u32" U32 u32 0, "s32" S32 i32 0),
    float_to_integer!(rare: "" ".f32" F32: "u64" U64 u64 1, "s64" S64 i64 1),
    float_to_integer!(rare: ".ftz" ".f32" Ftz: "u8" U8 u8 0, "s8" S8 i8 0, "u16" U16 u16 0, "s16" S16 i16 0),
    float_to_integer!(rare: ".ftz" ".f32" Ftz: "u32" U32 u32 0, "s32" S32 i32 0),
    float_to_integer!(rare: ".ftz" ".f32" Ftz: "u64" U64 u64 1, "s64" S64 i64 1),
    float_to_integer!(rare: "" ".f64" F64: "u8" U8 u8 1, "s8" S8 i8 1, "u16" U16 u16 1, "s16" S16 i16 1),
    float_to_integer!(rare: "" ".f64" F64: "u32" U32 u32 1, "s32" S32 i32 1),
    float_to_integer!(rare: "" ".f64" F64: "u64" U64 u64 1, "s64" S64 i64 1),
    integral!(rare: "" ".f16" F16, identity),
    integral!(rare: "" ".bf16" BF16, identity),
    integral!(common: "" ".f32" F32, identity),
    integral!(rare: ".sat" ".f32" F32, saturate),
    integral!(rare: ".ftz" ".f32" Ftz, identity),
    integral!(rare: ".ftz.sat" ".f32" Ftz, saturate),
    integral!(rare: "" ".f64" F64, identity),
    rounded!(common: ".f32.f64": a: F64, round => F32, to_f32(a, round)),
    rounded!(rare: ".ftz.f32.f64": a: F64, round => Ftz, to_f32(a, round)),
    rounded!(rare: ".sat.f32.f64": a: F64, round => F32, saturate(to_f32(a, round))),
    rounded!(rare: ".ftz.sat.f32.f64": a: F64, round => Ftz, saturate(to_f32(a, round))),
    rounded!(common: ".f16.f32": a: F32, round => F16Bits, f16_from_f32(a, round)),
    rounded!(rare: ".ftz.f16.f32": a: Ftz, round => F16Bits, f16_from_f32(a, round)),
    rounded!(rare: ".sat.f16.f32": a: F32, round => F16Bits, f16_from_f32(saturate(a), round)),
    rounded!(rare: ".ftz.sat.f16.f32": a: Ftz, round => F16Bits, f16_from_f32(saturate(a), round)),
    rounded!(rare: ".f16.f64": a: F64, round => F16Bits, f16_from_f32(to_f32_odd(a), round)),
    rounded!(rare: ".sat.f16.f64": a: F64, round => F16Bits, f16_from_f32(saturate(to_f32_odd(a)), round)),
    rounded!(rare: ".bf16.f64": a: F64, round => BF16Bits, bf16_from_f32(to_f32_odd(a), round)),
    rounded!(rare: ".bf16.f16": a: F16, round => BF16Bits, bf16_from_f32(a, round)),
    rounded!(rare: ".f16.bf16": a: BF16, round => F16Bits, f16_from_f32(a, round)),
    from_f32!(common: "rn", Round::Nearest),
    from_f32!(rare: "rz", Round::Zero),
    COMMON,
    OTHERS,
];
