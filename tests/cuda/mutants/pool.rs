//! Seeded bugs of `pool.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{PART_OF_A_WARP, RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::pool;

mutants! {
    "pool", pool::averages => {
        "pool_avg": "no barrier after the tile is filled", [0..1, 1] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "pool_avg": "a barrier in part of a warp", [0..1, 1] "bar.sync 0;" => PART_OF_A_WARP; By(DivergentBarrier);
        "pool_avg": "results one column too far",
            [0..2, 2] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+4], $2;"; Reference;
        "pool_avg": "results two bytes too far",
            [0..2, 2] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+2], $2;"; By(Misaligned);
    }
    "pool", pool::maxima => {
        "pool_max": "a maximum that forgets NaN", [0..6, 6] "max.NaN.f32" => "max.f32"; Reference;
    }
}
