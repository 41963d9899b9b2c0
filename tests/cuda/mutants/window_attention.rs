//! Seeded bugs of `window_attention.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::window_attention;

mutants! {
    "window_attention", window_attention::many_rows => {
        "window_attention_lse_64": "copies not waited for",
            [0..1, 1] "cp.async.wait_group 1;" => ""; By(AsyncNotWaited);
        "window_attention_lse_64": "a stage refilled while it is read",
            [3..4, 4] "bar.sync 0;" => ""; By(AsyncNotWaited), RACE;
        "window_attention_lse_64": "queries read before other lanes' copies have arrived",
            [0..1, 1] "bar.warp.sync -1;" => ""; By(AsyncNotWaited), RACE, UNINITIALISED;
        "window_attention_lse_64": "keys copied over queries that others still read",
            [1..2, 4] "bar.sync 0;" => ""; By(AsyncNotWaited), RACE;
        "window_attention_sum_64": "copies waited for one group short",
            [0..1, 1] "cp.async.wait_group 1;" => "cp.async.wait_group 2;"; By(AsyncNotWaited);
        "window_attention_sum_64": "copies waited for, no barrier",
            [2..3, 4] "bar.sync 0;" => ""; By(AsyncNotWaited), RACE, UNINITIALISED;
        "window_attention_sum_64": "the warps' sums read before they are written",
            [3..4, 4] "bar.sync 0;" => ""; By(AsyncNotWaited), RACE, UNINITIALISED;
        "window_attention_sum_64": "a shuffle to the wrong lane",
            [0..1, 4] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" =>
                "shfl.sync.bfly.b32 $1|$2, $3, 2, $5, $6;"; Reference;
        "window_attention_sum_64": "copies from half a unit further",
            [1..2, 3] "cp.async.cg.shared.global [$1], [$2], 16, $3;" =>
                "cp.async.cg.shared.global [$1], [$2+8], 16, $3;"; By(Misaligned);
        "window_attention_sum_64": "halves of a key swapped",
            [0..1, 32] "}, {$1, $2}, {" => "}, {$2, $1}, {"; Reference;
        "window_attention_max_64": "rows pooled before all lanes have written",
            [1..2, 3] "bar.warp.sync -1;" => ""; RACE, UNINITIALISED;
        "window_attention_merge": "a mean that is not divided",
            [1..2, 2] "div.rn.f32 $1, $2, $3;" => "mov.f32 $1, $2;"; Reference;
    }
    "window_attention", window_attention::long_rows => {
        "window_attention_rows": "chunks not brought to the same maximum",
            [0..1, 2] "ex2.approx.ftz.f32 $1, $2;" => "mov.f32 $1, 0f3F800000;"; Reference;
        "window_attention_max_64": "rows written while others still pool them",
            [2..3, 3] "bar.warp.sync -1;" => ""; RACE;
    }
    "window_attention", window_attention::non_finite => {
        "window_attention_max_f32": "a maximum that forgets NaN",
            [0..41, 41] "max.NaN.f32" => "max.f32"; Reference;
    }
}
