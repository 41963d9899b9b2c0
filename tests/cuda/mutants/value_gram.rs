//! Seeded bugs of `value_gram.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::value_norm;

mutants! {
    "value_gram", value_norm::gram_channels => {
        "value_gram_sums_bf16": "a slab copied over while it is used", [0..1, 2] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "value_gram_sums_bf16": "a slab used before it is there", [1..2, 2] "bar.sync 0;" => ""; RACE, UNINITIALISED;
        "value_gram_sums_bf16": "channels past the last",
            [1..2, 2] "min.u32 $1, $2, $3;" => "mov.u32 $1, $3;"; By(OutOfBounds);
        "value_gram_terms": "what is below the diagonal left out",
            [0..8, 8] "selp.f64 $1, $2, $3, $4;" => "mov.f64 $1, $3;"; Reference;
        "value_gram_terms": "the last part in place of all",
            [0..1, 16] "add.f64 $1, $2, $3;" => "mov.f64 $1, $3;"; Reference;
        "value_gram_terms": "two terms of three",
            [0..1, 1] "st.global.v4.u32 [$1+1024], {$2, $3, $4, $5};" => ""; UNINITIALISED;
        "value_gram_bf16_128": "one of four lanes forgotten",
            [0..1, 8] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" => "mov.b32 $1, $3;"; Reference;
        "value_gram_bf16_128": "squares in place of norms", [0..4, 4] "sqrt.rn.f32 $1, $2;" => "mov.f32 $1, $2;"; Reference;
        "value_gram_bf16_128": "slots past the last", [0..4, 4] "and.pred $1, $2, $3;" => "mov.pred $1, $2;"; By(OutOfBounds);
        "value_gram_f32_128": "what a value's first term lacks left out",
            [0..256, 256] "sub.f32 $1, $2, $3;" => "mov.f32 $1, 0f00000000;"; Reference;
    }
    "value_gram", value_norm::gram_zeros => {
        "value_gram_f16_128": "a NaN taken for a square below zero",
            [0..2, 2] "setp.geu.f32 $1, $2, 0f7F800000;" => "setp.eq.f32 $1, $2, 0f7F800000;"; Reference;
    }
}
