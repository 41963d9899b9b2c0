//! The tile unit's instructions. Tiles 0 to 3 are a block of the product, 4 and 5 of the left operand, 6 and 7 of the right one.
//!
//! `unsafe` because they have no stable intrinsics. All but [`permitted`] are for holders of a
//! [`Unit`](super::Unit). Sources: Intel SDM, "Intel AMX"; the kernel's Documentation/arch/x86/xstate.rst for the permission
//! that a process has to ask for.
#![allow(unsafe_code, reason = "instructions without intrinsics")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

use half::bf16;

use super::{BLOCK, Line, STEP, TILE};

pub(super) fn permitted() -> bool {
    const TILE_BF16: u32 = 1 << 22 | 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: the caller has seen OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    if __cpuid_count(0, 0).eax < 7
        || __cpuid_count(7, 0).edx & TILE_BF16 != TILE_BF16
        || __cpuid_count(1, 0).ecx & OSXSAVE == 0
    {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction is there.
    if unsafe { enabled() } & TILE_STATE != TILE_STATE {
        return false;
    }
    // SAFETY: asks the kernel for a larger signal frame and save area; takes no pointer.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// Eight tiles of 16 rows and 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

static TILES: Configuration = Configuration {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

pub(super) fn configure() {
    // SAFETY: `Unit::open` has asserted that the unit is there and permitted; reads 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const TILES, options(nostack, readonly)) };
}

pub(super) fn release() {
    // SAFETY: as above; touches no memory. No `Unit` is left on this thread, so nothing uses tiles after it.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

#[inline(always)]
pub(super) fn zero() {
    // SAFETY: the caller has a `Unit`, so tiles are configured; touches no memory.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem)
        );
    }
}

/// Loads a step of a block of rows of the left operand.
#[inline(always)]
pub(super) fn load_left(steps: usize, step: usize, rows: &[bf16]) {
    assert!(rows.len() == BLOCK * steps * STEP && step < steps);
    // SAFETY: as in `zero`. Rows of tiles are a `Line` each, of which the rows have `steps`: 32, from the step's on,
    // all inside the slice by the assertion.
    unsafe {
        asm!(
            "tileloadd tmm4, [{rows} + {stride} * 1]",
            "tileloadd tmm5, [{below} + {stride} * 1]",
            rows = in(reg) rows.as_ptr().add(step * STEP),
            below = in(reg) rows.as_ptr().add((TILE * steps + step) * STEP),
            stride = in(reg) steps * size_of::<Line>(),
            options(nostack, readonly),
        );
    }
}

/// Loads a step of a block of columns of the right operand.
#[inline(always)]
pub(super) fn load_right(columns: &[Line]) {
    assert!(columns.len() == BLOCK);
    // SAFETY: as in `zero`. Rows of tiles are a `Line` each, 32 one after the other.
    unsafe {
        asm!(
            "tileloadd tmm6, [{columns} + {line} * 1]",
            "tileloadd tmm7, [{columns} + {line} * 1 + 1024]",
            columns = in(reg) columns.as_ptr(),
            line = in(reg) size_of::<Line>(),
            options(nostack, readonly),
        );
    }
}

/// Adds the product of what is loaded.
#[inline(always)]
pub(super) fn multiply() {
    // SAFETY: as in `zero`.
    unsafe {
        asm!(
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            options(nostack, nomem)
        );
    }
}

/// Writes the block: 32 rows of 32, `pitch` apart.
#[inline(always)]
pub(super) fn store(to: &mut [f32], pitch: usize) {
    assert!(pitch >= BLOCK && to.len() >= (BLOCK - 1) * pitch + BLOCK);
    // SAFETY: as in `zero`. Rows of tiles are 64 bytes; two by two tiles are 32 rows of 128 bytes, `pitch` elements
    // apart, inside `to` by the assertion.
    unsafe {
        asm!(
            "tilestored [{to} + {pitch} * 1], tmm0",
            "tilestored [{to} + {pitch} * 1 + 64], tmm1",
            "tilestored [{below} + {pitch} * 1], tmm2",
            "tilestored [{below} + {pitch} * 1 + 64], tmm3",
            to = in(reg) to.as_mut_ptr(),
            below = in(reg) to.as_mut_ptr().add(TILE * pitch),
            pitch = in(reg) pitch * size_of::<f32>(),
            options(nostack),
        );
    }
}
