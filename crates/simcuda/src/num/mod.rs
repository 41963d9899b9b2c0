//! Arithmetic the host does not have: the other rounding directions, 16-bit floats, approximations with a documented
//! error, and matrix fragments. Pure functions of values, so that they are tested apart from the interpreter.
//!
//! Everything per lane is branch-free and `#[inline(always)]`: it is compiled into the loops of `exec::alu` once for
//! each level of vector instructions.

pub mod approx;
pub mod half;
pub mod matrix;
pub mod mma;
#[cfg(test)]
pub mod oracle;
pub mod round;

/// Whether functions compiled for `avx2,bmi1,bmi2,fma,lzcnt,popcnt` may be called.
#[cfg(target_arch = "x86_64")]
pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}
