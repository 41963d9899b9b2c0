//! Every symbol that cudarc declares is exported, so that none of its functions panics for a missing one.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::process::Command;

use super::{classes, context, cu, simulated};
use cudarc::driver::sys::CUresult;
use simcuda::Class;

/// cudarc's own list, from the source that this workspace builds.
fn declared() -> BTreeSet<String> {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline"])
        // Other platforms' crates were never fetched.
        .arg(format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH))
        .arg("--manifest-path")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .expect("cargo runs");
    let metadata = String::from_utf8(metadata.stdout).expect("JSON is UTF-8");
    let manifests =
        metadata.split(r#""manifest_path":""#).skip(1).filter_map(|rest| rest.split('"').next());
    let cudarc = manifests
        .filter_map(|path| path.strip_suffix("/Cargo.toml"))
        .find(|path| path.contains("/cudarc-"));
    let bindings = format!("{}/src/driver/sys/mod.rs", cudarc.expect("cudarc is a dependency"));
    let source =
        std::fs::read_to_string(&bindings).expect("cudarc's bindings are where 0.19.10 has them");
    let names = source.split(r#"load::<_F>(""#).skip(1).filter_map(|rest| rest.split('"').next());
    names.map(str::to_owned).collect()
}

#[test]
fn no_symbol_is_missing() {
    let (_, _context) = context();
    if !simulated() {
        return;
    }
    let declared = declared();
    assert!(declared.len() > 500, "expected cudarc's 514 names, got {}", declared.len());
    // SAFETY: the library is loaded, and looking up names runs nothing.
    let missing: Vec<&String> = unsafe {
        let library = libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        assert!(!library.is_null());
        assert!(!libc::dlsym(library, c"simcuda_ctl_reset".as_ptr()).is_null());
        let has =
            |name: &str| !libc::dlsym(library, CString::new(name).unwrap().as_ptr()).is_null();
        declared.iter().filter(|name| !has(name)).collect()
    };
    assert_eq!(missing, Vec::<&String>::new());
}

#[test]
fn what_is_not_simulated_says_so() {
    let (device, _context) = context();
    if !simulated() {
        return;
    }
    let mut address = 0;
    assert_eq!(cu!(cuMemAllocManaged(&mut address, 64, 1)), CUresult::CUDA_ERROR_NOT_SUPPORTED);
    let reports = simcuda::reports(device);
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].class, Class::Unsupported);
    assert!(reports[0].message.contains("cuMemAllocManaged"), "{}", reports[0]);
    assert_eq!(classes(device), []);
}
