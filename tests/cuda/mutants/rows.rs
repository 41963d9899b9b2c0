//! Seeded bugs of `rows.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::rows;

mutants! {
    "rows", rows::nan_counts => {
        "count_nan": "the most of a warp's lanes for their sum",
            [0..1, 1] "redux.sync.add.u32" => "redux.sync.max.u32"; Reference;
        "count_nan": "a block's count in place of the sum",
            [0..1, 1] "atom.global.add.u32 $1, [$2], $3;" => "st.global.u32 [$2], $3;"; RACE, Reference;
    }
    "rows", rows::raises => {
        "raise": "a NaN to raise by is dropped", [0..4, 4] "setp.nan.f32 $1, $2, $2;" => "setp.ne.f32 $1, $2, $2;"; Reference;
    }
    "rows", rows::mean_floors => {
        "sum_rows": "no barrier before the warps' sums are read",
            [1..2, 6] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "sum_rows": "an arrival that orders nothing", [0..1, 1] "atom.acq_rel" => "atom.relaxed"; RACE;
    }
    "rows", rows::norm_scales => {
        "scale_by_heads": "no barrier between heads", [1..2, 3] "bar.sync 0;" => ""; RACE;
        "scale_by_heads": "heads without values are scaled by infinity",
            [0..2, 2] "setp.eq.f64 $1, $2, 0d0000000000000000;" => "setp.lt.f64 $1, $2, 0d0000000000000000;";
            Reference;
    }
    "rows", rows::picks => {
        "pick": "one slot to the right",
            [0..1, 1] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+4], $2;"; By(OutOfBounds), Reference;
    }
}
