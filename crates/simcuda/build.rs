//! Names the shared library `libcuda.so` (by SONAME: with `libcuda.so.1`, a machine's real driver would win) and
//! tells the Rust half where cargo puts it.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let deps = Path::new(&out).join("../../../deps");
    println!("cargo:rustc-env=SIMCUDA_DEPS_DIR={}", deps.display());
}
