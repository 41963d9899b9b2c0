//! The PTX that the CUDA backend embeds was made from the sources beside it.
//!
//! Nothing is compiled here: the PTX is checked in, `kernels/ptx/manifest.json` holds the hashes of what it was made
//! from. A stale file is an error at build time instead of a wrong number on a GPU.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    check();
}

#[cfg(feature = "cuda")]
fn check() {
    use sha2::{Digest, Sha256};

    println!("cargo:rerun-if-changed=kernels");
    let read = |path: &str| {
        std::fs::read(path).unwrap_or_else(|e| panic!("kvbudget: {path} cannot be read: {e}"))
    };
    let manifest =
        String::from_utf8(read("kernels/ptx/manifest.json")).expect("the manifest is text");
    let hash = |path: &str| {
        Sha256::digest(read(path)).iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    for folder in ["kernels", "kernels/ptx"] {
        let entries =
            std::fs::read_dir(folder).unwrap_or_else(|e| panic!("kvbudget: {folder}: {e}"));
        for entry in entries {
            let path = entry.expect("a folder's entry").path();
            let path = path.to_str().expect("names of kernels are text");
            // A hash is of one file only: that it is named at all is enough.
            if (path.ends_with(".cu") || path.ends_with(".cuh") || path.ends_with(".ptx"))
                && !manifest.contains(&hash(path))
            {
                panic!(
                    "kvbudget: {path} is not what kernels/ptx/manifest.json was made from; run scripts/ptx"
                );
            }
        }
    }
}
