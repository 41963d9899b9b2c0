//! Comparisons, selections and moves.

use super::*;
use crate::num::half::{bf16_to_f32, f16_to_f32};
use std::cmp::Ordering::{self, Equal, Greater, Less};

/// What an operand compares as.
fn value(ty: &str, bits: u64) -> (Option<i128>, f64) {
    let float = |x: f64| (None, x);
    let flush = |x: f64| if x.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { x };
    match ty {
        "f16" => float(f16_to_f32(bits as u16).into()),
        "bf16" => float(bf16_to_f32(bits as u16).into()),
        "f32" => float(f32::from_bits(bits as u32).into()),
        "ftz" => float(flush(f32::from_bits(bits as u32).into())),
        "f64" => float(f64::from_bits(bits)),
        "s16" => (Some((bits as i16).into()), 0.0),
        "s32" => (Some((bits as i32).into()), 0.0),
        "s64" => (Some((bits as i64).into()), 0.0),
        _ => (Some(bits.into()), 0.0),
    }
}

fn holds(cmp: &str, ty: &str, a: u64, b: u64) -> Option<bool> {
    let ((a, x), (b, y)) = (value(ty, a), value(ty, b));
    let order: Option<Ordering> = if a.is_some() { a.partial_cmp(&b) } else { x.partial_cmp(&y) };
    let (name, unordered) = match cmp.strip_suffix('u') {
        Some(name) if !name.is_empty() => (name, true),
        _ => (cmp, false),
    };
    let in_order = |orders: &[Ordering]| order.map_or(unordered, |o| orders.contains(&o));
    Some(match name {
        "eq" => in_order(&[Equal]),
        "ne" => in_order(&[Less, Greater]),
        "lt" | "lo" => in_order(&[Less]),
        "le" | "ls" => in_order(&[Less, Equal]),
        "gt" | "hi" => in_order(&[Greater]),
        "ge" | "hs" => in_order(&[Greater, Equal]),
        "num" => order.is_some(),
        "nan" => order.is_none(),
        _ => return None,
    })
}

pub fn model(form: &str, src: &[u64]) -> Option<u64> {
    let parts: Vec<&str> = form.split('.').collect();
    let ftz = parts.contains(&"ftz");
    let ty = if ftz { "ftz" } else { parts[parts.len() - 1] };
    match parts[0] {
        "setp" => holds(parts[1], ty, src[0], src[1]).map(u64::from),
        "set" => {
            let one = match parts[parts.len() - 2] {
                "f32" => 0x3f80_0000,
                "f16" | "f16x2" => 0x3c00,
                "bf16" | "bf16x2" => 0x3f80,
                _ if ty.ends_with("x2") => 0xffff,
                _ => 0xffff_ffff,
            };
            match ty.strip_suffix("x2") {
                None => Some(if holds(parts[1], ty, src[0], src[1])? { one } else { 0 }),
                Some(ty) => {
                    let half = |shift: u32| {
                        holds(parts[1], ty, src[0] >> shift & 0xffff, src[1] >> shift & 0xffff)
                    };
                    Some((if half(0)? { one } else { 0 }) | (if half(16)? { one << 16 } else { 0 }))
                }
            }
        }
        "mov" => Some(src[0]),
        "selp" => Some(src[if src[2] == 1 { 0 } else { 1 }]),
        "slct" => Some(src[if holds("ge", ty, src[2], 0)? { 0 } else { 1 }]),
        "copysign" => {
            let sign = if ty == "f32" { 1 << 31 } else { 1 << 63 };
            Some(src[0] & sign | src[1] & !sign)
        }
        "testp" => {
            let (x, smallest) = (
                value(ty, src[0]).1.abs(),
                if ty == "f32" { f64::from(f32::MIN_POSITIVE) } else { f64::MIN_POSITIVE },
            );
            Some(u64::from(match parts[1] {
                "finite" => x < f64::INFINITY,
                "infinite" => x == f64::INFINITY,
                "number" => x >= 0.0,
                "notanumber" => x.is_nan(),
                "normal" => x == 0.0 || (smallest..f64::INFINITY).contains(&x),
                _ => x > 0.0 && x < smallest,
            }))
        }
        "and" | "or" | "xor" | "not" if ty == "pred" => Some(match parts[0] {
            "and" => src[0] & src[1],
            "or" => src[0] | src[1],
            "xor" => src[0] ^ src[1],
            _ => src[0] ^ 1,
        }),
        _ => None,
    }
}

#[test]
fn comparisons_selections_and_moves() {
    check(25, model);
}

#[test]
fn nan_and_signed_zero() {
    let (nan, zero, minus_zero) = (u64::from(f32::NAN.to_bits()), 0, 1 << 31);
    for (cmp, with_nan, of_zeros) in [
        ("eq", 0, 1),
        ("ne", 0, 0),
        ("lt", 0, 0),
        ("le", 0, 1),
        ("gt", 0, 0),
        ("ge", 0, 1),
        ("equ", 1, 1),
        ("neu", 1, 0),
        ("ltu", 1, 0),
        ("leu", 1, 1),
        ("gtu", 1, 0),
        ("geu", 1, 1),
        ("num", 0, 1),
        ("nan", 1, 0),
    ] {
        let form = format!("setp.{cmp}.f32");
        assert_eq!([one(&form, [nan, zero]), one(&form, [zero, nan])], [with_nan; 2], "{cmp}");
        assert_eq!(one(&form, [zero, minus_zero]), of_zeros, "{cmp}");
    }
    // Moves and selections keep a signalling NaN's bits.
    for form in ["mov.f32", "mov.b32"] {
        assert_eq!(one(form, [0x7f80_0001]), 0x7f80_0001);
    }
    assert_eq!(one("selp.f64", [0x7ff0_0000_0000_0001, 0, 1]), 0x7ff0_0000_0000_0001);
}
