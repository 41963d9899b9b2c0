//! Seeded bugs of `projection.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::projection;

mutants! {
    "projection", projection::many_rows => {
        "projection_read_64": "copies not waited for",
            [0..1, 1] "cp.async.wait_group 1;" => ""; By(AsyncNotWaited);
        "projection_read_64": "rows pooled before all lanes have written",
            [3..4, 5] "bar.sync 0;" => ""; By(AsyncNotWaited), RACE, UNINITIALISED;
        "projection_read_64": "values read before they are written",
            [4..5, 5] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "projection_score_64": "weights read before other lanes have pooled theirs",
            [4..6, 7] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "projection_score_64": "the warps' sums read before they are written",
            [6..7, 7] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "projection_score_64": "a shuffle to the wrong lane",
            [0..1, 32] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" =>
                "shfl.sync.bfly.b32 $1|$2, $3, 2, $5, $6;"; Reference;
        "projection_outputs": "multiplied by the length",
            [0..1, 1] "rcp.rn.f64 $1, $2;" => "mov.f64 $1, $2;"; Reference;
    }
    "projection", projection::shapes => {
        "projection_score_128": "values overwritten while others still multiply them",
            [4..5, 7] "bar.sync 0;" => ""; RACE;
    }
    "projection", projection::non_finite => {
        "projection_score_f32": "a maximum that forgets NaN",
            [0..16, 16] "max.NaN.f32" => "max.f32"; Reference;
    }
}
