//! f16 and bf16: to f32, which holds them exactly, and back in each rounding direction. In integers, because the
//! host's own conversions know only one direction and are no vector code without hardware for them.

use super::round::Round;

/// The NaN that operations return.
pub const NAN: u16 = 0x7fff;

#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff);
    let sign = u32::from(h & 0x8000) << 16;
    let normal = (magnitude << 13) + (112 << 23);
    // No f32 arithmetic on subnormals, which is slow on some CPUs.
    let subnormal = (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    let special = magnitude << 13 | 0x7f80_0000;
    let value = if magnitude < 0x0400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { value })
}

#[inline(always)]
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// What to add to `bits` so that cutting off the low `shift` bits rounds.
#[inline(always)]
fn increment(bits: u32, shift: u32, round: Round, negative: bool) -> u32 {
    match round {
        Round::Nearest => (1u32 << shift >> 1).wrapping_sub(1).wrapping_add(bits >> shift & 1),
        _ if round.away(negative) => (1u32 << shift).wrapping_sub(1),
        _ => 0,
    }
}

#[inline(always)]
pub fn bf16_from_f32(x: f32, round: Round) -> u16 {
    let bits = x.to_bits();
    let (sign, magnitude) = (bits >> 31 << 15, bits & 0x7fff_ffff);
    let rounded = magnitude.wrapping_add(increment(magnitude, 16, round, sign != 0)) >> 16;
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
    let up = increment(significand, shift, round, sign != 0);
    let subnormal = significand.wrapping_add(up) >> shift;

    let largest = if round == Round::Nearest || round.away(sign != 0) { 0x7c00 } else { 0x7bff };
    let finite = if exponent < 113 {
        subnormal
    } else if (exponent >= 143) | (normal > 0x7bff) {
        largest
    } else {
        normal
    };
    let value = if magnitude == 0x7f80_0000 { 0x7c00 } else { finite };
    if magnitude > 0x7f80_0000 { NAN } else { (sign | value) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::oracle::{BF16, Exact, F16, Random, samples_f32};
    use crate::num::round::{integer_to_odd, to_f32_odd};

    const ROUNDS: [Round; 4] = [Round::Nearest, Round::Zero, Round::Down, Round::Up];

    /// Every half: its value as the `half` crate has it, and back unchanged in every direction.
    #[test]
    fn all_halves_there_and_back() {
        for h in 0..=u16::MAX {
            let (f, b) = (f16_to_f32(h), bf16_to_f32(h));
            let (f_want, b_want) =
                (half::f16::from_bits(h).to_f32(), half::bf16::from_bits(h).to_f32());
            assert!(f.to_bits() == f_want.to_bits() || f.is_nan() && f_want.is_nan(), "{h:04x}");
            assert!(b.to_bits() == b_want.to_bits() || b.is_nan() && b_want.is_nan(), "{h:04x}");
            for round in ROUNDS {
                assert_eq!(f16_from_f32(f, round), if f.is_nan() { NAN } else { h });
                assert_eq!(bf16_from_f32(b, round), if b.is_nan() { NAN } else { h });
            }
        }
    }

    /// Every midpoint between halves and its neighbours, and random numbers, against the definition.
    #[test]
    fn rounding_follows_the_definition() {
        let mut numbers = samples_f32(3000);
        let mut random = Random(4);
        for _ in 0..3000 {
            let h = random.next() as u16;
            for exact in [f16_to_f32(h), bf16_to_f32(h)] {
                for step in [0, 0x1000, 0x8000, 0xfff, 0x1001, 0x7fff, 0x8001] {
                    numbers.push(f32::from_bits(exact.to_bits().wrapping_add(step)));
                }
            }
        }
        for x in numbers.into_iter().filter(|x| x.is_finite()) {
            for round in ROUNDS {
                let f = Exact::new(x.into()).round(F16, round) as f32;
                let b = Exact::new(x.into()).round(BF16, round) as f32;
                assert_eq!(
                    f16_to_f32(f16_from_f32(x, round)).to_bits(),
                    f.to_bits(),
                    "{x:e} {round:?}"
                );
                assert_eq!(
                    bf16_to_f32(bf16_from_f32(x, round)).to_bits(),
                    b.to_bits(),
                    "{x:e} {round:?}"
                );
            }
        }
        for x in [f32::INFINITY, f32::NEG_INFINITY] {
            for round in ROUNDS {
                assert_eq!(f16_to_f32(f16_from_f32(x, round)), x);
                assert_eq!(bf16_to_f32(bf16_from_f32(x, round)), x);
            }
        }
    }

    /// From f64 and from 64-bit integers: so close to a midpoint that f32, or f64, cannot tell.
    #[test]
    fn wider_numbers_go_through_odd_ones() {
        let mut random = Random(6);
        for i in 0..6000 {
            let (h, step) = (random.next() as u16, (i % 3) as f64 - 1.0);
            for (value, half_ulp) in [(f16_to_f32(h), 0x1000), (bf16_to_f32(h), 0x8000)] {
                let x = f64::from(f32::from_bits(value.to_bits() | half_ulp))
                    * (1.0 + step * 2f64.powi(-40));
                if !x.is_finite() {
                    continue;
                }
                for round in ROUNDS {
                    let f = Exact::new(x).round(F16, round) as f32;
                    let b = Exact::new(x).round(BF16, round) as f32;
                    assert_eq!(
                        f16_to_f32(f16_from_f32(to_f32_odd(x), round)).to_bits(),
                        f.to_bits(),
                        "{x:e} {round:?}"
                    );
                    assert_eq!(
                        bf16_to_f32(bf16_from_f32(to_f32_odd(x), round)).to_bits(),
                        b.to_bits(),
                        "{x:e} {round:?}"
                    );
                }
            }
            let significand = i128::from(random.next() % 128 + 128) * 2 + 1;
            let integer = (significand << (54 - i % 3)) + (i % 7) - 3;
            for (integer, round) in
                [integer, -integer].into_iter().flat_map(|x| ROUNDS.map(|r| (x, r)))
            {
                let want = Exact::integer(integer).round(BF16, round) as f32;
                let got = bf16_to_f32(bf16_from_f32(to_f32_odd(integer_to_odd(integer)), round));
                assert_eq!(got, want, "{integer} {round:?}");
            }
        }
    }
}
