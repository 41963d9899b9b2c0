//! The shipped PTX, launched by cudarc on the simulated device and compared with the references, under every policy.

#![allow(
    unsafe_code,
    reason = "launching a kernel is unsafe, and so is telling cudarc how arguments are laid out"
)]

mod attention;
mod copy;
mod gpu;
mod mutants;
mod patterns;
mod reference;
mod rows;
mod top_k;

use gpu::{Drive, Gpu};
use simcuda::Policy;

/// Under each policy the right result, and nothing to report.
fn check(ptx: &str, drive: Drive, policies: &[Policy]) {
    simcuda::install();
    let device = simcuda::device();
    for &policy in policies {
        let gpu = Gpu::new(device, ptx, policy).expect("a device and its module");
        let outcome = drive(&gpu).and_then(|()| Ok(gpu.stream.synchronize()?));
        // First: a report says more than the error it makes.
        simcuda::assert_clean(device);
        if let Err(failure) = outcome {
            panic!("{failure} under {policy:?}");
        }
    }
}

/// `file: drive as name, so many policies;`
macro_rules! kernels {
    ($($file:literal: $drive:path as $name:ident, $policies:literal;)*) => {
        $(#[test]
        fn $name() {
            check(include_str!(concat!("../../../../kernels/ptx/", $file, ".ptx")), $drive, &gpu::policies()[..$policies]);
        })*
    };
}

kernels! {
    "reduce": rows::reduce as reduce, 6;
    "softmax": rows::softmax as softmax, 6;
    "pool": rows::pool as pool, 6;
    "top_k": top_k::top_k as top_k_selects, 6;
    "top_k": top_k::top_k_of_many as top_k_of_many_segments, 1;
    "gather": copy::gather as gather, 6;
    "append": copy::append as append, 6;
    "window_attention": attention::window_attention as window_attention, 6;
    "attend": attention::attend as attend, 6;
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
        let gpu = Gpu::new(device, ptx, Policy::default()).expect("a device and its module");
        drive(&gpu)
            .and_then(|()| Ok(gpu.stream.synchronize()?))
            .expect("what the other tests pass");
        assert_eq!(patterns::waste(|kernel| simcuda::counters(device, kernel)), Ok(None));
    }
}

/// The size that the simulator is built for, all checks on, in half a second of one core: the whole suite rests on it.
#[test]
fn fast_enough() {
    if simcuda::install() == simcuda::Installed::RealDriver {
        println!("the simulator's speed is none of a real device: not run");
        return;
    }
    let ptx = include_str!("../../../../kernels/ptx/window_attention.ptx");
    let device = simcuda::device();
    let gpu = Gpu::new(device, ptx, simcuda::Policy::default()).expect("a device and its module");
    // The best of three: whoever else is on the machine takes caches and half of a core.
    let times = [(); 3].map(|()| {
        simcuda::clear_counters(device);
        attention::window_attention_at_size(&gpu).expect("scores as the reference has them")
    });
    let seconds = times.into_iter().fold(f64::INFINITY, f64::min);
    simcuda::assert_clean(device);
    let (_, counters) = simcuda::counters(device, "window_attention_scores_bf16");
    println!("{seconds:.3} s of one core for\n{counters}");
    println!("{}", simcuda::Roofline::of(&counters, &simcuda::H100_SXM));
    assert_eq!(counters.mma, 65_536);
    assert!(seconds <= 0.5, "{seconds:.3} s");
}
