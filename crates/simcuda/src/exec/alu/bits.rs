//! Logic, shifts and bit fields.

use super::lanes::*;
use super::{Entry, forms};

macro_rules! logic {
    ($kind:ident $n:literal, $B:ident $b:ident, $S:ident) => {
        forms! { $kind:
            concat!("and.b", $n) => (a: $B, b: $B) -> $B { a & b }
            concat!("or.b", $n) => (a: $B, b: $B) -> $B { a | b }
            concat!("xor.b", $n) => (a: $B, b: $B) -> $B { a ^ b }
            concat!("not.b", $n) => (a: $B) -> $B { !a }
            concat!("cnot.b", $n) => (a: $B) -> $B { (a == 0) as $b }
            // Amounts above the width act as the width.
            concat!("shl.b", $n) => (a: $B, b: U32) -> $B { if b < $b::BITS { a << b } else { 0 } }
            concat!("shr.b", $n), concat!("shr.u", $n) => (a: $B, b: U32) -> $B { if b < $b::BITS { a >> b } else { 0 } }
            concat!("shr.s", $n) => (a: $S, b: U32) -> $S { a >> b.min($b::BITS - 1) }
        }
    };
}

macro_rules! fields {
    ($kind:ident $n:literal, $B:ident, $U:ident $u:ident, $S:ident $s:ident) => {
        forms! { $kind:
            concat!("popc.b", $n) => (a: $B) -> U32 { a.count_ones() }
            concat!("clz.b", $n) => (a: $B) -> U32 { a.leading_zeros() }
            concat!("brev.b", $n) => (a: $B) -> $B { a.reverse_bits() }
            concat!("bfind.u", $n) => (a: $U) -> U32 { if a == 0 { !0 } else { $u::BITS - 1 - a.leading_zeros() } }
            concat!("bfind.shiftamt.u", $n) => (a: $U) -> U32 { if a == 0 { !0 } else { a.leading_zeros() } }
            concat!("bfind.s", $n) => (a: $S) -> U32 {
                let a = a ^ a >> ($s::BITS - 1);
                if a == 0 { !0 } else { $s::BITS - 1 - a.leading_zeros() }
            }
            concat!("bfind.shiftamt.s", $n) => (a: $S) -> U32 {
                let a = a ^ a >> ($s::BITS - 1);
                if a == 0 { !0 } else { a.leading_zeros() }
            }
            concat!("bfe.u", $n) => (a: $U, pos: U32, len: U32) -> $U {
                let (pos, len) = (pos & 255, len & 255);
                let field = if pos < $u::BITS { a >> pos } else { 0 };
                if len < $u::BITS { field & !(!0 << len) } else { field }
            }
            concat!("bfe.s", $n) => (a: $S, pos: U32, len: U32) -> $S {
                // Past the top, a shift has already put copies of the sign there.
                let (pos, len) = ((pos & 255).min($s::BITS - 1), len & 255);
                let field = a >> pos;
                let above = $s::BITS.saturating_sub(len);
                if len == 0 { 0 } else { field << above >> above }
            }
            concat!("bfi.b", $n) => (a: $B, b: $B, pos: U32, len: U32) -> $B {
                let (pos, len) = (pos & 255, len & 255);
                let field: $u = if len < $u::BITS { !(!0 << len) } else { !0 };
                if pos < $u::BITS { b & !(field << pos) | (a & field) << pos } else { b }
            }
        }
    };
}

const COMMON: &[Entry] = forms! { common:
    "and.pred" => (a: Pred, b: Pred) -> Pred { a & b }
    "or.pred" => (a: Pred, b: Pred) -> Pred { a | b }
    "xor.pred" => (a: Pred, b: Pred) -> Pred { a ^ b }
    "not.pred" => (a: Pred) -> Pred { !a }

    "lop3.b32" => (a: B32, b: B32, c: B32, table: U32) -> B32 {
        // One term for each combination of input bits that the table maps to 1.
        (0..8).fold(0, |result, i| {
            let term = (if i & 4 != 0 { a } else { !a }) & (if i & 2 != 0 { b } else { !b }) & (if i & 1 != 0 { c } else { !c });
            result | term & 0u32.wrapping_sub(table >> i & 1)
        })
    }

    "shf.l.wrap.b32" => (a: B32, b: B32, c: U32) -> B32 { (pair(a, b) << (c & 31) >> 32) as u32 }
    "shf.l.clamp.b32" => (a: B32, b: B32, c: U32) -> B32 { (pair(a, b) << c.min(32) >> 32) as u32 }
    "shf.r.wrap.b32" => (a: B32, b: B32, c: U32) -> B32 { (pair(a, b) >> (c & 31)) as u32 }
    "shf.r.clamp.b32" => (a: B32, b: B32, c: U32) -> B32 { (pair(a, b) >> c.min(32)) as u32 }

    "prmt.b32" => (a: B32, b: B32, c: B32) -> B32 {
        select(a, b, |i| c >> (4 * i) & 7, |i| c >> (4 * i) & 8 != 0)
    }
};

