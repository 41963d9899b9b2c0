//! f32 operations in the four rounding directions.
//!
//! f64 holds a product of two f32 exactly. A sum or a fused multiply-add may not fit its 53 bits; it is then rounded
//! *to odd*: to whichever neighbour has the last bit set. Such a value still shows on which side of every f32, and of
//! every midpoint between two, the exact one lies, so rounding it once more gives what rounding the exact one would.
//! A quotient or square root needs no such care: it cannot come closer to an f32 or a midpoint than 2^-50 of itself
//! without being equal to it.

/// A rounding direction; PTX writes `.rn`, `.rz`, `.rm`, `.rp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// Towards zero.
    Zero,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
}

impl Round {
    /// Whether a value of this sign rounds away from zero; not for `Nearest`.
    #[inline(always)]
    pub fn away(self, negative: bool) -> bool {
        match self {
            Self::Nearest | Self::Zero => false,
            Self::Down => negative,
            Self::Up => !negative,
        }
    }
}

/// `value + error`, where `value` is the sum rounded to nearest, rounded to odd instead.
#[inline(always)]
pub fn to_odd(value: f64, error: f64) -> f64 {
    let bits = value.to_bits();
    let inexact = ((error < 0.0) | (error > 0.0)) & value.is_finite();
    let step = if (error < 0.0) == (value < 0.0) { 1 } else { u64::MAX };
    f64::from_bits(if inexact & (bits & 1 == 0) { bits.wrapping_add(step) } else { bits })
}

/// `a + b` rounded to odd, unless it overflows f64.
#[inline(always)]
pub fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let from_b = sum - a;
    to_odd(sum, (a - (sum - from_b)) + (b - from_b))
}

/// Nearest f64 of a 64-bit integer, rounded to odd.
#[inline(always)]
pub fn integer_to_odd(a: i128) -> f64 {
    let value = a as f64;
    to_odd(value, (a - value as i128) as f64)
}

/// A 64-bit integer in f64.
#[inline(always)]
pub fn integer_to_f64(a: i128, round: Round) -> f64 {
    let value = a as f64;
    let (near, exact) = ((value as i128).unsigned_abs(), a.unsigned_abs());
    let bits = value.to_bits();
    f64::from_bits(match round {
        Round::Nearest => bits,
        _ if round.away(a < 0) => bits.wrapping_add(u64::from(near < exact)),
        _ => bits.wrapping_sub(u64::from(near > exact)),
    })
}

/// f64 to f32.
#[inline(always)]
pub fn to_f32(x: f64, round: Round) -> f32 {
    let near = x as f32;
    let (got, exact) = (f64::from(near).abs(), x.abs());
    let bits = near.to_bits();
    f32::from_bits(match round {
        Round::Nearest => bits,
        _ if round.away(x.is_sign_negative()) => bits.wrapping_add(u32::from(got < exact)),
        _ => bits.wrapping_sub(u32::from(got > exact)),
    })
}

/// f64 to f32, rounded to odd: the way to a 16-bit format.
#[inline(always)]
pub fn to_f32_odd(x: f64) -> f32 {
    let cut = to_f32(x, Round::Zero);
    f32::from_bits(cut.to_bits() | u32::from(f64::from(cut).abs() < x.abs()))
}

/// `a + b`.
#[inline(always)]
pub fn add(a: f32, b: f32, round: Round) -> f32 {
    if round == Round::Nearest { a + b } else { directed_sum(a.into(), b.into(), round) }
}

/// `a * b`.
#[inline(always)]
pub fn mul(a: f32, b: f32, round: Round) -> f32 {
    if round == Round::Nearest { a * b } else { to_f32(f64::from(a) * f64::from(b), round) }
}

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32, round: Round) -> f32 {
    if round == Round::Nearest {
        a.mul_add(b, c)
    } else {
        directed_sum(f64::from(a) * f64::from(b), c.into(), round)
    }
}

/// `a / b`.
#[inline(always)]
pub fn div(a: f32, b: f32, round: Round) -> f32 {
    if round == Round::Nearest { a / b } else { to_f32(f64::from(a) / f64::from(b), round) }
}

/// Square root.
#[inline(always)]
pub fn sqrt(a: f32, round: Round) -> f32 {
    if round == Round::Nearest { a.sqrt() } else { to_f32(f64::from(a).sqrt(), round) }
}

/// An exact zero from terms that are not both +0 is -0 when rounding down.
#[inline(always)]
fn directed_sum(a: f64, b: f64, round: Round) -> f32 {
    let sum = sum_to_odd(a, b);
    let below = (round == Round::Down) & (a.is_sign_negative() | b.is_sign_negative());
    to_f32(if (sum == 0.0) & below { -0.0 } else { sum }, round)
}

/// `.ftz`: subnormals become a zero of the same sign.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff < 0x0080_0000 { bits & 0x8000_0000 } else { bits })
}

/// `.sat`: to [0, 1], NaN and -0 to +0.
#[inline(always)]
pub fn saturate(x: f32) -> f32 {
    if x >= 1.0 {
        1.0
    } else if x > 0.0 {
        x
    } else {
        0.0
    }
}

