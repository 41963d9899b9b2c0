//! Conversions against exact values.

use super::float::{decode, encode, flushed, format, rounding};
use super::*;
use crate::num::oracle::{Exact, F64};

fn is_float(ty: &str) -> bool {
    ty.contains('f')
}

/// Range of an integer type.
fn range(ty: &str) -> (i128, i128) {
    let bits: u32 = ty[1..].parse().unwrap();
    if ty.starts_with('s') {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    }
}

fn integer(ty: &str, bits: u64) -> i128 {
    let (low, high) = range(ty);
    let value = i128::from(bits) & (high - low);
    if value > high { value - (high - low + 1) } else { value }
}

/// To an integral number, for what is small enough not to be one anyway.
fn integral(x: f64, parts: &[&str]) -> f64 {
    if x.is_nan() || x.abs() >= 2f64.powi(62) {
        return x;
    }
    let cut = x as i64;
    let rest = x - cut as f64;
    let toward = rest.signum() as i64;
    let step = match parts.iter().find(|p| ["rni", "rzi", "rmi", "rpi"].contains(p)) {
        Some(&"rni") if rest.abs() > 0.5 || rest.abs() == 0.5 && cut % 2 != 0 => toward,
        Some(&"rmi") if rest < 0.0 => -1,
        Some(&"rpi") if rest > 0.0 => 1,
        _ => 0,
    };
    ((cut + step) as f64).copysign(x)
}

fn scalar(parts: &[&str], to: &str, from: &str, bits: u64) -> u64 {
    let has = |flag| parts.contains(&flag);
    let round = rounding(parts);
    let to_format = if to == "f64" {
        F64
    } else if is_float(to) {
        format(to)
    } else {
        F64
    };
    if !is_float(from) {
        let value = integer(from, bits);
        return if is_float(to) {
            encode(to, Exact::integer(value).round(to_format, round))
        } else if has("sat") {
            value.clamp(range(to).0, range(to).1) as u64
        } else {
            value as u64
        };
    }
    let x = decode(from, bits);
    let x = if has("ftz") && from == "f32" { flushed(x) } else { x };
    let whole = parts.iter().any(|p| ["rni", "rzi", "rmi", "rpi"].contains(p));
    if !is_float(to) {
        let (low, high) = range(to);
        let bits: u32 = to[1..].parse().unwrap();
        return if x.is_nan() {
            if from == "f64" || bits == 64 { 1 << (bits - 1) } else { 0 }
        } else {
            (integral(x, parts) as i128).clamp(low, high) as u64
        };
    }
    let x = if whole { integral(x, parts) } else { x };
    let x = if x.is_finite() { Exact::new(x).round(to_format, round) } else { x };
    let x = if has("ftz") && to == "f32" { flushed(x) } else { x };
    encode(
        to,
        match x {
            x if has("sat") => {
                if x > 0.0 {
                    x.min(1.0)
                } else {
                    0.0
                }
            }
            x if has("relu") && x <= 0.0 => 0.0,
            x => x,
        },
    )
}

pub fn model(form: &str, src: &[u64]) -> Option<u64> {
    let parts: Vec<&str> = form.split('.').collect();
    let [.., to, from] = parts[..] else { return None };
    if parts[0] != "cvt" || to == "tf32" {
        return None;
    }
    // The oracle's range ends before f64's.
    if from == "f64"
        && !(1e-130..1e130).contains(&decode(from, src[0]).abs())
        && decode(from, src[0]) != 0.0
        && decode(from, src[0]).is_finite()
    {
        let tiny = decode(from, src[0]).abs() < 1.0;
        let stand_in = if tiny { 1e-129f64 } else { 1e129 }.copysign(decode(from, src[0]));
        if to != "f64" {
            return model(form, &[stand_in.to_bits()]);
        }
    }
    if to == "f64" && from == "f64" {
        let x = decode(from, src[0]);
        let x = integral(x, if parts.len() > 3 { &parts } else { &["rzi"] });
        return Some(encode(
            "f64",
            match &parts[1..parts.len() - 2] {
                [] => decode(from, src[0]),
                ["sat"] => {
                    let x = decode(from, src[0]);
                    if x > 0.0 { x.min(1.0) } else { 0.0 }
                }
                _ => x,
            },
        ));
    }
    Some(match to.strip_suffix("x2") {
        Some(to) => scalar(&parts, to, from, src[0]) << 16 | scalar(&parts, to, from, *src.get(1)?),
        None => scalar(&parts, to, from, src[0]),
    })
}

