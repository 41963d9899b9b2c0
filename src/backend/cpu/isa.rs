//! Instruction sets: loops compiled for several of them and chosen at run time, and vectors of f32.
//!
//! Most loops are written for LLVM to vectorise. Those that take the time of scoring name their vectors, which the
//! portable sets have as arrays: results agree to rounding, whatever the machine.
//!
//! `unsafe` because a function compiled for some instructions may only be called where the machine has them.

use super::tile::max2;

/// Lanes of vectors, sums and products: enough independent chains for any width, and a fixed order.
pub(super) const LANES: usize = 16;

/// A value of each.
pub(super) type Lanes = [f32; LANES];

/// What instruction sets differ in. Vectors are [`LANES`] wide.
pub(super) trait Arithmetic: Sized {
    type Vector: Copy;

    /// `a · b + c`, rounded once or twice.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    fn load(x: &Lanes) -> Self::Vector;
    fn store(x: Self::Vector, to: &mut Lanes);
    fn splat(x: f32) -> Self::Vector;
    fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn abs(x: Self::Vector) -> Self::Vector;
    /// [`mul_add`](Self::mul_add) of each lane.
    fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// [`greater`] of each lane.
    fn greater(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// [`max2`] of each lane, none of which is below zero.
    fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// [`exp2`] of each lane.
    fn exp2(x: Self::Vector) -> Self::Vector;
}

/// The greater, or `a` if one is NaN.
#[inline(always)]
pub(super) fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// An array, lane by lane.
macro_rules! lanes {
    ($l:ident => $value:expr) => {{
        let mut lanes = [0.0; LANES];
        for $l in 0..LANES {
            lanes[$l] = $value;
        }
        lanes
    }};
}

/// Vectors as arrays, for LLVM to map to what there is.
macro_rules! arrays {
    ($mul_add:expr) => {
        type Vector = Lanes;

        #[inline(always)]
        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            $mul_add(a, b, c)
        }
        #[inline(always)]
        fn load(x: &Lanes) -> Lanes {
            *x
        }
        #[inline(always)]
        fn store(x: Lanes, to: &mut Lanes) {
            *to = x;
        }
        #[inline(always)]
        fn splat(x: f32) -> Lanes {
            [x; LANES]
        }
        #[inline(always)]
        fn add(a: Lanes, b: Lanes) -> Lanes {
            lanes!(l => a[l] + b[l])
        }
        #[inline(always)]
        fn mul(a: Lanes, b: Lanes) -> Lanes {
            lanes!(l => a[l] * b[l])
        }
        #[inline(always)]
        fn abs(x: Lanes) -> Lanes {
            lanes!(l => x[l].abs())
        }
        #[inline(always)]
        fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
            lanes!(l => Self::mul_add(a[l], b[l], c[l]))
        }
        #[inline(always)]
        fn greater(a: Lanes, b: Lanes) -> Lanes {
            lanes!(l => greater(a[l], b[l]))
        }
        #[inline(always)]
        fn max(a: Lanes, b: Lanes) -> Lanes {
            lanes!(l => max2(a[l], b[l]))
        }
        #[inline(always)]
        fn exp2(x: Lanes) -> Lanes {
            lanes!(l => exp2::<Self>(x[l]))
        }
    };
}

/// With the machine's fused multiply-add.
struct Fused;
impl Arithmetic for Fused {
    arrays!(f32::mul_add);
}

/// Without: a call for each would cost more than all the rest.
#[cfg(not(target_arch = "aarch64"))]
struct Plain;
#[cfg(not(target_arch = "aarch64"))]
impl Arithmetic for Plain {
    arrays!(|a: f32, b: f32, c: f32| a * b + c);
}

