//! The half that tests link: it loads the other half, the driver, and asks it for reports and counters.
//!
//! The shared library is loaded by its absolute path before cudarc looks for a driver; cudarc asks the loader for
//! `libcuda.so`, which by its SONAME is then the one already loaded. With `SIMCUDA=0` in the environment nothing is
//! loaded, the same tests run on a real driver, and the questions below have empty answers.
#![allow(unsafe_code, reason = "loads a shared library and calls into it")]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::driver::wire::{self, POLICY_WORDS, Sink};
use crate::{Counters, Policy, Report};

/// What runs the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// This crate.
    Simulated,
    /// The system's driver, by `SIMCUDA=0`.
    RealDriver,
}

/// The control functions of the loaded library.
struct Control {
    policy: extern "C" fn(u64, *const [u64; POLICY_WORDS]) -> u64,
    reports: extern "C" fn(u64, Sink, *mut Vec<u8>) -> u64,
    counters: extern "C" fn(u64, *const u8, u64, Sink, *mut Vec<u8>) -> u64,
    waits: extern "C" fn(u64, Sink, *mut Vec<u8>) -> u64,
    printed: extern "C" fn(u64, Sink, *mut Vec<u8>) -> u64,
    clear: extern "C" fn(u64) -> u64,
    reset: extern "C" fn(u64) -> u64,
}

static CONTROL: OnceLock<Option<Control>> = OnceLock::new();

/// Makes this process's driver the simulated one, unless `SIMCUDA=0`. To be called before cudarc is.
///
/// # Panics
/// Where the shared library is missing or cannot be loaded: this is a helper of tests.
pub fn install() -> Installed {
    match control() {
        Some(_) => Installed::Simulated,
        None => Installed::RealDriver,
    }
}

/// A device that no other living thread has, as if the process had just begun. On a real driver it is device 0.
///
/// cargo runs each test on its own thread: one test, one device, with memory, reports and sticky errors of its own.
/// It is given back when the thread ends.
///
/// # Panics
/// Where 64 devices are taken.
pub fn device() -> usize {
    let Some(control) = control() else { return 0 };
    let ordinal = {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let free =
            taken.iter().position(|taken| !taken).expect("64 devices are taken by living threads");
        taken[free] = true;
        free
    };
    MINE.with_borrow_mut(|mine| mine.push(Taken(ordinal)));
    check((control.reset)(ordinal as u64), ordinal);
    ordinal
}

/// How work on a device runs from now on.
pub fn set_policy(device: usize, policy: Policy) {
    if let Some(control) = control() {
        check((control.policy)(device as u64, &wire::policy_words(&policy)), device);
    }
}

/// Takes what the checks found on a device. Runs its pending work first.
pub fn reports(device: usize) -> Vec<Report> {
    let bytes = ask(device, |control, to| (control.reports)(device as u64, collect, to));
    wire::reports(&bytes).expect("both halves come from one build")
}

/// Panics with the reports if any check found something on a device.
///
/// # Panics
/// That is its purpose.
pub fn assert_clean(device: usize) {
    let reports = reports(device);
    assert!(
        reports.is_empty(),
        "device {device}:\n{}",
        reports.iter().map(|r| format!("{r}\n")).collect::<String>()
    );
}

/// How often a kernel was launched on a device since the last [`clear_counters`], and the sum of what those launches
/// did. Nothing on a real driver.
pub fn counters(device: usize, kernel: &str) -> (u64, Counters) {
    let bytes = ask(device, |control, to| {
        (control.counters)(device as u64, kernel.as_ptr(), kernel.len() as u64, collect, to)
    });
    match wire::words(&bytes).split_first() {
        None => Default::default(),
        Some((&launches, words)) => {
            (launches, Counters::from_words(words).expect("both halves come from one build"))
        }
    }
}

/// How often the host waited for a device since the last [`clear_counters`]: for a stream, an event, everything, or a
/// copy into its own memory. 0 on a real driver.
pub fn waits(device: usize) -> u64 {
    let bytes = ask(device, |control, to| (control.waits)(device as u64, collect, to));
    wire::words(&bytes).first().copied().unwrap_or_default()
}

