//! Seeded bugs of `compact.cu`.

use simcuda::Class::OutOfBounds;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use crate::cache::{drives, selected};

mutants! {
    "compact", drives::slide => {
        "slide": "a tile says that it has read before all its threads have",
            [1..2, 3] "bar.sync 0;" => ""; RACE;
        "slide": "threads write before their block may", [2..3, 3] "bar.sync 0;" => ""; RACE;
        "slide": "waits for nobody",
            [0..1, 1] "ld.acquire.gpu.global.u32 $1, [$2];" => "mov.u32 $1, 2;"; RACE, Reference;
        "slide": "what other tiles say orders nothing",
            [0..1, 1] "ld.acquire.gpu.global.u32" => "ld.relaxed.gpu.global.u32"; RACE;
        "slide": "lengths are forgotten", [0..1, 1] "st.global.u32 [$1], $2;" => ""; Reference;
    }
    "compact", drives::fill => {
        "fill": "no barrier before the moves are read", [0..1, 1] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "fill": "a hole after one kept slot too many",
            [1..2, 3] "setp.gt.u32 $1, $2, $3;" => "setp.ge.u32 $1, $2, $3;"; Reference, RACE;
        "fill": "a slot that is a hole counts as a move",
            [0..1, 6] "setp.ge.u32 $1, $2, $3;" => "setp.lt.u32 $1, $2, $3;"; Reference, RACE, By(OutOfBounds), UNINITIALISED;
    }
    "compact", selected::nan => {
        "slide": "scores of NaN are not counted",
            [1..2, 2] "atom.global.add.u32 $1, [$2], $3;" => ""; Reference;
        "fill": "scores of NaN are not counted",
            [0..1, 1] "atom.global.add.u32 $1, [$2], $3;" => ""; Reference;
    }
}