/// With AVX-512, whose vectors LLVM does not always find. Private: [`Isa::run`] alone names it, for kernels that it has
/// compiled for these instructions.
#[cfg(target_arch = "x86_64")]
struct Wide;
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    use super::{Arithmetic, COEFFICIENTS, LOW, Lanes, ROUND, Wide};

    macro_rules! avx512 {
        ($value:expr) => {{
            #[allow(unsafe_code, reason = "measured: see benches/README.md")]
            // SAFETY: the machine has AVX-512, or `Isa::run` would not run kernels with this type; what is loaded or
            // stored is an array of as many lanes.
            let value = unsafe { $value };
            value
        }};
    }

    impl Arithmetic for Wide {
        type Vector = __m512;

        #[inline(always)]
        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn load(x: &Lanes) -> __m512 {
            avx512!(_mm512_loadu_ps(x.as_ptr()))
        }
        #[inline(always)]
        fn store(x: __m512, to: &mut Lanes) {
            avx512!(_mm512_storeu_ps(to.as_mut_ptr(), x))
        }
        #[inline(always)]
        fn splat(x: f32) -> __m512 {
            avx512!(_mm512_set1_ps(x))
        }
        #[inline(always)]
        fn add(a: __m512, b: __m512) -> __m512 {
            avx512!(_mm512_add_ps(a, b))
        }
        #[inline(always)]
        fn mul(a: __m512, b: __m512) -> __m512 {
            avx512!(_mm512_mul_ps(a, b))
        }
        #[inline(always)]
        fn abs(x: __m512) -> __m512 {
            avx512!(_mm512_abs_ps(x))
        }
        #[inline(always)]
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            avx512!(_mm512_fmadd_ps(a, b, c))
        }
        /// The instruction gives its second operand if one is NaN.
        #[inline(always)]
        fn greater(a: __m512, b: __m512) -> __m512 {
            avx512!(_mm512_max_ps(b, a))
        }
        /// As integers: floats from zero up order as their bits do, and NaN above them.
        #[inline(always)]
        fn max(a: __m512, b: __m512) -> __m512 {
            avx512!(_mm512_castsi512_ps(_mm512_max_epu32(
                _mm512_castps_si512(a),
                _mm512_castps_si512(b)
            )))
        }
        /// As the function, with an instruction for its last steps.
        #[inline(always)]
        fn exp2(x: __m512) -> __m512 {
            let round = Self::splat(ROUND);
            let n = avx512!(_mm512_sub_ps(Self::add(x, round), round));
            let f = avx512!(_mm512_sub_ps(x, n));
            let [first, rest @ ..] = COEFFICIENTS;
            let mut p = Self::splat(first);
            for c in rest {
                p = Self::fma(p, f, Self::splat(c));
            }
            // True for NaN.
            let normal = avx512!(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, Self::splat(LOW)));
            avx512!(_mm512_maskz_scalef_ps(normal, p, n))
        }
    }
}

/// Below this, the least normal f32's logarithm, `exp2` is 0.
const LOW: f32 = -126.0;
/// 1.5 · 2²³: adding it rounds to an integer, which then sits in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;
/// Of `2ᶠ` for |f| <= 1/2, highest power first: minimax by Remez' algorithm, relative error 1.9e-9.
const COEFFICIENTS: [f32; 7] = [
    1.534_581_2e-4,
    1.339_993_1e-3,
    9.618_489e-3,
    5.550_328_6e-2,
    2.402_264_6e-1,
    6.931_472e-1,
    1.0,
];

/// `2ˣ` to about one ulp below 2^127.5; 0 below the least normal f32, NaN stays NaN.
#[inline(always)]
pub(super) fn exp2<A: Arithmetic>(x: f32) -> f32 {
    // Written so that NaN passes both.
    let c = if x < LOW { LOW } else { x };
    let c = if c > 128.0 { 128.0 } else { c };
    let t = c + ROUND;
    let f = c - (t - ROUND);
    let [first, rest @ ..] = COEFFICIENTS;
    let mut p = first;
    for c in rest {
        p = A::mul_add(p, f, c);
    }
    let n = t.to_bits().wrapping_sub(ROUND.to_bits());
    let y = p * f32::from_bits(n.wrapping_add(127) << 23);
    if x < LOW { 0.0 } else { y }
}

/// A loop to be compiled for several instruction sets. It and what it calls must be `#[inline(always)]`, or they stay
/// portable code.
pub(super) trait Kernel {
    type Output;
    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// What of the machine's instructions is used. Each level has those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the target is compiled for.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// Dot products of bf16.
    Avx512Bf16,
    /// The tile unit for bf16.
    Amx,
}

impl Isa {
    /// The best that the machine has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if !(has!("avx2") && has!("fma")) {
                return Self::Portable;
            }
            if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
                return Self::Avx2;
            }
            super::pairs::best().unwrap_or(Self::Avx512)
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Portable
    }

    /// Runs a kernel compiled for these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
            fn avx512<K: Kernel>(kernel: K) -> K::Output {
                kernel.run::<Wide>()
            }
            #[target_feature(enable = "avx2,fma")]
            fn avx2<K: Kernel>(kernel: K) -> K::Output {
                kernel.run::<Fused>()
            }
            // Not trusted: the value may have been made by hand.
            match self.min(Self::best()) {
                Self::Portable => kernel.run::<Plain>(),
                #[allow(unsafe_code, reason = "measured: see benches/README.md")]
                // SAFETY: the machine has the features; the function asks for nothing else.
                Self::Avx2 => unsafe { avx2(kernel) },
                #[allow(unsafe_code, reason = "measured: see benches/README.md")]
                // SAFETY: as above.
                Self::Avx512 | Self::Avx512Bf16 | Self::Amx => unsafe { avx512(kernel) },
            }
        }
        #[cfg(target_arch = "aarch64")]
        return kernel.run::<Fused>();
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        kernel.run::<Plain>()
    }
}
