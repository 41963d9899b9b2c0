//! Seeded bugs of `append.cu`.

use simcuda::Class::OutOfBounds;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use crate::cache::drives;

mutants! {
    "append", drives::append => {
        "append": "every block is the last to arrive",
            [0..1, 1] "atom.acq_rel.gpu.global.inc.u32 $1, [$2], $3;" => "mov.u32 $1, $3;"; Reference, RACE;
        "append": "an arrival that orders nothing",
            [0..1, 1] "atom.acq_rel.gpu.global.inc.u32" => "atom.global.inc.u32"; RACE;
        "append": "each thread sees the room of its own head only",
            [0..1, 1] "bar.red.or.pred $1, 0, $2;" => "mov.pred $1, $2;"; Reference, RACE, UNINITIALISED, By(OutOfBounds);
        "append": "positions one slot too far",
            [0..4, 4] "st.u32 [$1], $2;" => "st.u32 [$1+4], $2;"; Reference, UNINITIALISED;
    }
}
