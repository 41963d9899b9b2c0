//! How kernels touch memory, by the simulator's counters: what a reference cannot see.

use simcuda::Counters;

/// Kernels whose shared memory has no bank conflicts, and kernels that use every byte of every sector they move.
const CONFLICT_FREE: [&str; 9] = [
    "pool_avg",
    "window_attention_scores_bf16",
    "window_attention_lse_bf16",
    "window_attention_sum_bf16",
    "window_attention_scores_f16",
    "window_attention_lse_f16",
    "window_attention_sum_f16",
    "attend_bf16",
    "attend_f16",
];
const WHOLE_SECTORS: [&str; 2] = ["gather", "gather_in_place"];

/// What is wasted on a device so far, if anything. `launched` says whether a kernel of a list ran at all.
pub fn waste(counters: impl Fn(&str) -> (u64, Counters)) -> Result<Option<String>, &'static str> {
    let (mut seen, mut wasted) = (false, None);
    let mut look = |kernel: &str, what: &str, actual: u64, ideal: u64| {
        if actual != ideal {
            wasted.get_or_insert(format!("{kernel}: {actual} {what}, {ideal} would do"));
        }
    };
    for kernel in CONFLICT_FREE {
        let (launches, c) = counters(kernel);
        seen |= launches > 0;
        look(
            kernel,
            "wavefronts of shared loads",
            c.shared_load.wavefronts,
            c.shared_load.ideal_wavefronts,
        );
        look(
            kernel,
            "wavefronts of shared stores",
            c.shared_store.wavefronts,
            c.shared_store.ideal_wavefronts,
        );
    }
    for kernel in WHOLE_SECTORS {
        let (launches, c) = counters(kernel);
        seen |= launches > 0;
        look(kernel, "sectors stored", c.global_store.sectors, c.global_store.ideal_sectors);
    }
    if seen { Ok(wasted) } else { Err("no kernel with a promised access pattern was launched") }
}
