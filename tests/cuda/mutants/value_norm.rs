//! Seeded bugs of `value_norm.cu`.

use simcuda::Class::*;

use super::Caught::{By, Counter, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::value_norm;

mutants! {
    "value_norm", value_norm::blocks => {
        "value_norm_bf16_64": "values not waited for", [0..1, 3] "cp.async.wait_group 0;" => ""; By(AsyncNotWaited), RACE;
        "value_norm_bf16_64": "a tile not waited for", [2..3, 3] "cp.async.wait_group 0;" => ""; By(AsyncNotWaited), RACE;
        "value_norm_bf16_64": "values of one lane not seen by the others",
            [0..1, 4] "bar.warp.sync -1;" => ""; RACE, UNINITIALISED, By(AsyncNotWaited);
        "value_norm_bf16_64": "a tile copied over while it is used", [1..2, 5] "bar.sync 0;" => ""; RACE, UNINITIALISED, By(AsyncNotWaited);
        "value_norm_bf16_64": "products with their sign", [0..1, 16] "abs.f32 $1, $2;" => "mov.f32 $1, $2;"; Reference;
        "value_norm_bf16_64": "the last block of channels in place of all",
            [0..1, 9] "add.f64 $1, $2, $3;" => "mov.f64 $1, $3;"; Reference;
        "value_norm_bf16_64": "one of four lanes forgotten",
            [0..1, 8] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" => "mov.b32 $1, $3;"; Reference;
        "value_norm_bf16_64": "an arrival that releases nothing",
            [0..1, 1] "atom.acq_rel.gpu.global.inc.u32" => "atom.global.inc.u32"; RACE;
        "value_norm_bf16_64": "weights not swizzled where they are stored",
            [3..4, 11] "xor.b32 $1, $2, $3;" => "mov.b32 $1, $2;"; Reference, Counter;
        "value_norm_f32": "a slab not waited for", [0..1, 1] "cp.async.wait_group 0;" => ""; By(AsyncNotWaited), RACE;
        "value_norm_f32": "a slab copied over while it is used", [1..2, 5] "bar.sync 0;" => ""; RACE, UNINITIALISED, By(AsyncNotWaited);
    }
    "value_norm", value_norm::zeros => {
        "value_norm_f16_64": "infinity times the zeros past the last channel",
            [0..16, 16] "selp.f32 $1, $2, 0f00000000, $3;" => "mov.f32 $1, $2;"; Reference;
    }
}