#[test]
fn conversions() {
    check(40, model);
}

#[test]
fn edges() {
    let f = |x: f32| u64::from(x.to_bits());
    let d = |x: f64| x.to_bits();
    for (form, a, want) in [
        ("cvt.rni.s32.f32", f(2.5), 2),
        ("cvt.rni.s32.f32", f(3.5), 4),
        ("cvt.rni.s32.f32", f(-0.5), 0),
        ("cvt.rzi.s32.f32", f(-2.9), 0xffff_fffe),
        ("cvt.rmi.s32.f32", f(-2.1), 0xffff_fffd),
        ("cvt.rpi.s32.f32", f(2.1), 3),
        ("cvt.rzi.s32.f32", f(3e9), 0x7fff_ffff),
        ("cvt.rzi.s32.f32", f(f32::NEG_INFINITY), 0x8000_0000),
        ("cvt.rzi.u32.f32", f(-1.0), 0),
        ("cvt.rzi.u8.f32", f(300.0), 255),
        ("cvt.rzi.s32.f32", f(f32::NAN), 0),
        ("cvt.rzi.s64.f32", f(f32::NAN), 1 << 63),
        ("cvt.rzi.u64.f32", f(f32::NAN), 1 << 63),
        ("cvt.rzi.s32.f64", d(f64::NAN), 1 << 31),
        ("cvt.rzi.u16.f64", d(f64::NAN), 1 << 15),
        ("cvt.rni.f32.f32", f(-0.25), f(-0.0)),
        ("cvt.rni.f32.f32", f(0.5), 0),
        ("cvt.rpi.ftz.s32.f32", 1, 0),
        ("cvt.rpi.s32.f32", 1, 1),
        ("cvt.sat.f32.f32", f(-3.0), 0),
        ("cvt.sat.f32.f32", f(f32::NAN), 0),
        ("cvt.rn.f16.f32", f(65519.0), 0x7bff),
        ("cvt.rn.f16.f32", f(65520.0), 0x7c00),
        ("cvt.rz.f16.f32", f(1e6), 0x7bff),
        ("cvt.rn.f16.f32", f(f32::NAN), 0x7fff),
        ("cvt.rn.f16.f32", f(2f32.powi(-25)), 0),
        ("cvt.rp.f16.f32", f(2f32.powi(-30)), 1),
        ("cvt.rn.bf16.f32", 0x3f80_8000, 0x3f80),
        ("cvt.rn.bf16.f32", 0x3f81_8000, 0x3f82),
        ("cvt.rn.relu.bf16.f32", f(-2.0), 0),
        ("cvt.f32.f16", 0x0001, f(2f32.powi(-24))),
        ("cvt.f32.bf16", 0xff80, f(f32::NEG_INFINITY)),
        ("cvt.rn.f32.u64", u64::MAX, f(1.8446744e19)),
        ("cvt.rz.f32.s64", i64::MAX as u64, f(9.223_371_5e18)),
        ("cvt.s64.s32", 0xffff_fffe, u64::MAX - 1),
        ("cvt.u64.u32", 0xffff_fffe, 0xffff_fffe),
        ("cvt.sat.s8.s32", 1000, 127),
        ("cvt.sat.u32.s32", 0xffff_ffff, 0),
        ("cvt.rna.tf32.f32", 0x3f80_1000, 0x3f80_2000),
        ("cvt.rna.tf32.f32", 0x3f80_0fff, 0x3f80_0000),
    ] {
        assert_eq!(one(form, [a]), want, "{form} {a:x}");
    }
    assert_eq!(
        one("cvt.rn.f16x2.f32", [f(1.0), f(2.0)]),
        0x3c00_4000,
        "the first operand is the upper half"
    );
}

/// Into a wider register: as the type extends.
#[test]
fn narrow_results_fill_the_row() {
    for (form, want) in [
        ("cvt.s8.s32", 0xffff_ff80),
        ("cvt.u8.u32", 0x80),
        ("cvt.s16.s8", 0xffff_ff80),
        ("cvt.u16.u8", 0x80),
    ] {
        let mut r = registers();
        set(&mut r, Ty::U32, 2, &[0x0000_0080; 32]);
        Alu::parse(form).unwrap().run(&mut r, !0, 0, [2, 0, 0, 0], &Env::default());
        assert_eq!(r.rows[0].0, [want; 32], "{form}");
    }
}
