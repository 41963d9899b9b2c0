//! Floating-point arithmetic against exact values, rounded once.

use super::*;
use crate::num::half::{bf16_from_f32, bf16_to_f32, f16_from_f32, f16_to_f32};
use crate::num::oracle::{BF16, Exact, F16, F32, Format};
use crate::num::round::{self, Round};

/// An operand's value.
pub fn decode(ty: &str, bits: u64) -> f64 {
    match ty {
        "f16" => f16_to_f32(bits as u16).into(),
        "bf16" => bf16_to_f32(bits as u16).into(),
        "f32" => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(bits),
    }
}

/// A value that the type holds, or NaN.
pub fn encode(ty: &str, value: f64) -> u64 {
    match (ty, value.is_nan()) {
        ("f16" | "bf16", true) => 0x7fff,
        ("f32", true) => 0x7fff_ffff,
        (_, true) => 0xfff8_0000_0000_0000,
        ("f16", _) => f16_from_f32(value as f32, Round::Nearest).into(),
        ("bf16", _) => bf16_from_f32(value as f32, Round::Nearest).into(),
        ("f32", _) => (value as f32).to_bits().into(),
        _ => value.to_bits(),
    }
}

pub fn format(ty: &str) -> Format {
    match ty {
        "f16" => F16,
        "bf16" => BF16,
        _ => F32,
    }
}

pub fn rounding(parts: &[&str]) -> Round {
    [("rz", Round::Zero), ("rm", Round::Down), ("rp", Round::Up)]
        .into_iter()
        .find(|(name, _)| parts.contains(name))
        .map_or(Round::Nearest, |(_, round)| round)
}

pub fn flushed(x: f64) -> f64 {
    if x.abs() < f64::from(f32::MIN_POSITIVE) { 0f64.copysign(x) } else { x }
}

/// a * b + c, where a missing c is the zero that changes nothing.
fn fused(ty: &str, a: f64, b: f64, c: Option<f64>, round: Round) -> f64 {
    let product_negative = a.is_sign_negative() != b.is_sign_negative();
    let c = c.unwrap_or(if product_negative { -0.0 } else { 0.0 });
    if ty == "f64" {
        return a.mul_add(b, c);
    }
    if !(a * b + c).is_finite() {
        return a * b + c;
    }
    let sum = Exact::product(a, b).add(&Exact::new(c));
    match (sum.is_zero(), product_negative == c.is_sign_negative()) {
        (false, _) => sum.round(format(ty), round),
        (true, true) => c * 0.0,
        (true, false) => {
            if round == Round::Down {
                -0.0
            } else {
                0.0
            }
        }
    }
}

fn scalar(parts: &[&str], ty: &str, src: &[u64]) -> Option<u64> {
    let has = |flag| parts.contains(&flag);
    if has("approx") || has("full") {
        return None;
    }
    let round = rounding(parts);
    let sign = match ty {
        "f32" => 1 << 31,
        "f64" => 1 << 63,
        _ => 1 << 15,
    };
    let x: Vec<f64> = src
        .iter()
        .map(|bits| decode(ty, *bits))
        .map(|x| if has("ftz") { flushed(x) } else { x })
        .collect();
    let (a, b, c) = (x[0], x.get(1).copied().unwrap_or(0.0), x.get(2).copied().unwrap_or(0.0));
    let double = ty == "f64";
    let (single_a, single_b) = (a as f32, b as f32);
    let value = match parts[0] {
        "add" => fused(ty, a, 1.0, Some(b), round),
        "sub" => fused(ty, a, 1.0, Some(-b), round),
        "mul" => fused(ty, a, b, None, round),
        "fma" | "mad" => fused(ty, a, b, Some(c), round),
        "div" => {
            if double {
                a / b
            } else {
                round::div(single_a, single_b, round).into()
            }
        }
        "rcp" => {
            if double {
                1.0 / a
            } else {
                round::div(1.0, single_a, round).into()
            }
        }
        "sqrt" => {
            if double {
                a.sqrt()
            } else {
                round::sqrt(single_a, round).into()
            }
        }
        "min" | "max" => {
            let (p, q) = if has("xorsign") { (a.abs(), b.abs()) } else { (a, b) };
            let order = p.total_cmp(&q);
            let first = if parts[0] == "min" { order.is_le() } else { order.is_ge() };
            let chosen = match (p.is_nan(), q.is_nan()) {
                (true, true) => f64::NAN,
                (true, false) | (false, true) if has("NaN") => f64::NAN,
                (true, false) => q,
                (false, true) => p,
                _ => {
                    if first {
                        p
                    } else {
                        q
                    }
                }
            };
            let negative = a.is_sign_negative() != b.is_sign_negative();
            if has("xorsign") && negative && !chosen.is_nan() { -chosen } else { chosen }
        }
        // Of a NaN, too, the sign alone changes.
        "neg" if !has("ftz") => return Some(src[0] ^ sign),
        "abs" if !has("ftz") => return Some(src[0] & !sign),
        "neg" => -a,
        "abs" => a.abs(),
        _ => return None,
    };
    let value = if has("ftz") { flushed(value) } else { value };
    Some(encode(
        ty,
        match value {
            v if has("sat") => {
                if v > 0.0 {
                    v.min(1.0)
                } else {
                    0.0
                }
            }
            v if has("relu") && v <= 0.0 => 0.0,
            v => v,
        },
    ))
}

