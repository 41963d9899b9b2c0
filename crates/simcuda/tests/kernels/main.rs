//! The shipped PTX, launched by cudarc on the simulated device and compared with the references, under every policy.

#![allow(
    unsafe_code,
    reason = "launching a kernel is unsafe, and so is telling cudarc how arguments are laid out"
)]

mod attention;
mod copy;
mod gpu;
mod patterns;
#[path = "../reference/mod.rs"]
mod reference;
mod rows;
mod top_k;

use gpu::{Drive, Gpu};

/// Under each policy the right result, and nothing to report.
fn check(ptx: &str, drive: Drive) {
    simcuda::install();
    let device = simcuda::device();
    for policy in gpu::policies() {
        let gpu = Gpu::new(device, ptx, policy).expect("a device and its module");
        let outcome = drive(&gpu).and_then(|()| Ok(gpu.stream.synchronize()?));
        // First: a report says more than the error it makes.
        simcuda::assert_clean(device);
        if let Err(failure) = outcome {
            panic!("{failure} under {policy:?}");
        }
    }
}

macro_rules! kernels {
    ($($file:literal: $drive:path as $name:ident,)*) => {
        $(#[test]
        fn $name() {
            check(include_str!(concat!("../../../../kernels/ptx/", $file, ".ptx")), $drive);
        })*
    };
}

kernels! {
    "reduce": rows::reduce as reduce,
    "softmax": rows::softmax as softmax,
    "pool": rows::pool as pool,
    "top_k": top_k::top_k as top_k_selects,
    "gather": copy::gather as gather,
    "append": copy::append as append,
    "window_attention": attention::window_attention as window_attention,
    "attend": attention::attend as attend,
}

/// Shared memory without bank conflicts, global memory in whole sectors, where kernels promise it.
#[test]
fn nothing_is_wasted() {
    if simcuda::install() == simcuda::Installed::RealDriver {
        println!("no counters on a real device: not run");
        return;
    }
    let drives: [(&str, Drive); 4] = [
        (include_str!("../../../../kernels/ptx/pool.ptx"), rows::pool),
        (include_str!("../../../../kernels/ptx/gather.ptx"), copy::gather_256_bytes),
        (include_str!("../../../../kernels/ptx/window_attention.ptx"), attention::window_attention),
        (include_str!("../../../../kernels/ptx/attend.ptx"), attention::attend),
    ];
    for (ptx, drive) in drives {
        let device = simcuda::device();
        let gpu =
            Gpu::new(device, ptx, simcuda::Policy::default()).expect("a device and its module");
        drive(&gpu)
            .and_then(|()| Ok(gpu.stream.synchronize()?))
            .expect("what the other tests pass");
        assert_eq!(patterns::waste(|kernel| simcuda::counters(device, kernel)), Ok(None));
    }
}
