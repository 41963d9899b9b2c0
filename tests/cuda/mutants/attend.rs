//! Seeded bugs of `attend.cu` and `attend_mma.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::attend;

/// Full chunks only.
const ROUNDED_DOWN: &str = "{ .reg .b32 %length; sub.u32 %length, $2, $3; add.u32 %length, %length, 1; \
    div.u32 $1, %length, $3; }";

mutants! {
    "attend", attend::splits => {
        "attend_plan": "no barrier before the sums of warps are read", [1..2, 2] "bar.sync 0;" => "";
            UNINITIALISED, RACE;
        "attend_plan": "the rest of a segment gets no item",
            [0..1, 1] "div.u32 $1, $2, $3;" => ROUNDED_DOWN; UNINITIALISED, Reference;
        "attend_plan": "items of later segments over those of the first ones",
            [0..1, 1] "shfl.sync.idx.b32 $1|$2, $3, $4, $4, $5;" => "mov.u32 $1, 0;"; UNINITIALISED, Reference;
        "attend_f32": "keys are not waited for", [1..2, 2] "cp.async.wait_group 1;" => "";
            By(AsyncNotWaited), UNINITIALISED;
        "attend_f32": "no barrier between weights and their use", [1..2, 3] "bar.warp.sync -1;" => "";
            RACE, UNINITIALISED;
        "attend_f32": "a stage refilled while lanes still read it", [2..3, 3] "bar.warp.sync -1;" => ""; RACE;
    }
    "attend_mma", attend::splits => {
        "attend_mma_f16_64": "a stage refilled while lanes still read it",
            [1..2, 2] "bar.warp.sync -1;" => ""; RACE;
        "attend_mma_f16_64": "queries of an item over partial outputs of the last one",
            [0..1, 4] "bar.sync 0;" => ""; RACE;
    }
    "attend_mma", attend::dims => {
        "attend_mma_f16_64": "keys are not waited for", [1..2, 2] "cp.async.wait_group 1;" => "";
            By(AsyncNotWaited), UNINITIALISED;
        "attend_mma_f16_64": "the ring overwritten while warps still read it",
            [2..3, 4] "bar.sync 0;" => ""; RACE;
        "attend_mma_f16_64": "no barrier before warps are merged", [3..4, 4] "bar.sync 0;" => "";
            RACE, UNINITIALISED;
        "attend_mma_f16_64": "dims that the head lacks are read",
            [1..3, 3] "selp.b32 $1, 16, 0, $2;" => "mov.b32 $1, 16;"; By(OutOfBounds), UNINITIALISED, Reference;
        "attend_mma_f16_64": "what a query does not see counts",
            [0..8, 8] "selp.f32 $1, $2, 0fFF800000, $3;" => "mov.f32 $1, $2;"; Reference;
        "attend_mma_f16_96": "outputs keep an older maximum",
            [0..6, 6] "fma.rn.f32 $1, $1, $2, a;" => "add.f32 $1, $1, a;"; Reference;
        "attend_mma_bf16_64": "weights of two terms",
            [0..4, 4] "{a, b, c, d}, {$1, $2, $3, $4}, {$5, $6}, {z, z, z, z};"
                => "{a, b, c, d}, {$1, $2, $3, $4}, {$5, $6}, {z, z, z, z}; mov.f32 a, 0f00000000; mov.f32 b, 0f00000000;";
            Reference;
    }
    "attend", attend::non_finite => {
        "attend_combine": "a NaN that a query does not see stays",
            [0..1, 1] "bar.red.and.pred $1, 0, $2;" => "bar.sync 0; setp.eq.u32 $1, 0, 0;"; Reference;
    }
}
