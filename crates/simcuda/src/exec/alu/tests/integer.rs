//! Integer forms against 128-bit arithmetic and bit loops, after the pseudo-code of the PTX ISA.

use super::*;
use proptest::prelude::*;

/// The last modifier: signed, size.
fn kind(form: &str) -> Option<(bool, u32)> {
    let ty = form.rsplit('.').next()?;
    let bits = ty.get(1..)?.parse().ok()?;
    matches!(&ty[..1], "s" | "u" | "b").then_some((ty.starts_with('s'), bits))
}

fn extend(value: u64, signed: bool, bits: u32) -> i128 {
    let value = i128::from(value) & ((1 << bits) - 1);
    if signed && value >> (bits - 1) != 0 { value - (1 << bits) } else { value }
}

fn bit(value: u64, place: i64) -> u64 {
    if (0..64).contains(&place) { value >> place & 1 } else { 0 }
}

fn collect(bits: u32, f: impl Fn(i64) -> u64) -> u64 {
    (0..bits).fold(0, |word, i| word | f(i.into()) << i)
}

fn byte(word: u64, i: u64, signed: bool) -> i128 {
    extend(word >> (8 * i), signed, 8)
}

pub fn model(form: &str, src: &[u64]) -> Option<u64> {
    let (signed, bits) = kind(form.strip_suffix(".add").unwrap_or(form))
        .or_else(|| form.starts_with("prmt").then_some((false, 32)))?;
    let at = |i: usize| src.get(i).copied().unwrap_or(0);
    let (x, y, z) = (at(0), at(1), at(2));
    let (a, b, c) = (extend(x, signed, bits), extend(y, signed, bits), extend(z, signed, bits));
    let wide = extend(z, signed, (2 * bits).min(64));
    let high = |a: i128, b: i128| {
        // The product of two u64 needs all 128 bits.
        if signed { (a * b) >> bits } else { ((a as u128 * b as u128) >> bits) as i128 }
    };
    let limits = |v: i128| v.clamp(-(1 << 31), (1 << 31) - 1);
    let msb = i64::from(bits) - 1;
    let dot = |left: &dyn Fn(u64) -> i128, right: &dyn Fn(u64) -> i128, n| {
        z as i128 + (0..n).map(|i| left(i) * right(i)).sum::<i128>()
    };
    let parts: Vec<&str> = form.split('.').collect();
    let op = form.rsplit_once('.').map_or(form, |(op, _)| op);
    Some(match op {
        "add" => (a + b) as u64,
        "sub" => (a - b) as u64,
        "mul.lo" => (a as u128).wrapping_mul(b as u128) as u64,
        "mul.hi" => high(a, b) as u64,
        "mul.wide" => (a * b) as u64,
        "mad.lo" => (a as u128).wrapping_mul(b as u128).wrapping_add(c as u128) as u64,
        "mad.hi" => (high(a, b) + c) as u64,
        "mad.wide" => (a * b + wide) as u64,
        "add.sat" => limits(a + b) as u64,
        "sub.sat" => limits(a - b) as u64,
        "mad.hi.sat" => limits(((a * b) >> 32) + c) as u64,
        "div" => {
            if b == 0 {
                !0
            } else {
                (a / b) as u64
            }
        }
        "rem" => {
            if b == 0 {
                !0
            } else {
                (a % b) as u64
            }
        }
        "min" => a.min(b) as u64,
        "max" => a.max(b) as u64,
        "abs" => a.unsigned_abs() as u64,
        "neg" => -a as u64,
        "sad" => (c + (a - b).abs()) as u64,
        "and" => x & y,
        "or" => x | y,
        "xor" => x ^ y,
        "not" => !x,
        "cnot" => (x == 0).into(),
        "shl" => {
            if y < bits.into() {
                x << y
            } else {
                0
            }
        }
        "shr" => (a >> y.min(127)) as u64,
        "popc" => collect(bits, |i| bit(x, i)).count_ones().into(),
        "clz" => (0..=msb).rev().position(|i| bit(x, i) == 1).unwrap_or(bits as usize) as u64,
        "brev" => collect(bits, |i| bit(x, msb - i)),
        "bfind" | "bfind.shiftamt" => {
            let x = if signed && bit(x, msb) == 1 { !x } else { x };
            match (0..=msb).rev().find(|i| bit(x, *i) == 1) {
                None => !0,
                Some(d) if op == "bfind" => d as u64,
                Some(d) => (msb - d) as u64,
            }
        }
        "bfe" => {
            let (pos, len) = ((y & 255) as i64, (z & 255) as i64);
            let sign = if !signed || len == 0 { 0 } else { bit(x, (pos + len - 1).min(msb)) };
            collect(bits, |i| if i < len && pos + i <= msb { bit(x, pos + i) } else { sign })
        }
        "bfi" => {
            let (pos, len) = ((z & 255) as i64, (at(3) & 255) as i64);
            collect(bits, |i| if i >= pos && i < pos + len { bit(x, i - pos) } else { bit(y, i) })
        }
        "lop3" => collect(32, |i| at(3) >> (bit(x, i) << 2 | bit(y, i) << 1 | bit(z, i)) & 1),
        "shf.l.wrap" | "shf.l.clamp" | "shf.r.wrap" | "shf.r.clamp" => {
            let n = if op.ends_with("wrap") { z & 31 } else { z.min(32) };
            let pair = u128::from(y) << 32 | u128::from(x);
            if op.starts_with("shf.l") { (pair << n >> 32) as u64 } else { (pair >> n) as u64 }
        }
        "fns" => {
            if y > 31 {
                return Some(!0);
            }
            let offset = z as i32;
            let (mut pos, mut count) = (y as i64, i64::from(offset).abs() - 1);
            if offset == 0 {
                return Some(if bit(x, pos) == 1 { y } else { !0 });
            }
            while (0..32).contains(&pos) {
                if bit(x, pos) == 1 {
                    if count == 0 {
                        return Some(pos as u64);
                    }
                    count -= 1;
                }
                pos += i64::from(offset.signum());
            }
            !0
        }
        "bmsk.clamp" | "bmsk.wrap" => {
            let clamp = op.ends_with("clamp");
            let (pos, len) = if clamp { (x, y.min(32)) } else { (x & 31, y & 31) };
            collect(32, |i| (i as u64 >= pos && (i as u64) < pos + len).into())
        }
        "szext.clamp" | "szext.wrap" => {
            let n = if op.ends_with("clamp") { y.min(32) } else { y & 31 };
            if n == 0 { 0 } else { extend(x, signed, n as u32) as u64 }
        }
        _ if parts[0] == "dp4a" => {
            let (s, t) = (parts[1] == "s32", signed);
            dot(&|i| byte(x, i, s), &|i| byte(y, i, t), 4) as u64
        }
        _ if parts[0] == "dp2a" => {
            let first = if parts[1] == "hi" { 2 } else { 0 };
            dot(
                &|i| extend(x >> (16 * i), parts[2] == "s32", 16),
                &|i| byte(y, first + i, signed),
                2,
            ) as u64
        }
        _ if parts[0] == "vabsdiff4" => {
            let difference = |i| (byte(x, i, signed) - byte(y, i, signed)).unsigned_abs() as u64;
            match form.ends_with(".add") {
                true => z + (0..4).map(difference).sum::<u64>(),
                false => (0..4).fold(0, |word, i| word | difference(i) << (8 * i)),
            }
        }
        _ if parts[0] == "prmt" => {
            let pick = |i: u64| match *parts.get(2).unwrap_or(&"") {
                "" => z >> (4 * i) & 15,
                "f4e" => (z & 3) + i,
                "b4e" => ((z & 3) + 8 - i) % 8,
                "rc8" => z & 3,
                "ecl" => i.max(z & 3),
                "ecr" => i.min(z & 3),
                _ => (z & 1) * 2 + i % 2,
            };
            (0..4).fold(0, |word, i| {
                let byte = (y << 32 | x) >> (8 * (pick(i) & 7)) & 255;
                let byte = if pick(i) & 8 != 0 { 255 * (byte >> 7) } else { byte };
                word | byte << (8 * i)
            })
        }
        _ => return None,
    })
}

#[test]
fn integer_forms() {
    check(25, model);
}

proptest! {
    #[test]
    fn integers(a in any::<[u64; 32]>(), b in any::<[u64; 32]>(), c in any::<[u64; 32]>(), shrink in 0u32..64) {
        for op in ["add", "sub", "mul.lo", "mul.hi", "mad.lo", "mad.hi", "div", "rem", "min", "max", "sad"] {
            for (ty, bits) in [("s16", 16), ("u16", 16), ("s32", 32), ("u32", 32), ("s64", 64), ("u64", 64)] {
                let form = format!("{op}.{ty}");
                // Small divisors too, and their signs.
                let inputs = [a, b.map(|b| (b as i64 >> shrink) as u64), c].map(|v| v.map(|v| v & (!0 >> (64 - bits))));
                let sources = Alu::parse(&form).unwrap().signature().sources.len();
                let got = run(&form, &inputs[..sources]);
                for lane in 0..32 {
                    let want = model(&form, &inputs.map(|i| i[lane])).unwrap() & (!0 >> (64 - bits));
                    prop_assert_eq!(got[lane], want, "{} {:x?}", form, inputs.map(|i| i[lane]));
                }
            }
        }
    }
}
