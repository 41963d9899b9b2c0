//! What tests compare with: numbers as long integers, so that nothing is rounded until asked, and rounding written as
//! the definition has it. Shares nothing with what it checks.

use super::round::Round;
use std::cmp::Ordering;

const LIMBS: usize = 16;
/// The unit is 2^-512.
const POINT: i32 = 512;

/// A sum of products of f64, exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exact {
    negative: bool,
    limbs: [u64; LIMBS],
}

/// A floating-point format.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// Bits of the significand.
    pub precision: i32,
    /// Exponent of the last place of subnormals.
    pub smallest: i32,
    /// The least power of two that is too large.
    pub overflow: i32,
}

pub const F16: Format = Format { precision: 11, smallest: -24, overflow: 16 };
pub const BF16: Format = Format { precision: 8, smallest: -133, overflow: 128 };
pub const F32: Format = Format { precision: 24, smallest: -149, overflow: 128 };
pub const F64: Format = Format { precision: 53, smallest: -1074, overflow: 1024 };

/// Significand and exponent.
fn parts(x: f64) -> (u64, i32) {
    let field = (x.to_bits() >> 52 & 0x7ff) as i32;
    let fraction = x.to_bits() & ((1 << 52) - 1);
    if field == 0 { (fraction, -1074) } else { (fraction | 1 << 52, field - 1075) }
}

impl Exact {
    pub fn new(x: f64) -> Self {
        Self::product(x, 1.0)
    }

    pub fn product(a: f64, b: f64) -> Self {
        assert!(a.is_finite() && b.is_finite());
        let ((m, e), (n, f)) = (parts(a), parts(b));
        let negative = a.is_sign_negative() != b.is_sign_negative();
        Self::scaled(negative, u128::from(m) * u128::from(n), e + f)
    }

    pub fn integer(x: i128) -> Self {
        Self::scaled(x < 0, x.unsigned_abs(), 0)
    }

    fn scaled(negative: bool, magnitude: u128, exponent: i32) -> Self {
        let mut limbs = [0; LIMBS];
        let cut = if magnitude == 0 { 0 } else { magnitude.trailing_zeros() };
        let place = exponent + cut as i32 + POINT;
        if magnitude != 0 {
            assert!(place >= 0, "below the unit");
            let (limb, shift) = (place as usize / 64, place % 64);
            let odd = magnitude >> cut;
            let low = odd << shift;
            limbs[limb] = low as u64;
            limbs[limb + 1] = (low >> 64) as u64;
            limbs[limb + 2] = if shift == 0 { 0 } else { (odd >> (128 - shift)) as u64 };
        }
        Self { negative, limbs }
    }

    pub fn is_zero(&self) -> bool {
        self.limbs.iter().all(|l| *l == 0)
    }

    fn cmp_magnitude(&self, other: &Self) -> Ordering {
        self.limbs.iter().rev().cmp(other.limbs.iter().rev())
    }

    pub fn cmp(&self, other: &Self) -> Ordering {
        let difference = self.add(&Self { negative: !other.negative, ..*other });
        match (difference.is_zero(), difference.negative) {
            (true, _) => Ordering::Equal,
            (_, true) => Ordering::Less,
            (_, false) => Ordering::Greater,
        }
    }

    pub fn add(&self, other: &Self) -> Self {
        let (large, small) =
            if self.cmp_magnitude(other).is_lt() { (other, self) } else { (self, other) };
        let mut limbs = [0; LIMBS];
        let mut carry = 0i128;
        for (i, limb) in limbs.iter_mut().enumerate() {
            let (a, b) = (i128::from(large.limbs[i]), i128::from(small.limbs[i]));
            let sum = if large.negative == small.negative { a + b } else { a - b } + carry;
            *limb = sum as u64;
            carry = sum >> 64;
        }
        assert_eq!(carry, 0);
        Self { negative: large.negative, limbs }
    }

