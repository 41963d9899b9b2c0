//! f16 and bf16: to f32, which holds them exactly, and back in each rounding direction. In integers, because the
//! host's own conversions know only one direction and are no vector code without hardware for them.

use super::round::Round;

/// The NaN that operations return.
pub const NAN: u16 = 0x7fff;

#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff);
    let sign = u32::from(h & 0x8000) << 16;
    // The exponent field moves to the low end of f32's; the product repairs its bias, for subnormals too.
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = magnitude << 13 | 0x7f80_0000;
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { finite.to_bits() })
}

#[inline(always)]
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// What to add to `bits` so that cutting off the low `shift` bits rounds.
#[inline(always)]
fn increment(bits: u32, shift: u32, round: Round, negative: bool) -> u32 {
    match round {
        Round::Nearest => ((1 << (shift - 1)) - 1) + (bits >> shift & 1),
        _ if round.away(negative) => (1 << shift) - 1,
        _ => 0,
    }
}

#[inline(always)]
pub fn bf16_from_f32(x: f32, round: Round) -> u16 {
    let bits = x.to_bits();
    let (sign, magnitude) = (bits >> 31 << 15, bits & 0x7fff_ffff);
    let rounded = (magnitude + increment(magnitude, 16, round, sign != 0)) >> 16;
    // Infinity has no bits to cut off, and a carry out of the largest finite number arrives at it.
    let finite = if magnitude == 0x7f80_0000 { 0x7f80 } else { rounded };
    if magnitude > 0x7f80_0000 { NAN } else { (sign | finite) as u16 }
}

#[inline(always)]
pub fn f16_from_f32(x: f32, round: Round) -> u16 {
    let bits = x.to_bits();
    let (sign, magnitude) = (bits >> 31 << 15, bits & 0x7fff_ffff);
    let exponent = magnitude >> 23;

    let rebiased = magnitude.wrapping_sub(112 << 23);
    let normal = rebiased.wrapping_add(increment(rebiased, 13, round, sign != 0)) >> 13;

    // Units of 2^-24. Beyond 25 places nothing is left but the fact that there was something.
    let significand = magnitude & 0x007f_ffff | u32::from(exponent != 0) << 23;
    let shift = 126u32.saturating_sub(exponent).clamp(1, 25);
    let subnormal = (significand + increment(significand, shift, round, sign != 0)) >> shift;

    let largest = if round == Round::Nearest || round.away(sign != 0) { 0x7c00 } else { 0x7bff };
    let finite = if exponent < 113 {
        subnormal
    } else if exponent >= 143 || normal > 0x7bff {
        largest
    } else {
        normal
    };
    let value = if magnitude == 0x7f80_0000 { 0x7c00 } else { finite };
    if magnitude > 0x7f80_0000 { NAN } else { (sign | value) as u16 }
}
