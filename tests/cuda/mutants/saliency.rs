//! Seeded bugs of `saliency.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::saliency;

mutants! {
    "saliency", saliency::lengths => {
        "saliency": "no barrier before the warps' sums are added",
            [1..2, 8] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "saliency": "no barrier before sums take the place of squares",
            [6..7, 8] "bar.sync 0;" => ""; RACE;
        "saliency": "one in place of the other, not their sum",
            [0..2, 2] "add.f32 $1, $2, $3;" => "mov.f32 $1, $3;"; Reference;
    }
    "saliency", saliency::batches => {
        "saliency": "slots in place of positions",
            [0..1, 3] "setp.lt.s64 $1, $2, 0;" => "setp.lt.s64 $1, $2, 999999;"; By(OutOfBounds), Reference;
    }
}
