//! Functions that PTX defines only up to an error: computed in f64, rounded to the format, and, if asked, moved by
//! anything up to the documented error.
//!
//! `exp2` and `log2` are written out because every softmax calls them for whole warps and the C library's take one
//! value at a time. Plain sums and products, no fused ones: the same bits on every machine.

use super::round::{Round, to_f32};

/// 2 to the `x`, for results within f32's range; beyond it, something that f32 rounds to zero or infinity.
#[inline(always)]
pub fn exp2(x: f64) -> f64 {
    /// Added to a small number, leaves its integer part in the lowest bits of the sum.
    const SHIFTER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    /// ln(2)^k / k!, from k = 13 down to 1.
    const C: [f64; 13] = [
        1.369_148_885_390_412_8e-12,
        2.567_843_599_348_820_6e-11,
        4.445_538_271_870_811_6e-10,
        7.054_911_620_801_123e-9,
        1.017_808_600_923_97e-7,
        1.321_548_679_014_431e-6,
        1.525_273_380_405_984_1e-5,
        0.000_154_035_303_933_816_1,
        0.001_333_355_814_642_844_3,
        0.009_618_129_107_628_477,
        0.055_504_108_664_821_58,
        0.240_226_506_959_100_72,
        std::f64::consts::LN_2,
    ];
    let x = if x > 200.0 { 200.0 } else { x };
    let least = if x < -200.0 { -200.0 } else { x };
    let shifted = least + SHIFTER;
    let fraction = least - (shifted - SHIFTER);
    let mut power = 0.0;
    for c in C {
        power = (power + c) * fraction;
    }
    let result = (1.0 + power) * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x < -200.0 { 0.0 } else { result }
}

/// Base-2 logarithm of a number that came from f32.
#[inline(always)]
pub fn log2(x: f64) -> f64 {
    /// 1 / (2k + 1), from k = 10 down to 0.
    const C: [f64; 11] = [
        1.0 / 21.0,
        1.0 / 19.0,
        1.0 / 17.0,
        1.0 / 15.0,
        1.0 / 13.0,
        1.0 / 11.0,
        1.0 / 9.0,
        1.0 / 7.0,
        1.0 / 5.0,
        1.0 / 3.0,
        1.0,
    ];
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    const ONE: u64 = 0x3ff0_0000_0000_0000;
    // x = 2^exponent * m, with m within a factor sqrt(2) of 1: no cancellation between the two parts.
    let biased = x.to_bits().wrapping_add(ONE - SQRT_HALF) >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub(biased << 52).wrapping_add(ONE));
    let exponent =
        f64::from_bits(0x4330_0000_0000_0000 | biased) - (4_503_599_627_370_496.0 + 1023.0);
    // log(m) = 2 artanh((m - 1) / (m + 1))
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut series = 0.0;
    for c in C {
        series = series * square + c;
    }
    let finite = exponent + 2.0 * std::f64::consts::LOG2_E * s * series;
    if x > 0.0 && x < f64::INFINITY {
        finite
    } else if x == 0.0 {
        f64::NEG_INFINITY
    } else if x > 0.0 {
        x
    } else {
        f64::NAN
    }
}

/// How far a result may be from the exact one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Units in the last place of f32.
    Ulp(f64),
    /// Times the exact result.
    Relative(f64),
    /// In itself.
    Absolute(f64),
}

/// 2^-k for a documented error.
pub const fn pow2(k: u32) -> f64 {
    1.0 / (1u64 << k) as f64
}

/// `exact` in f32, moved within `bound` as `random` says.
#[cold]
#[inline(never)]
pub fn perturbed_f32(exact: f64, bound: Bound, random: u64) -> f32 {
    let error = match bound {
        Bound::Ulp(n) => {
            let exponent = (to_f32(exact, Round::Zero).to_bits() >> 23 & 0xff).max(1);
            n * f64::from_bits(u64::from(exponent + 1023 - 127 - 23) << 52)
        }
        Bound::Relative(e) => e * exact.abs(),
        Bound::Absolute(e) => e,
    };
    perturbed(exact, error, random, |x, round| to_f32(x, round).into()) as f32
}

