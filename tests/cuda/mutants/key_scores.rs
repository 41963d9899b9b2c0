//! Seeded bugs of `key_scores.cu`.

use super::Caught::Reference;
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::key_scores;

mutants! {
    "key_scores", key_scores::magnitudes => {
        "key_norm_f32": "keys are never scaled",
            [0..4, 4] "selp.f32 $1, $2, 0f3F800000, $3;" => "mov.f32 $1, 0f3F800000;"; Reference;
        "key_norm_bf16": "keys are scaled the wrong way",
            [0..4, 4] "setp.lt.f32 $1, $2, 0f3F800000;" => "setp.gt.f32 $1, $2, 0f3F800000;"; Reference;
    }
    "key_scores", key_scores::differences => {
        "unit_keys_f32_128": "no barrier before the warps' sums are added",
            [0..1, 5] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "unit_keys_f32_128": "an arrival that orders nothing",
            [0..1, 1] "atom.acq_rel" => "atom.relaxed"; RACE;
        "key_cosine_f32": "no barrier after the anchor is loaded",
            [0..1, 1] "bar.sync 0;" => ""; UNINITIALISED, RACE;
    }
    "key_scores", key_scores::recency => {
        "recency": "slots in place of positions",
            [0..1, 1] "setp.lt.s64 $1, $2, 0;" => "setp.lt.s64 $1, $2, 999999;"; Reference;
    }
}
