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
    let inexact = (error < 0.0 || error > 0.0) && value.is_finite();
    let step = if (error < 0.0) == (value < 0.0) { 1 } else { u64::MAX };
    f64::from_bits(if inexact && bits & 1 == 0 { bits.wrapping_add(step) } else { bits })
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
        _ if round.away(a < 0) => bits + u64::from(near < exact),
        _ => bits - u64::from(near > exact),
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
        _ if round.away(x.is_sign_negative()) => bits + u32::from(got < exact),
        _ => bits - u32::from(got > exact),
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
    let below = round == Round::Down && (a.is_sign_negative() || b.is_sign_negative());
    to_f32(if sum == 0.0 && below { -0.0 } else { sum }, round)
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