pub fn model(form: &str, src: &[u64]) -> Option<u64> {
    let parts: Vec<&str> = form.split('.').collect();
    match parts[parts.len() - 1] {
        ty @ ("f16" | "bf16" | "f32" | "f64") => scalar(&parts, ty, src),
        ty @ ("f16x2" | "bf16x2") => {
            let half = |shift: u32| {
                let src: Vec<u64> = src.iter().map(|s| s >> shift & 0xffff).collect();
                scalar(&parts, &ty[..ty.len() - 2], &src)
            };
            Some(half(0)? | half(16)? << 16)
        }
        _ => None,
    }
}

#[test]
fn arithmetic() {
    check(40, model);
}

/// Sums of products that cancel, or end next to a midpoint.
#[test]
fn fused_where_it_matters() {
    let mut random = Random(3);
    for (ty, bits) in [("f16", 16u32), ("bf16", 16), ("f32", 32)] {
        for rnd in ["rn", "rz", "rm", "rp"] {
            let form = format!("fma.{rnd}.{ty}");
            if Alu::parse(&form).is_none() {
                continue;
            }
            for _ in 0..200 {
                let mut any =
                    || -> Bits { std::array::from_fn(|_| random.next() & (!0 >> (64 - bits))) };
                let (a, b, noise) = (any(), any(), any());
                let c = std::array::from_fn(|lane| {
                    let product = decode(ty, a[lane]) * decode(ty, b[lane]);
                    let near = encode(
                        ty,
                        if product.is_nan() {
                            1.0
                        } else {
                            Exact::new(if product.is_finite() { product } else { 1.0 })
                                .round(format(ty), Round::Zero)
                        },
                    );
                    (near ^ noise[lane] & 3)
                        ^ if noise[lane] & 4 == 0 { 1 << (bits - 1) } else { 0 }
                });
                let got = run(&form, &[a, b, c]);
                for lane in 0..32 {
                    let src = [a[lane], b[lane], c[lane]];
                    assert_eq!(Some(got[lane]), model(&form, &src), "{form} {src:x?}");
                }
            }
        }
    }
}

/// A product half-way between two f16, and the smallest thing that decides; f32 would lose it.
#[test]
fn the_least_addend_decides() {
    let (a, b) = (0x3e00, 0x3956); // 3 / 2 * 683 / 1024 = 1 + 2^-11
    assert_eq!(
        [0x0001, 0x0000, 0x8001].map(|c| one("fma.rn.f16", [a, b, c])),
        [0x3c01, 0x3c00, 0x3c00]
    );
    let (a, b) = (0x40e0, 0x3e14); // 7 * 37 / 256 = 1 + 3 * 2^-8
    assert_eq!(
        [0x0001, 0x0000, 0x8001].map(|c| one("fma.rn.bf16", [a, b, c])),
        [0x3f82, 0x3f82, 0x3f81]
    );
}

#[test]
fn nan_zero_and_saturation() {
    let f = |x: f32| u64::from(x.to_bits());
    let nan = 0x7fff_ffff;
    for (form, a, b, want) in [
        ("add.f32", f(f32::INFINITY), f(f32::NEG_INFINITY), nan),
        ("add.f32", 0xffc0_1234, f(1.0), nan),
        ("add.rm.f32", f(1.0), f(-1.0), f(-0.0)),
        ("add.rp.f32", f(1.0), f(-1.0), 0),
        ("add.rm.f32", 0, 0, 0),
        ("mul.rz.f32", f(f32::MAX), f(2.0), f(f32::MAX)),
        ("mul.rp.f32", f(f32::MAX), f(2.0), f(f32::INFINITY)),
        ("mul.rp.f32", f(f32::MIN_POSITIVE), f(f32::MIN_POSITIVE), 1),
        ("mul.ftz.f32", f(f32::MIN_POSITIVE), f(-0.5), f(-0.0)),
        ("add.sat.f32", f(0.75), f(0.5), f(1.0)),
        ("add.sat.f32", nan, f(0.5), 0),
        ("min.f32", nan, f(2.0), f(2.0)),
        ("max.f32", f(2.0), nan, f(2.0)),
        ("min.f32", nan, 0xffff_ffff, nan),
        ("min.NaN.f32", nan, f(2.0), nan),
        ("min.f32", 0, f(-0.0), f(-0.0)),
        ("max.f32", f(-0.0), 0, 0),
        ("min.xorsign.abs.f32", f(-2.0), f(3.0), f(-2.0)),
        ("max.f16x2", 0x7e00_8000, 0x3c00_0000, 0x3c00_0000),
        ("min.NaN.bf16x2", 0x7fc0_8000, 0x3f80_0000, 0x7fff_8000),
        ("div.rn.f32", f(1.0), f(-0.0), f(f32::NEG_INFINITY)),
        ("add.f64", f64::INFINITY.to_bits(), f64::NEG_INFINITY.to_bits(), 0xfff8_0000_0000_0000),
    ] {
        assert_eq!(one(form, [a, b]), want, "{form} {a:x} {b:x}");
    }
}
