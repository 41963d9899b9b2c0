//! Seeded bugs of `rank.cu`.

use super::Caught::Reference;
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::rows;

mutants! {
    "rank", rows::long_ranks => {
        "rank_count": "an arrival that does not release",
            [0..1, 1] "atom.acq_rel" => "atom.relaxed"; RACE;
        "rank_count": "no barrier before a tile's digits are read",
            [1..2, 6] "bar.sync 0;" => ""; RACE;
        "rank_place": "no barrier before the warps' counts are added up",
            [0..1, 2] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "rank_place": "a round that does not wait for the last one's counts",
            [2..17, 17] "bar.warp.sync -1;" => ""; RACE;
        "rank_place": "all lanes taken for equals",
            [0..8, 8] "match.any.sync.b32 $1, $2, $3;" => "mov.u32 $1, -1;"; RACE, Reference;
    }
}
