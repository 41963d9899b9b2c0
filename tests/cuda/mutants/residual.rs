//! Seeded bugs of `residual.cu`.

use super::Caught::Reference;
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::residual;

mutants! {
    "residual", residual::keys => {
        "keys_f32": "the first chunks of a key only",
            [0..1, 2] "setp.lt.u32 $1, $2, $3;" => "setp.gt.u32 $1, $2, 999999;"; UNINITIALISED, Reference;
    }
    "residual", residual::ranks => {
        "residual_norms_f32_128": "no barrier before vectors are replaced",
            [0..1, 2] "bar.sync 0;" => ""; RACE;
        "residual_norms_f32_128": "no barrier before vectors are read",
            [1..2, 2] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "residual_norms_f32_128": "the part inside is added",
            [0..1, 2] "neg.f32 $1, $2;" => "mov.f32 $1, $2;"; Reference;
    }
    "residual", residual::lengths => {
        "residual_norms_f32_128": "no sign", [1..2, 2] "neg.f32 $1, $2;" => "mov.f32 $1, $2;"; Reference;
    }
}
