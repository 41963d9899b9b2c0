//! Window attention as the reference workload has it (one pass over K, when the prefill's log-sum-exp is lent), and what
//! only the kernels refuse.

use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Reduce, WindowAttention};
use kvbudget::{Dtype, Error};
use kvbudget_testkit::data::{segment_lens, with_layers};
use kvbudget_testkit::generate::Spec;

use crate::device::Gpu;

const OP: WindowAttention = WindowAttention::plain(32, Reduce::Mean);

fn run(gpu: &Gpu, spec: &Spec, op: &WindowAttention) -> kvbudget::Result<()> {
    let layers = [spec.build()];
    let mut out = gpu.cuda.zeros(&segment_lens(&layers))?;
    let mut mean = gpu.cuda.zeros(&segment_lens(&layers))?;
    with_layers(gpu, &layers, |views| {
        gpu.cuda.window_attention(op, views, &mut out, Some(&mut mean))
    })
}

/// A group of 4 and a window of 32: a block's rows.
fn reference() -> Spec {
    let base = Spec { tokens: 2080, queries: 32, group: 4, dim: 128, ..Spec::default() };
    Spec { kv_heads: 1, dtype: Dtype::BF16, lse: true, ..base }
}

#[test]
fn a_lent_log_sum_exp_leaves_one_launch_and_one_pass() {
    if simcuda::install() == simcuda::Installed::RealDriver {
        return;
    }
    for (over_window, over_group, kernel) in [
        (Reduce::Mean, Reduce::Mean, "sum"),
        (Reduce::Mean, Reduce::Max, "sum"),
        (Reduce::Max, Reduce::Max, "max"),
        (Reduce::Max, Reduce::Mean, "max"),
    ] {
        let gpu = Gpu::new();
        let spec = reference();
        run(&gpu, &spec, &WindowAttention { over_window, over_group, ..OP }).expect("a score");
        let launches =
            |name: &str| simcuda::counters(gpu.ordinal, &format!("window_attention_{name}"));
        let (count, counters) = launches(&format!("{kernel}_128"));
        assert_eq!(count, 1);
        for other in ["lse_128", "rows", "merge"] {
            assert_eq!(launches(other).0, 0, "{other}");
        }
        // Chunks of 1024: 2048 slots before the window in two blocks, each of which reads all queries.
        let (keys, queries) = (2048 * 256, 2 * 128 * 256);
        let loaded = counters.global_load.sectors * 32;
        assert!(loaded <= (keys + queries) * 103 / 100, "{loaded} bytes loaded");
        let once = counters.dram_read_sectors * 32;
        assert!(once <= (keys + queries / 2) * 101 / 100, "{once} bytes from outside");
        assert_eq!(counters.mma, 2048 / 64 * 4 * 128, "no product is wasted");
        let shared = &counters.shared_load;
        assert_eq!(shared.wavefronts, shared.ideal_wavefronts, "bank conflicts");
    }
}

#[test]
fn what_the_kernels_are_too_small_for() {
    let gpu = Gpu::new();
    let spec = Spec { tokens: 40, queries: 32, ..Spec::default() };
    let pooled = WindowAttention { row_pool: Some(33), ..OP };
    let error = run(&gpu, &spec, &pooled).expect_err("a wide kernel");
    assert_eq!(error, Error::TooLarge { what: "row pooling kernel on CUDA", got: 33, limit: 31 });
    let error = run(&gpu, &Spec { dim: 264, ..spec.clone() }, &OP).expect_err("a wide head");
    assert_eq!(error, Error::TooLarge { what: "head dim on CUDA", got: 264, limit: 256 });
    let error = run(&gpu, &Spec { dim: 6, ..spec }, &OP).expect_err("rows of 24 bytes");
    assert_eq!(error, Error::Misaligned { what: "keys", got: 24, expected: 16 });
}
