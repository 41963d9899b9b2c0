//! Seeded bugs of `gather.cu`.

use super::Caught::Reference;
use super::{UNINITIALISED, mutants};
use crate::cache::{drives, selected};

mutants! {
    "gather", drives::gather => {
        "gather": "a full head is left out",
            [0..1, 1] "setp.gt.u32 $1, $2, $3;" => "setp.ge.u32 $1, $2, $3;"; Reference, UNINITIALISED;
        "gather": "positions one slot too far",
            [0..4, 4] "st.u32 [$1], $2;" => "st.u32 [$1+4], $2;"; Reference, UNINITIALISED;
        "gather": "refused rows are not counted",
            [0..1, 2] "atom.global.add.u32 $1, [$2], $3;" => ""; Reference;
        "gather": "lengths of what was asked for, not of what fits",
            [0..1, 1] "selp.b32 $1, $2, 0, $3;" => "mov.b32 $1, $2;"; Reference, UNINITIALISED;
    }
    "gather", selected::nan => {
        "gather": "scores of NaN are not counted",
            [1..2, 2] "atom.global.add.u32 $1, [$2], $3;" => ""; Reference;
    }
}
