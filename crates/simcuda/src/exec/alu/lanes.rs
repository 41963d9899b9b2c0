//! From rows of registers to values of lanes and back.
//!
//! The types are named as PTX names them. Those of arithmetic carry its rules: an `F32` result has the canonical NaN,
//! an `F16` is computed on as the f32 it equals and rounded to nearest on the way back, an `Ftz` loses its subnormals
//! both ways. The `…Bits` types are the same operands untouched.

use super::Ty;
use crate::exec::registers::{Registers, Row, Slot};
use crate::num::half::{bf16_from_f32, bf16_to_f32, f16_from_f32, f16_to_f32};
use crate::num::round::{Round, flush};

/// An operand type.
pub trait Lane {
    const TY: Ty;
    /// What one lane computes with.
    type Value: Copy;
    /// What one lane stores.
    type Bits: Copy + Default;
    /// What the warp holds.
    type Rows<'r>: Copy;
    fn rows(r: &Registers, slot: Slot) -> Self::Rows<'_>;
    fn at(rows: Self::Rows<'_>, lane: usize) -> Self::Value;
    fn bits(value: Self::Value, lane: usize) -> Self::Bits;
    /// The lanes in `mask`.
    fn write(r: &mut Registers, slot: Slot, mask: u32, out: &[Self::Bits; 32]);
}

/// Two rows as 32 lanes of 64 bits.
#[inline(always)]
pub fn wide(r: &Registers, slot: Slot) -> &[u64; 32] {
    let rows: &[Row] = &r.rows[slot as usize..slot as usize + 2];
    // SAFETY: two rows in sequence are 256 bytes without padding, aligned to 64, and any bits are valid as u64. The
    // result borrows what `rows` borrows.
    unsafe { &*rows.as_ptr().cast() }
}

/// [`wide`], to write.
#[inline(always)]
pub fn wide_mut(r: &mut Registers, slot: Slot) -> &mut [u64; 32] {
    let rows: &mut [Row] = &mut r.rows[slot as usize..slot as usize + 2];
    // SAFETY: as in `wide`; the mutable borrow is handed on.
    unsafe { &mut *rows.as_mut_ptr().cast() }
}

#[inline(always)]
fn narrow(r: &Registers, slot: Slot) -> &[u32; 32] {
    &r.rows[slot as usize].0
}

#[inline(always)]
fn narrow_mut(r: &mut Registers, slot: Slot) -> &mut [u32; 32] {
    &mut r.rows[slot as usize].0
}

/// The lanes in `mask` from `out`. Not inlined: forms compute in a thousand ways, but store in two.
macro_rules! blend {
    ($name:ident $bits:ty) => {
        #[inline(never)]
        fn $name(row: &mut [$bits; 32], mask: u32, out: &[$bits; 32]) {
            if mask == !0 {
                *row = *out;
            } else {
                for (lane, bits) in row.iter_mut().enumerate() {
                    let keep: $bits = if mask & 1 << lane == 0 { !0 } else { 0 };
                    *bits = *bits & keep | out[lane] & !keep;
                }
            }
        }
    };
}
blend!(blend_narrow u32);
blend!(blend_wide u64);

macro_rules! lane {
    ($rows:ident, $rows_mut:ident, $blend:ident, $bits:ty: $(
        $name:ident = $ty:ident: $value:ty, $b:ident => $from:expr, $v:ident => $to:expr;
    )*) => {$(
        pub struct $name;
        impl Lane for $name {
            const TY: Ty = Ty::$ty;
            type Value = $value;
            type Bits = $bits;
            type Rows<'r> = &'r [$bits; 32];
            #[inline(always)]
            fn rows(r: &Registers, slot: Slot) -> &[$bits; 32] {
                $rows(r, slot)
            }
            #[inline(always)]
            fn at(rows: &[$bits; 32], lane: usize) -> $value {
                let $b = rows[lane];
                $from
            }
            #[inline(always)]
            fn bits($v: $value, _: usize) -> $bits {
                $to
            }
            #[inline(always)]
            fn write(r: &mut Registers, slot: Slot, mask: u32, out: &[$bits; 32]) {
                $blend($rows_mut(r, slot), mask, out);
            }
        }
    )*};
}

// Narrow integers are stored as their type extends to 32 bits: `cvt` may have a wider destination.
lane! { narrow, narrow_mut, blend_narrow, u32:
    U8 = U8: u8, b => b as u8, v => v.into();
    S8 = S8: i8, b => b as i8, v => v as u32;
    B16 = B16: u16, b => b as u16, v => v.into();
    U16 = U16: u16, b => b as u16, v => v.into();
    S16 = S16: i16, b => b as i16, v => v as u32;
    F16 = F16: f32, b => f16_to_f32(b as u16), v => f16_from_f32(v, Round::Nearest).into();
    F16Bits = F16: u16, b => b as u16, v => v.into();
    BF16 = BF16: f32, b => bf16_to_f32(b as u16), v => bf16_from_f32(v, Round::Nearest).into();
    BF16Bits = BF16: u16, b => b as u16, v => v.into();
    B32 = B32: u32, b => b, v => v;
    U32 = U32: u32, b => b, v => v;
    S32 = S32: i32, b => b as i32, v => v as u32;
    F32 = F32: f32, b => f32::from_bits(b), v => canonical(v);
    Ftz = F32: f32, b => flush(f32::from_bits(b)), v => canonical(flush(v));
    F32Bits = F32: u32, b => b, v => v;
    F16x2 = F16x2: [f32; 2], b => halves(b).map(f16_to_f32), v => pack(v.map(|v| f16_from_f32(v, Round::Nearest)));
    F16x2Bits = F16x2: u32, b => b, v => v;
    BF16x2 = BF16x2: [f32; 2], b => halves(b).map(bf16_to_f32), v => pack(v.map(|v| bf16_from_f32(v, Round::Nearest)));
    BF16x2Bits = BF16x2: u32, b => b, v => v;
}

lane! { wide, wide_mut, blend_wide, u64:
    B64 = B64: u64, b => b, v => v;
    U64 = U64: u64, b => b, v => v;
    S64 = S64: i64, b => b as i64, v => v as u64;
    F64 = F64: f64, b => f64::from_bits(b), v => if v.is_nan() { 0xfff8_0000_0000_0000 } else { v.to_bits() };
    F64Bits = F64: u64, b => b, v => v;
}

#[inline(always)]
fn canonical(v: f32) -> u32 {
    if v.is_nan() { 0x7fff_ffff } else { v.to_bits() }
}

/// The low and the high half.
#[inline(always)]
pub fn halves(bits: u32) -> [u16; 2] {
    [bits as u16, (bits >> 16) as u16]
}

/// The inverse of [`halves`].
#[inline(always)]
pub fn pack([low, high]: [u16; 2]) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// A predicate: the warp's is a mask of lanes.
pub struct Pred;

impl Lane for Pred {
    const TY: Ty = Ty::Pred;
    type Value = bool;
    type Bits = u32;
    type Rows<'r> = u32;
    #[inline(always)]
    fn rows(r: &Registers, slot: Slot) -> u32 {
        r.predicates[slot as usize]
    }
    #[inline(always)]
    fn at(rows: u32, lane: usize) -> bool {
        rows >> lane & 1 != 0
    }
    #[inline(always)]
    fn bits(value: bool, lane: usize) -> u32 {
        u32::from(value) << lane
    }
    #[inline(always)]
    fn write(r: &mut Registers, slot: Slot, mask: u32, out: &[u32; 32]) {
        let bits = out.iter().fold(0, |all, bit| all | bit);
        let predicate = &mut r.predicates[slot as usize];
        *predicate = *predicate & !mask | bits & mask;
    }
}

/// Up to four operands.
pub trait Sources {
    const TYPES: &'static [Ty];
    type Values;
    type Rows<'r>: Copy;
    fn rows(r: &Registers, src: [Slot; 4]) -> Self::Rows<'_>;
    fn at(rows: Self::Rows<'_>, lane: usize) -> Self::Values;
}

macro_rules! sources {
    ($($lane:ident $rows:ident $i:tt),+) => {
        impl<$($lane: Lane),+> Sources for ($($lane,)+) {
            const TYPES: &'static [Ty] = &[$($lane::TY),+];
            type Values = ($($lane::Value,)+);
            type Rows<'r> = ($($lane::Rows<'r>,)+);
            #[inline(always)]
            fn rows(r: &Registers, src: [Slot; 4]) -> Self::Rows<'_> {
                ($($lane::rows(r, src[$i]),)+)
            }
            #[inline(always)]
            fn at(($($rows,)+): Self::Rows<'_>, lane: usize) -> Self::Values {
                ($($lane::at($rows, lane),)+)
            }
        }
    };
}
sources!(A a 0);
sources!(A a 0, B b 1);
sources!(A a 0, B b 1, C c 2);
sources!(A a 0, B b 1, C c 2, D d 3);
