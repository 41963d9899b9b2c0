//! The driver API: every `cu*` symbol that cudarc 0.19.10 declares, exported from the shared library.
//!
//! What the library's safe and result layers reach has the semantics of a driver for CUDA 12.0 on 64 H100-like
//! devices, refusals included: a lenient driver would hide bugs. The rest answers CUDA_ERROR_NOT_SUPPORTED and leaves
//! a report with the function's name.
//!
//! * One lock per device; a call that concerns two devices takes their locks one after the other, never both.
//! * Handles are table ids, never addresses: a wrong or destroyed one is an error code, not a crash.
//! * Work is a task with explicit predecessors ([`work`]). A policy decides when tasks run; vector clocks decide what
//!   is ordered, so that a missing wait is found whatever the order was.
//! * The host counts as one actor. The driver cannot see how host threads synchronise with each other, so what one
//!   thread waited for counts as known to all.
#![allow(unsafe_code, reason = "exported C symbols, and the caller's pointers")]
#![allow(non_snake_case, reason = "the driver API's names")]

/// Defines exported driver functions. Nothing unwinds across C, and no call is made from a host function.
macro_rules! entries {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $ty),*) -> u32 {
            crate::driver::guard(stringify!($name), || -> crate::driver::status::Cu { $body })
        }
    )*};
}

mod abi;
mod attributes;
mod capture;
mod clock;
mod context;
mod control;
mod copy;
mod device;
mod event;
mod graph;
mod handle;
mod init;
mod launch;
mod memory;
mod module;
pub(crate) mod occupancy;
mod pinned;
mod pool;
mod run;
mod status;
mod stream;
mod unsupported;
pub(crate) mod wire;
mod work;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Class, Report};
use status::{Cu, Status};

thread_local! {
    /// Set while a host function runs on this thread.
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
    /// Identity of the thread, for per-thread streams and capture rules.
    static THREAD: u64 = NEXT_THREAD.fetch_add(1, Ordering::Relaxed);
}
static NEXT_THREAD: AtomicU64 = AtomicU64::new(1);

/// Identity of the calling thread.
fn thread() -> u64 {
    THREAD.with(|id| *id)
}

/// Runs one entry point and turns what comes out into a CUresult.
fn guard(name: &str, call: impl FnOnce() -> Cu) -> u32 {
    if IN_HOST_FUNCTION.get() {
        return Status::NOT_PERMITTED.0;
    }
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => Status::SUCCESS.0,
        Ok(Err(status)) => {
            if status == Status::NOT_SUPPORTED {
                log(finding(Class::Unsupported, format!("{name}: not simulated")));
            }
            status.0
        }
        Err(panic) => {
            let text = (panic.downcast_ref::<String>().map(String::as_str))
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            log(finding(
                Class::Unsupported,
                format!("{name} panicked inside the simulator: {text}"),
            ));
            Status::UNKNOWN.0
        }
    }
}

/// A report that is not about a launch.
fn finding(class: Class, message: String) -> Report {
    Report {
        class,
        message,
        kernel: String::new(),
        source: None,
        instruction: String::new(),
        thread: None,
    }
}

/// Adds a report to the current device, or to device 0 where none is current.
fn log(report: Report) {
    let ordinal = context::peek().and_then(|context| context.ordinal()).unwrap_or(0);
    if let Some(mut device) = device::lock(ordinal) {
        device.log.reports.push(report);
    }
}