const RARE: &[Entry] = forms! { rare:
    "prmt.b32.f4e" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |i| (c & 3) + i, |_| false) }
    "prmt.b32.b4e" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |i| (c & 3).wrapping_sub(i) & 7, |_| false) }
    "prmt.b32.rc8" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |_| c & 3, |_| false) }
    "prmt.b32.ecl" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |i| (c & 3).max(i), |_| false) }
    "prmt.b32.ecr" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |i| (c & 3).min(i), |_| false) }
    "prmt.b32.rc16" => (a: B32, b: B32, c: B32) -> B32 { select(a, b, |i| (c & 1) * 2 + (i & 1), |_| false) }

    "fns.b32" => (mask: B32, base: B32, offset: S32) -> B32 { nth_set(mask, base, offset) }

    "bmsk.clamp.b32" => (pos: B32, len: B32) -> B32 {
        let field = if len < 32 { !(!0 << len) } else { !0 };
        if pos < 32 { field << pos } else { 0 }
    }
    "bmsk.wrap.b32" => (pos: B32, len: B32) -> B32 { !(!0u32 << (len & 31)) << (pos & 31) }
    "szext.clamp.u32" => (a: U32, n: U32) -> U32 { if n < 32 { a & !(!0 << n) } else { a } }
    "szext.wrap.u32" => (a: U32, n: U32) -> U32 { a & !(!0 << (n & 31)) }
    "szext.clamp.s32" => (a: S32, n: U32) -> S32 { sign_extend(a, n.min(32)) }
    "szext.wrap.s32" => (a: S32, n: U32) -> S32 { sign_extend(a, n & 31) }
};

#[inline(always)]
fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// A word of bytes `byte(i)` of the pair, or of copies of their sign.
#[inline(always)]
fn select(a: u32, b: u32, byte: impl Fn(u32) -> u32, sign: impl Fn(u32) -> bool) -> u32 {
    (0..4).fold(0, |word, i| {
        let byte = (pair(a, b) >> (8 * byte(i))) as u8;
        let byte = if sign(i) { (byte as i8 >> 7) as u8 } else { byte };
        word | u32::from(byte) << (8 * i)
    })
}

#[inline(always)]
fn sign_extend(a: i32, n: u32) -> i32 {
    if n == 0 { 0 } else { a << (32 - n) >> (32 - n) }
}

/// The position of the `offset`-th set bit from `base` on, downwards if negative.
#[inline(always)]
fn nth_set(mask: u32, base: u32, offset: i32) -> u32 {
    // What a base above 31 finds is undefined: nothing.
    let candidates = match offset {
        _ if base > 31 => 0,
        0 => mask & 1 << base,
        1.. => mask & !0 << base,
        _ => mask & !0 >> (31 - base),
    };
    let mut rest = if offset < 0 { candidates.reverse_bits() } else { candidates };
    let skip = offset.unsigned_abs().saturating_sub(1).min(32);
    for _ in 0..skip {
        rest &= rest.wrapping_sub(1);
    }
    match (rest, offset < 0) {
        (0, _) => !0,
        (_, false) => rest.trailing_zeros(),
        (_, true) => 31 - rest.trailing_zeros(),
    }
}

pub static TABLES: &[&[Entry]] = &[
    logic!(rare "16", B16 u16, S16),
    logic!(common "32", B32 u32, S32),
    logic!(common "64", B64 u64, S64),
    fields!(common "32", B32, U32 u32, S32 i32),
    fields!(rare "64", B64, U64 u64, S64 i64),
    COMMON,
    RARE,
];
