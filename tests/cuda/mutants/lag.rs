//! Seeded bugs of `lag.cu`.

use super::Caught::Reference;
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::lag;

mutants! {
    "lag", lag::cross_scores => {
        "lag_f32": "no barrier before the warps' extremes are merged",
            [0..1, 8] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "lag_f32": "no barrier before rows take the place of the extremes",
            [1..2, 8] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "lag_f32": "no barrier before the deviations are read",
            [2..3, 8] "bar.sync 0;" => ""; UNINITIALISED, RACE;
    }
    "lag", lag::ties => {
        "lag_f32": "no barrier before the scores are ranked",
            [7..8, 8] "bar.sync 0;" => ""; RACE;
        "lag_f32": "equal slots share a rank",
            [0..7, 7] "selp.u64 $1, 1, 0, $2;" => "mov.u64 $1, 0;"; Reference;
    }
    "lag", lag::non_finite => {
        "lag_f32": "extremes that forget NaN",
            [0..24, 24] "max.NaN.f32" => "max.f32", [0..24, 24] "min.NaN.f32" => "min.f32"; Reference;
    }
}
