//! Integer arithmetic. Signed and unsigned forms share a row where the bits are the same.

use super::lanes::*;
use super::{Entry, forms};

macro_rules! arithmetic {
    ($kind:ident $n:literal, $U:ident $u:ident $uu:ident, $S:ident $s:ident $ss:ident) => {
        forms! { $kind:
            concat!("add.u", $n), concat!("add.s", $n) => (a: $U, b: $U) -> $U { a.wrapping_add(b) }
            concat!("sub.u", $n), concat!("sub.s", $n) => (a: $U, b: $U) -> $U { a.wrapping_sub(b) }
            concat!("mul.lo.u", $n), concat!("mul.lo.s", $n) => (a: $U, b: $U) -> $U { a.wrapping_mul(b) }
            concat!("mul.hi.u", $n) => (a: $U, b: $U) -> $U { ((a as $uu * b as $uu) >> $u::BITS) as $u }
            concat!("mul.hi.s", $n) => (a: $S, b: $S) -> $S { ((a as $ss * b as $ss) >> $s::BITS) as $s }
            concat!("mad.lo.u", $n), concat!("mad.lo.s", $n) => (a: $U, b: $U, c: $U) -> $U { a.wrapping_mul(b).wrapping_add(c) }
            concat!("mad.hi.u", $n) => (a: $U, b: $U, c: $U) -> $U { (((a as $uu * b as $uu) >> $u::BITS) as $u).wrapping_add(c) }
            concat!("mad.hi.s", $n) => (a: $S, b: $S, c: $S) -> $S { (((a as $ss * b as $ss) >> $s::BITS) as $s).wrapping_add(c) }
            concat!("div.u", $n) => (a: $U, b: $U) -> $U { a.checked_div(b).unwrap_or($u::MAX) }
            concat!("div.s", $n) => (a: $S, b: $S) -> $S { if b == 0 { -1 } else { a.wrapping_div(b) } }
            concat!("rem.u", $n) => (a: $U, b: $U) -> $U { a.checked_rem(b).unwrap_or($u::MAX) }
            concat!("rem.s", $n) => (a: $S, b: $S) -> $S { if b == 0 { -1 } else { a.wrapping_rem(b) } }
            concat!("min.u", $n) => (a: $U, b: $U) -> $U { a.min(b) }
            concat!("min.s", $n) => (a: $S, b: $S) -> $S { a.min(b) }
            concat!("max.u", $n) => (a: $U, b: $U) -> $U { a.max(b) }
            concat!("max.s", $n) => (a: $S, b: $S) -> $S { a.max(b) }
            concat!("abs.s", $n) => (a: $S) -> $S { a.wrapping_abs() }
            concat!("neg.s", $n) => (a: $S) -> $S { a.wrapping_neg() }
            concat!("sad.u", $n) => (a: $U, b: $U, c: $U) -> $U { a.abs_diff(b).wrapping_add(c) }
            concat!("sad.s", $n) => (a: $S, b: $S, c: $S) -> $S { (a.abs_diff(b) as $s).wrapping_add(c) }
        }
    };
}

macro_rules! wide {
    ($kind:ident $n:literal, $U:ident, $S:ident, $W:ident $w:ident, $X:ident $x:ident) => {
        forms! { $kind:
            concat!("mul.wide.u", $n) => (a: $U, b: $U) -> $W { a as $w * b as $w }
            concat!("mul.wide.s", $n) => (a: $S, b: $S) -> $X { a as $x * b as $x }
            concat!("mad.wide.u", $n) => (a: $U, b: $U, c: $W) -> $W { (a as $w * b as $w).wrapping_add(c) }
            concat!("mad.wide.s", $n) => (a: $S, b: $S, c: $X) -> $X { (a as $x * b as $x).wrapping_add(c) }
        }
    };
}

/// The four bytes of a word.
macro_rules! bytes {
    ($word:expr, $byte:ty) => {
        $word.to_le_bytes().map(|b| i32::from(b as $byte))
    };
}

macro_rules! dot {
    ($a:expr, $b:expr, $c:expr) => {{
        let (a, b) = ($a, $b);
        (0..a.len()).fold($c as i32, |sum, i| sum.wrapping_add(a[i] * b[i])) as u32
    }};
}

macro_rules! halfwords {
    ($word:expr, $half:ty) => {
        halves($word).map(|h| i32::from(h as $half))
    };
}

const OTHERS: &[Entry] = forms! { rare:
    "add.sat.s32" => (a: S32, b: S32) -> S32 { a.saturating_add(b) }
    "sub.sat.s32" => (a: S32, b: S32) -> S32 { a.saturating_sub(b) }
    "mad.hi.sat.s32" => (a: S32, b: S32, c: S32) -> S32 { (((i64::from(a) * i64::from(b)) >> 32) as i32).saturating_add(c) }

    "dp4a.u32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(bytes!(a, u8), bytes!(b, u8), c) }
    "dp4a.u32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(bytes!(a, u8), bytes!(b, i8), c) }
    "dp4a.s32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(bytes!(a, i8), bytes!(b, u8), c) }
    "dp4a.s32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(bytes!(a, i8), bytes!(b, i8), c) }
    "dp2a.lo.u32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, u16), bytes!(b, u8), c) }
    "dp2a.lo.u32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, u16), bytes!(b, i8), c) }
    "dp2a.lo.s32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, i16), bytes!(b, u8), c) }
    "dp2a.lo.s32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, i16), bytes!(b, i8), c) }
    "dp2a.hi.u32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, u16), bytes!(b >> 16, u8), c) }
    "dp2a.hi.u32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, u16), bytes!(b >> 16, i8), c) }
    "dp2a.hi.s32.u32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, i16), bytes!(b >> 16, u8), c) }
    "dp2a.hi.s32.s32" => (a: B32, b: B32, c: U32) -> U32 { dot!(halfwords!(a, i16), bytes!(b >> 16, i8), c) }

    // Without a byte mask the third operand of vabsdiff4 takes part only as the start of `.add`'s sum.
    "vabsdiff4.u32.u32.u32" => (a: U32, b: U32, _c: U32) -> U32 { byte_differences(bytes!(a, u8), bytes!(b, u8)) }
    "vabsdiff4.u32.s32.s32" => (a: U32, b: U32, _c: U32) -> U32 { byte_differences(bytes!(a, i8), bytes!(b, i8)) }
    "vabsdiff4.u32.u32.u32.add" => (a: U32, b: U32, c: U32) -> U32 { byte_sum(byte_differences(bytes!(a, u8), bytes!(b, u8)), c) }
    "vabsdiff4.u32.s32.s32.add" => (a: U32, b: U32, c: U32) -> U32 { byte_sum(byte_differences(bytes!(a, i8), bytes!(b, i8)), c) }
};

#[inline(always)]
fn byte_differences(a: [i32; 4], b: [i32; 4]) -> u32 {
    (0..4).fold(0, |word, i| word | a[i].abs_diff(b[i]) << (8 * i))
}

#[inline(always)]
fn byte_sum(word: u32, start: u32) -> u32 {
    word.to_le_bytes().into_iter().fold(start, |sum, b| sum.wrapping_add(b.into()))
}

pub static TABLES: &[&[Entry]] = &[
    arithmetic!(rare "16", U16 u16 u32, S16 i16 i32),
    arithmetic!(common "32", U32 u32 u64, S32 i32 i64),
    arithmetic!(common "64", U64 u64 u128, S64 i64 i128),
    wide!(rare "16", U16, S16, U32 u32, S32 i32),
    wide!(common "32", U32, S32, U64 u64, S64 i64),
    OTHERS,
];