    fn bit(&self, place: i32) -> u64 {
        if place < 0 { 0 } else { self.limbs[place as usize / 64] >> (place % 64) & 1 }
    }

    /// In the format, which f64 holds. Zero keeps the sign of what vanished.
    pub fn round(&self, format: Format, round: Round) -> f64 {
        let sign = if self.negative { -1.0 } else { 1.0 };
        let Some(limb) = self.limbs.iter().rposition(|l| *l != 0) else {
            return 0.0 * sign;
        };
        let top = limb as i32 * 64 + 63 - self.limbs[limb].leading_zeros() as i32;
        // Index of the last bit kept.
        let last = (top - (format.precision - 1)).max(format.smallest + POINT);
        let kept = (0..format.precision).fold(0u64, |n, i| n | self.bit(last + i) << i);
        let half = self.bit(last - 1) == 1;
        let below = |limb: &u64, place: i32| match (last - 1 - place).clamp(0, 64) {
            0 => 0,
            bits => limb << (64 - bits),
        };
        let sticky = self.limbs.iter().zip(0..).any(|(limb, i)| below(limb, i * 64) != 0);
        let up = match round {
            Round::Nearest => half && (sticky || kept & 1 == 1),
            Round::Zero => false,
            Round::Down => self.negative && (half || sticky),
            Round::Up => !self.negative && (half || sticky),
        };
        let kept = kept + u64::from(up);
        let width = 64 - kept.leading_zeros() as i32;
        if width + last - POINT > format.overflow {
            let finite = match round {
                Round::Nearest => false,
                Round::Zero => true,
                Round::Down => !self.negative,
                Round::Up => self.negative,
            };
            let all_ones = 2.0 - 2f64.powi(1 - format.precision);
            return sign
                * if finite { all_ones * 2f64.powi(format.overflow - 1) } else { f64::INFINITY };
        }
        // In two steps: the power of two alone may be too small for f64.
        let exponent = last - POINT;
        sign * kept as f64 * 2f64.powi(exponent / 2) * 2f64.powi(exponent - exponent / 2)
    }
}

/// Numbers at which things go wrong, and random ones; the same at each call.
pub fn samples_f32(count: usize) -> Vec<f32> {
    const EDGES: [u32; 28] = [
        0x0000_0000,
        0x8000_0000,
        0x0000_0001,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x8080_0000,
        0x0080_0001,
        0x3f80_0000,
        0xbf80_0000,
        0x3f80_0001,
        0x3f7f_ffff,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_0000,
        0x7f80_0001,
        0x3f00_0000,
        0x4b00_0000,
        0x4b80_0000,
        0x4b7f_ffff,
        0x3f7f_fffe,
        0x0040_0000,
        0x3400_0000,
        0x3380_0000,
        0x4f00_0000,
    ];
    let mut random = Random(7);
    let near = |r: u32| (0x3e00_0000 + r % 0x0300_0000) | r & 0x8000_0000;
    (0..count)
        .map(|i| match (EDGES.get(i), i % 3) {
            (Some(edge), _) => *edge,
            (None, 0) => random.next() as u32,
            (None, 1) => near(random.next() as u32),
            (None, _) => near(random.next() as u32) & !0xfff,
        })
        .map(f32::from_bits)
        .collect()
}

/// A small generator (an LCG with its high bits mixed in).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 33
    }
}

#[test]
fn the_oracle_agrees_with_hardware_to_nearest() {
    let samples: Vec<_> = samples_f32(3000).into_iter().filter(|x| x.is_finite()).collect();
    for pair in samples.windows(2) {
        let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
        let sum = Exact::new(a).add(&Exact::new(b));
        if !sum.is_zero() {
            assert_eq!(sum.round(F32, Round::Nearest) as f32, pair[0] + pair[1]);
        }
        assert_eq!(Exact::product(a, b).round(F32, Round::Nearest) as f32, pair[0] * pair[1]);
        assert_eq!(Exact::product(a, b).round(F64, Round::Zero), a * b, "exact in f64");
    }
}
