//! Seeded bugs of `attention_spread.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::attention_spread;

mutants! {
    "attention_spread", attention_spread::many_rows => {
        "attention_spread_64": "copies not waited for",
            [0..1, 1] "cp.async.wait_group 1;" => ""; By(AsyncNotWaited);
        "attention_spread_64": "columns added before all warps have written theirs",
            [3..4, 8] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "attention_spread_64": "a mean of other columns",
            [14..18, 18] "shfl.sync.idx.b32 $1|$2, $3, $4, $5, $6;" =>
                "shfl.sync.idx.b32 $1|$2, $3, 0, $5, $6;"; Reference;
        "attention_spread_64": "a round's moments are not kept",
            [0..2, 2] "st.global.v2.f32 [$1], {$2, $3};" => ""; UNINITIALISED;
        "attention_spread_64": "logarithms of nothing",
            [0..16, 16] "max.f32 $1, $2, $3;" => "mov.f32 $1, $2;"; Reference;
    }
    "attention_spread", attention_spread::long_heads => {
        "attention_spread_f32": "the second sum over the warps' parts of the first",
            [5..6, 7] "bar.sync 0;" => ""; RACE;
        "attention_spread_sums": "the last part for all",
            [0..2, 2] "add.f64 $1, $2, $3;" => "mov.f64 $1, $3;"; Reference;
    }
}