/// `.relu`: what is not above zero becomes +0, NaN stays.
#[inline(always)]
pub fn relu(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::oracle::{Exact, F32, F64, Random, samples_f32};

    pub const ROUNDS: [Round; 4] = [Round::Nearest, Round::Zero, Round::Down, Round::Up];

    /// `a * b + c` by the definition. `exact` says which sign the zero of an exact sum has.
    fn expected(a: f32, b: f32, c: f32, round: Round) -> f32 {
        let plain = f64::from(a) * f64::from(b) + f64::from(c);
        if !a.is_finite() || !b.is_finite() || !c.is_finite() {
            return plain as f32;
        }
        let sum = Exact::product(a.into(), b.into()).add(&Exact::new(c.into()));
        let negative = (a * b).is_sign_negative();
        if !sum.is_zero() {
            sum.round(F32, round) as f32
        } else if negative == c.is_sign_negative() {
            if negative { -0.0 } else { 0.0 }
        } else if round == Round::Down {
            -0.0
        } else {
            0.0
        }
    }

    fn assert_same(got: f32, want: f32, what: &dyn Fn() -> String) {
        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(
            same,
            "{}: {got:e} {:08x}, want {want:e} {:08x}",
            what(),
            got.to_bits(),
            want.to_bits()
        );
    }

    #[test]
    fn sums_and_products_round_the_exact_value() {
        let samples = samples_f32(2000);
        let mut random = Random(1);
        for i in 0..12_000 {
            let mut pick = || samples[random.next() as usize % samples.len()];
            let (a, b) = (pick(), pick());
            // A third close to the product, where cancellation is.
            let c = if i % 3 == 0 {
                -(a * b) * (1.0 + (pick().to_bits() % 9) as f32 * 1e-7)
            } else {
                pick()
            };
            for round in ROUNDS {
                let what = || format!("{a:e} {b:e} {c:e} {round:?}");
                assert_same(fma(a, b, c, round), expected(a, b, c, round), &what);
                assert_same(add(a, c, round), expected(a, 1.0, c, round), &what);
                let zero = if (a * b).is_sign_negative() { -0.0 } else { 0.0 };
                assert_same(mul(a, b, round), expected(a, b, zero, round), &what);
            }
        }
    }

    /// A quotient or root `y` is right if `y` and its neighbours, multiplied out, lie on the right sides.
    #[test]
    fn quotients_and_roots_bracket_the_exact_value() {
        let samples: Vec<_> =
            samples_f32(1500).into_iter().filter(|x| x.is_finite() && *x != 0.0).collect();
        let mut random = Random(2);
        for _ in 0..6000 {
            let mut pick = || samples[random.next() as usize % samples.len()].abs();
            let (a, b) = (pick(), pick());
            for (down, up, nearest, divisor) in [
                (div(a, b, Round::Down), div(a, b, Round::Up), div(a, b, Round::Nearest), Some(b)),
                (sqrt(a, Round::Down), sqrt(a, Round::Up), sqrt(a, Round::Nearest), None),
            ] {
                let back = |y: f64| Exact::product(y, divisor.map_or(y, f64::from));
                let exact = Exact::new(a.into());
                if up.is_infinite() {
                    assert_eq!(down, f32::MAX);
                    continue;
                }
                assert!(
                    back(down.into()).cmp(&exact).is_le() && back(up.into()).cmp(&exact).is_ge(),
                    "{a:e} {b:e}"
                );
                assert!(down == up || down.next_up() == up, "{a:e} {b:e}: {down:e} {up:e}");
                let middle = (f64::from(down) + f64::from(up)) / 2.0;
                let want = match back(middle).cmp(&exact) {
                    std::cmp::Ordering::Less => up,
                    std::cmp::Ordering::Greater => down,
                    _ if down.to_bits() & 1 == 0 => down,
                    _ => up,
                };
                assert_eq!(nearest, want, "{a:e} {b:e}");
                assert_eq!(div(a, b, Round::Zero), div(a, b, Round::Down));
                assert_eq!(div(-a, b, Round::Zero), div(-a, b, Round::Up));
            }
        }
    }

    #[test]
    fn f64_and_integers_round_the_exact_value() {
        let mut random = Random(3);
        for i in 0..4000 {
            // Over f32's range and a little beyond, a third of them near a midpoint of f32.
            let bits = random.next();
            let exponent = 1023 - 155 + bits % 290;
            let fraction =
                if i % 3 == 0 { bits >> 12 & !0xfff_ffff | 0x1000_0000 } else { bits >> 12 };
            let fraction = fraction.wrapping_add(i % 5).wrapping_sub(2) & ((1 << 52) - 1);
            let x = f64::from_bits(bits & 1 << 63 | exponent << 52 | fraction);
            let integer = i128::from(bits as i64 >> (bits % 50)) + i128::from(i % 3);
            for round in ROUNDS {
                let want = Exact::new(x).round(F32, round) as f32;
                assert_same(to_f32(x, round), want, &|| format!("{x:e} {round:?}"));
                let want = Exact::integer(integer).round(F64, round);
                assert_eq!(integer_to_f64(integer, round), want, "{integer} {round:?}");
                let want = Exact::integer(integer).round(F32, round) as f32;
                assert_same(to_f32(integer_to_odd(integer), round), want, &|| {
                    format!("{integer} {round:?}")
                });
            }
        }
    }

    #[test]
    fn flags() {
        assert_eq!(flush(f32::from_bits(0x8000_0001)).to_bits(), 0x8000_0000);
        assert_eq!(flush(f32::MIN_POSITIVE), f32::MIN_POSITIVE);
        assert_eq!(
            [2.0, 1.0, 0.25, -0.0, -1.0, f32::NAN].map(|x| saturate(x).to_bits()),
            [1.0, 1.0, 0.25, 0.0, 0.0, 0.0f32].map(f32::to_bits)
        );
        assert_eq!(
            [2.0, -0.0, -1.0].map(|x| relu(x).to_bits()),
            [2.0, 0.0, 0.0f32].map(f32::to_bits)
        );
        assert!(relu(f32::NAN).is_nan());
    }
}
