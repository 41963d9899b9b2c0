//! What cannot work says so, as an error with its cause.

use std::process::Command;

use half::f16;
use kvbudget::backend::Backend;
use kvbudget::backend::cuda::Cuda;
use kvbudget::{Error, LayerShape, LayerView, Rows};

use crate::device::Gpu;

/// What opening a device says in a process with these variables.
fn opening_says(variables: &[(&str, &str)]) -> String {
    let tests = std::env::current_exe().expect("this process has an executable");
    let output = Command::new(tests)
        .args(["--exact", "errors::a_device_is_opened", "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .output()
        .expect("it runs once more");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().find_map(|line| line.split("opened: ").nth(1));
    said.unwrap_or_else(|| panic!("no answer: {text}")).to_owned()
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn a_device_is_opened() {
    simcuda::install();
    println!("opened: {:?}", Cuda::new(0).map(|_| ()));
}

#[test]
fn machines_that_cannot_run_the_kernels() {
    let old = opening_says(&[("SIMCUDA_VERSION", "11080")]);
    assert_eq!(old, "Err(OldDriver { expected: 12000, got: 11080 })");
    let weak = opening_says(&[("SIMCUDA_CAPABILITY", "75")]);
    assert_eq!(weak, "Err(ComputeCapability { expected: (8, 0), got: (7, 5) })");
    assert_eq!(opening_says(&[("SIMCUDA_CAPABILITY", "80")]), "Ok(())");

    let real = opening_says(&[("SIMCUDA", "0")]);
    match std::path::Path::new("/dev/nvidiactl").exists() {
        true => println!("this machine has a driver: {real}"),
        false => assert!(real.starts_with("Err(NoDriver { reason: "), "{real}"),
    }
}

#[test]
fn no_such_device() {
    let gpu = Gpu::new();
    let error = Cuda::new(64).map(|_| ()).expect_err("64 devices");
    if simcuda::install() == simcuda::Installed::Simulated {
        assert_eq!(error, Error::NoDevice { ordinal: 64, count: 64 });
    }
    gpu.cuda.synchronize().expect("the others are not touched");
}

#[test]
fn device_memory_ends() {
    let gpu = Gpu::new();
    let error = gpu.cuda.zeros(&[i32::MAX as u32; 100]).map(|_| ()).expect_err("800 GB");
    assert!(matches!(error, Error::OutOfMemory { bytes: 858_993_459_200.., .. }), "{error}");
    let rows = gpu.cuda.zeros(&[3]).expect("there is room for less");
    assert_eq!(gpu.cuda.to_host(&rows).expect("rows").row(0), [0.0; 3]);
}

#[test]
fn rows_that_vectors_cannot_read() {
    let gpu = Gpu::new();
    let shape = |dim| LayerShape::new(1, 1, dim).expect("a shape");
    let score = |dim: u32, stride: usize, elements: usize| {
        let tensor = gpu.cuda.tensor(&vec![f16::ONE; elements]).expect("memory");
        let rows = Rows::strided(tensor.lend(), 1, 2, dim, 0, stride).expect("two rows");
        let view = LayerView::new(shape(dim), 2, rows, rows).expect("a view");
        let mut out = gpu.cuda.zeros(&[2]).expect("memory");
        gpu.cuda.key_norm(&[view], &mut out)
    };
    score(16, 24, 64).expect("16 and 48 bytes");
    let misaligned = |got| Err(Error::Misaligned { what: "keys", expected: 16, got });
    assert_eq!(score(20, 32, 64), misaligned(40));
    assert_eq!(score(16, 20, 64), misaligned(40));
    assert!(matches!(score(264, 264, 600), Err(Error::TooLarge { got: 264, limit: 256, .. })));
}