/// Starts the counters of a device anew.
pub fn clear_counters(device: usize) {
    if let Some(control) = control() {
        check((control.clear)(device as u64), device);
    }
}

/// Takes what kernels on a device printed.
pub fn printed(device: usize) -> String {
    String::from_utf8_lossy(&ask(device, |control, to| {
        (control.printed)(device as u64, collect, to)
    }))
    .into_owned()
}

/// Which devices living threads have.
static TAKEN: Mutex<[bool; 64]> = Mutex::new([false; 64]);

struct Taken(usize);

impl Drop for Taken {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.0] = false;
    }
}

thread_local! {
    static MINE: RefCell<Vec<Taken>> = const { RefCell::new(Vec::new()) };
}

fn check(failed: u64, device: usize) {
    assert!(failed == 0, "expected one of the 64 simulated devices, got {device}");
}

/// The bytes of an answer; none on a real driver.
fn ask(device: usize, call: impl FnOnce(&Control, *mut Vec<u8>) -> u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(control) = control() {
        check(call(control, &mut bytes), device);
    }
    bytes
}

extern "C" fn collect(to: *mut Vec<u8>, bytes: *const u8, count: usize) {
    // SAFETY: `to` is the vector of `ask`, and the other half gives `count` bytes that live during this call.
    unsafe { (*to).extend_from_slice(std::slice::from_raw_parts(bytes, count)) }
}

fn control() -> Option<&'static Control> {
    let load = || (std::env::var_os("SIMCUDA").is_none_or(|value| value != "0")).then(load);
    CONTROL.get_or_init(load).as_ref()
}

fn load() -> Control {
    let path = find();
    let name = CString::new(path.as_os_str().as_bytes()).expect("a path has no NUL");
    // SAFETY: loading runs nothing but the library's own initialisers.
    let library = unsafe {
        libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE)
    };
    assert!(!library.is_null(), "simcuda: cannot load {}: {}", path.display(), loader_error());
    // SAFETY: each symbol is the function of that name in `driver::control`, with the signature of the field: both
    // halves come from one build.
    unsafe {
        Control {
            policy: symbol(library, c"simcuda_ctl_policy"),
            reports: symbol(library, c"simcuda_ctl_reports"),
            counters: symbol(library, c"simcuda_ctl_counters"),
            waits: symbol(library, c"simcuda_ctl_waits"),
            printed: symbol(library, c"simcuda_ctl_printed"),
            clear: symbol(library, c"simcuda_ctl_clear"),
            reset: symbol(library, c"simcuda_ctl_reset"),
        }
    }
}

/// # Safety
/// The symbol must be a function of type `F`.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    // SAFETY: the library is loaded and never unloaded.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    assert!(!found.is_null(), "simcuda: libsimcuda.so has no {name:?}: {}", loader_error());
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a function pointer has the size of a pointer, and the caller vouches for its type.
    unsafe { std::mem::transmute_copy(&found) }
}

fn loader_error() -> String {
    // SAFETY: dlerror returns null or a C string that lives until the thread's next call to the loader.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "no reason given".into()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// The shared library: beside the test's executable, where cargo puts both, or where this crate was built.
fn find() -> PathBuf {
    let executable = std::env::current_exe().expect("the process has an executable");
    let beside = executable.parent().expect("an executable lies in a folder");
    let folders = [
        beside.to_path_buf(),
        beside.join("deps"),
        beside.join("../deps"),
        env!("SIMCUDA_DEPS_DIR").into(),
    ];
    let candidates: Vec<PathBuf> =
        folders.iter().map(|folder| folder.join("libsimcuda.so")).collect();
    let found = candidates.iter().find(|path| path.is_file()).map(|path| Path::canonicalize(path));
    match found {
        Some(Ok(path)) => path,
        _ => panic!(
            "simcuda: no libsimcuda.so, looked for {candidates:?}; `cargo test` builds it for a dev-dependency"
        ),
    }
}
