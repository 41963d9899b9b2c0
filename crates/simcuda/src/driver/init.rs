//! cuInit, the driver's version, and the texts of errors.

use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};

use super::abi::Out;
use super::status::{Cu, Status};

/// The emulated driver: CUDA 12.0, whose newest PTX is 8.0.
pub const CUDA_VERSION: i32 = 12000;
pub const PTX_VERSION: (u32, u32) = (8, 0);

static INITIALISED: AtomicBool = AtomicBool::new(false);

/// CUDA_ERROR_NOT_INITIALIZED before cuInit.
pub fn check() -> Cu {
    if INITIALISED.load(Ordering::Acquire) { Ok(()) } else { Err(Status::NOT_INITIALIZED) }
}

/// A number that a process may change before it starts, to be told what it would be told elsewhere.
pub fn from_environment(name: &str, otherwise: i32) -> i32 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

entries! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        INITIALISED.store(true, Ordering::Release);
        Ok(())
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        version.set(from_environment("SIMCUDA_VERSION", CUDA_VERSION))
    }

    fn cuGetErrorName(error: u32, text: Out<*const c_char>) {
        describe(error, &text, |row| row.1)
    }

    fn cuGetErrorString(error: u32, text: Out<*const c_char>) {
        describe(error, &text, |row| row.2)
    }

    /// There is nothing to profile.
    fn cuProfilerStart() {
        check()
    }

    fn cuProfilerStop() {
        check()
    }
}

fn describe(
    error: u32,
    text: &Out<*const c_char>,
    column: fn(&(u32, &'static str, &'static str)) -> &'static str,
) -> Cu {
    let Some(row) = Status::TABLE.iter().find(|row| row.0 == error) else {
        text.set_if_wanted(std::ptr::null());
        return Err(Status::INVALID_VALUE);
    };
    let c = CStr::from_bytes_with_nul(column(row).as_bytes()).map_err(|_| Status::UNKNOWN)?;
    text.set(c.as_ptr())
}
