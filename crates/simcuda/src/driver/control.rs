//! What tests ask of the simulator beside the driver API: `simcuda_ctl_*`, called by this crate's Rust half.
//!
//! Each returns 0, or 1 where device or arguments do not exist.

use super::abi::{Host, In};
use super::device::{self, Device};
use super::wire::{self, POLICY_WORDS, Sink};

/// Runs `call` on a device, no unwinding across C.
fn on(ordinal: u64, call: impl FnOnce(&mut Device) -> Option<()>) -> u64 {
    let call =
        || device::lock(usize::try_from(ordinal).ok()?).and_then(|mut device| call(&mut device));
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    u64::from(!matches!(done, Ok(Some(()))))
}

/// Hands bytes over to the other half.
fn give(sink: Sink, to: *mut Vec<u8>, bytes: &[u8]) {
    sink(to, bytes.as_ptr(), bytes.len());
}

/// Sets how the device's work runs from now on; what is pending runs first.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_policy(ordinal: u64, words: In<[u64; POLICY_WORDS]>) -> u64 {
    on(ordinal, |device| {
        let policy = wire::policy(&words.get().ok()?)?;
        device.drain();
        device.work.reseed(policy.seed);
        device.policy = policy;
        Some(())
    })
}

/// Takes the reports, after all pending work ran.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_reports(ordinal: u64, sink: Sink, to: *mut Vec<u8>) -> u64 {
    on(ordinal, |device| {
        device.drain();
        let reports = std::mem::take(&mut device.log.reports);
        give(sink, to, &wire::report_bytes(&reports));
        Some(())
    })
}

/// Launches of a kernel and their counters, since the last clear, after all pending work ran.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_counters(
    ordinal: u64,
    name: Host,
    length: u64,
    sink: Sink,
    to: *mut Vec<u8>,
) -> u64 {
    on(ordinal, |device| {
        device.drain();
        let name = std::str::from_utf8(name.bytes(length as usize)).ok()?;
        let (launches, sum) = device.log.counters.get(name).cloned().unwrap_or_default();
        let words: Vec<u64> = std::iter::once(launches).chain(sum.to_words()).collect();
        give(sink, to, &wire::word_bytes(&words));
        Some(())
    })
}

/// How often the host waited for the device since the last clear, as one word.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_waits(ordinal: u64, sink: Sink, to: *mut Vec<u8>) -> u64 {
    on(ordinal, |device| {
        give(sink, to, &wire::word_bytes(&[device.log.waits]));
        Some(())
    })
}

/// Takes what `printf` wrote, after all pending work ran.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_printed(ordinal: u64, sink: Sink, to: *mut Vec<u8>) -> u64 {
    on(ordinal, |device| {
        device.drain();
        give(sink, to, std::mem::take(&mut device.log.printed).as_bytes());
        Some(())
    })
}

/// Forgets the counters and the waits.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_clear(ordinal: u64) -> u64 {
    on(ordinal, |device| {
        device.drain();
        device.log.counters.clear();
        device.log.waits = 0;
        Some(())
    })
}

/// Ends the device's contexts and forgets policy, reports, counters and output.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_ctl_reset(ordinal: u64) -> u64 {
    on(ordinal, |device| {
        device.reset();
        Some(())
    })
}