/// `exact` in the format that `to_format` rounds to, moved by at most `error`. Zero, infinity and NaN stay.
pub fn perturbed(
    exact: f64,
    error: f64,
    random: u64,
    to_format: impl Fn(f64, Round) -> f64,
) -> f64 {
    let nearest = to_format(exact, Round::Nearest);
    if exact == 0.0 || !nearest.is_finite() {
        return nearest;
    }
    let target = exact + error * ((random >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
    // Towards the exact value, which may be passed only where the format has nothing between. Never past zero.
    let moved = to_format(target, if target > exact { Round::Down } else { Round::Up });
    let allowed = (moved - exact).abs() <= error && moved.signum() == exact.signum();
    if allowed { moved } else { nearest }
}

/// A hash of what identifies an evaluation.
#[inline]
pub fn hash(seed: u64, form: u64, inputs: [u32; 2]) -> u64 {
    // The finaliser of splitmix64.
    let mut h = seed ^ form;
    for word in inputs {
        h = h.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(word));
        h = (h ^ h >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ h >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^= h >> 31;
    }
    h
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::oracle::{Random, samples_f32};

    /// Far closer than f32 can tell, so that the rounded result is the right one but for one input in 2^25.
    #[test]
    fn exp2_and_log2_are_those_of_the_library() {
        for x in samples_f32(20_000).into_iter().map(f64::from) {
            let close =
                |got: f64, want: f64| (got - want).abs() <= 1e-15 * want.abs() || got == want;
            let small = x % 200.0;
            assert!(
                close(exp2(small), small.exp2()) || small.is_nan() && exp2(small).is_nan(),
                "{small:e}"
            );
            assert!(close(log2(x), x.log2()) || x.log2().is_nan() && log2(x).is_nan(), "{x:e}");
        }
        assert_eq!([-1e9, 1e9, -151.0].map(|x| exp2(x) as f32), [0.0, f32::INFINITY, 0.0]);
        assert_eq!([0.0, -149.0, 127.0].map(exp2), [1.0, 2f64.powi(-149), 2f64.powi(127)]);
        assert_eq!(
            [1.0, 8.0, 0.125, 0.0, -0.0].map(log2),
            [0.0, 3.0, -3.0, f64::NEG_INFINITY, f64::NEG_INFINITY]
        );
    }

    #[test]
    fn perturbation_stays_within_the_bound_and_uses_it() {
        let mut random = Random(5);
        for bound in [
            Bound::Ulp(1.0),
            Bound::Ulp(2.0),
            Bound::Relative(pow2(22)),
            Bound::Ulp(0.7),
            Bound::Relative(pow2(11)),
            Bound::Absolute(pow2(20)),
        ] {
            let (mut above, mut below, mut far) = (0, 0, 0f64);
            for _ in 0..4000 {
                let exact = (1.0 + (random.next() >> 12) as f64 * 2f64.powi(-52))
                    * 2f64.powi((random.next() % 8) as i32 - 4);
                let ulp = 2f64.powi(exact.log2().floor() as i32 - 23);
                let error = match bound {
                    Bound::Ulp(n) => n * ulp,
                    Bound::Relative(e) => e * exact,
                    Bound::Absolute(e) => e,
                };
                let seed = random.next();
                let got = f64::from(perturbed_f32(exact, bound, seed));
                assert!((got - exact).abs() <= error.max(ulp / 2.0), "{bound:?} {exact:e} {got:e}");
                assert_eq!(got, f64::from(perturbed_f32(exact, bound, seed)));
                let nearest = f64::from(exact as f32);
                (above, below) =
                    (above + i32::from(got > nearest), below + i32::from(got < nearest));
                far = far.max((got - exact).abs() / error);
            }
            assert!(above > 200 && below > 200 && far > 0.9, "{bound:?}: {above} {below} {far}");
        }
        for exact in [0.0, -0.0, f64::INFINITY, 1e300] {
            assert_eq!(
                perturbed_f32(exact, Bound::Ulp(2.0), 3).to_bits(),
                (exact as f32).to_bits()
            );
        }
        let tiny = perturbed_f32(2f64.powi(-140), Bound::Ulp(2.0), 9);
        assert!((f64::from(tiny) - 2f64.powi(-140)).abs() <= 2f64.powi(-148));
    }

    #[test]
    fn hashes_differ() {
        let all = [(1, 2, [3, 4]), (2, 2, [3, 4]), (1, 3, [3, 4]), (1, 2, [4, 3]), (1, 2, [3, 5])];
        let mut hashes = all.map(|(seed, form, inputs)| hash(seed, form, inputs)).to_vec();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), all.len());
    }
}
