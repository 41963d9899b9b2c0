//! Seeded bugs of `rows.cu`.

use super::Caught::Reference;
use super::{RACE, mutants};
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
}
