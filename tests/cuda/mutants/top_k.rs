//! Seeded bugs of `top_k.cu`, `top_k_emit.cu` and `mass_count.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use crate::pooled;
use kvbudget_testkit::suite::{top_k, top_k_golden};

const PLAIN_SHARED: &str = "{ .reg .b32 %sum; ld.shared.u32 %sum, [$2]; add.s32 %sum, %sum, 1; st.shared.u32 [$2], %sum; }";
const PLAIN_GLOBAL: &str = "{ .reg .b32 %sum; ld.global.u32 %sum, [$2]; add.s32 %sum, %sum, $3; st.global.u32 [$2], %sum; }";
/// A vote of seven lanes that names all.
const SEVEN_LANES: &str = "{ .reg .pred %few; .reg .b32 %lane; mov.u32 %lane, %laneid; \
    setp.lt.u32 %few, %lane, 7; mov.u32 $1, 0; @%few vote.sync.ballot.b32 $1, $2, $3; }";

mutants! {
    "top_k", top_k_golden::cases => {
        "top_k_level_0": "no barrier after the histogram is zeroed",
            [0..1, 13] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "top_k_level_0": "no barrier before the histogram is added up",
            [1..2, 13] "bar.sync 0;" => ""; RACE, Reference;
        "top_k_level_0": "counting without atomics",
            [0..16, 16] "atom.shared.add.u32 $1, [$2], 1;" => PLAIN_SHARED; RACE;
        "top_k_level_0": "the zeros are two",
            [0..16, 16] "add.f32 $1, $2, 0f00000000;" => "mov.f32 $1, $2;"; By(OutOfBounds), Reference;
        "top_k_level_1": "marks of a warp's first lanes only",
            [0..1, 32] "vote.sync.ballot.b32 $1, $2, $3;" => SEVEN_LANES; By(BadMask), By(Deadlock);
    }
    "top_k", top_k::tiles => {
        "top_k_level_0": "a histogram flushed without atomics",
            [0..3, 3] "atom.global.add.u32 $1, [$2], $3;" => PLAIN_GLOBAL; RACE;
        "top_k_level_1": "an arrival that does not release",
            [0..1, 2] "atom.acq_rel" => "atom.relaxed"; RACE;
        "top_k_level_2": "a contest decided before all its segments are there",
            [1..2, 2] "atom.acq_rel" => "atom.relaxed"; RACE;
    }
    "top_k", pooled::averages => {
        "top_k_pooled_avg": "no barrier after the tile is filled",
            [1..2, 15] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "top_k_pooled_avg": "no neighbours to the right",
            [0..1, 1] "selp.b32 $1, 64, 4160, $2;" => "mov.b32 $1, 64;"; UNINITIALISED, RACE, Reference;
        "top_k_pooled_avg": "smooths what is not pooled",
            [1..2, 7] "min.u32 $1, $2, $3;" => "max.u32 $1, $2, $3;"; Reference;
        "top_k_pooled_avg": "what is not pooled is not copied",
            [8..9, 9] "ld.global.f32 $1, [$2];" => "mov.f32 $1, 0f00000000;"; Reference;
        "top_k_pooled_avg": "results one slot too far",
            [0..1, 1] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+4], $2;";
            Reference, RACE, By(OutOfBounds);
        "top_k_pooled_avg": "sums that are no means",
            [0..1, 1] "div.rn.f32 $1, $2, $3;" => "mov.f32 $1, $2;"; Reference;
    }
    "top_k", pooled::crowd => {
        "top_k_pooled_avg": "no barrier before the next tile is filled",
            [2..3, 15] "bar.sync 0;" => ""; RACE;
    }
    "top_k", pooled::maxima => {
        "top_k_pooled_max": "a maximum that forgets NaN", [0..6, 6] "max.NaN.f32" => "max.f32"; Reference;
        "top_k_pooled_max": "NaN is not counted", [0..1, 1] "st.global.u32 [$1+20], $2;" => ""; Reference;
        "top_k_level_0": "NaN is not counted", [0..1, 1] "st.global.u32 [$1+20], $2;" => ""; Reference;
    }
    "top_k_emit", top_k_golden::cases => {
        "top_k_emit": "no barrier before the positions leave",
            [3..4, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
    }
    "top_k_emit", top_k::tiles => {
        "top_k_emit": "plain stores of the tiles' states", [0..2, 2] "st.relaxed.gpu" => "st"; RACE;
        "top_k_emit": "plain loads of the tiles' states", [0..1, 1] "ld.relaxed.gpu" => "ld"; RACE;
        "top_k_emit": "states never published",
            [0..2, 2] "st.relaxed.gpu.global.u64 [$1], $2;" => ""; By(Deadlock);
        "top_k_emit": "a sum that names half a warp",
            [0..1, 2] "redux.sync.add.u32 $1, $2, $3;" => "redux.sync.add.u32 $1, $2, 65535;";
            By(BadMask);
    }
    "top_k_emit", top_k::pins => {
        "top_k_pin": "pins one slot to the right",
            [0..1, 1] "st.global.u32 [$1], $2;" => "st.global.u32 [$1+4], $2;";
            By(OutOfBounds), Reference;
    }
    "top_k_emit", top_k::drops => {
        "top_k_drop": "drops what is out of the question",
            [0..1, 2] "setp.leu.f32" => "setp.ltu.f32"; Reference;
        "top_k_drop": "a NaN is worth nothing", [1..2, 2] "setp.leu.f32" => "setp.le.f32"; Reference;
    }
    "mass_count", top_k::masses => {
        "mass_count": "a sum that is just enough taken for too little",
            [0..1, 3] "setp.lt.u64" => "setp.le.u64"; Reference;
        "mass_count": "no barrier before masses are added up",
            [1..2, 7] "bar.sync 0;" => ""; RACE, UNINITIALISED, Reference;
    }
    "mass_count", top_k::free_masses => {
        "free_mass": "no barrier before the warps' masses are added up",
            [0..1, 1] "bar.sync 0;" => ""; RACE, UNINITIALISED, Reference;
        "free_mass": "what is too large starts again at zero",
            [0..40, 40] "selp.b64 $1, -1, $2, $3;" => "mov.b64 $1, $2;"; Reference;
        "free_mass": "a protected slot in four counts",
            [1..2, 4] "setp.eq.s32 $1, $2, -1;" => "setp.ne.s32 $1, $2, $2;"; Reference;
    }
}
