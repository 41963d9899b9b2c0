//! Seeded bugs of `expected_attention.cu`.

use simcuda::Class::*;

use super::Caught::{By, Reference};
use super::{RACE, UNINITIALISED, mutants};
use kvbudget_testkit::suite::expected_attention;

mutants! {
    "expected_attention", expected_attention::shapes => {
        "expected_attention_logits_bf16_128": "one of four lanes forgotten",
            [0..1, 8] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" => "mov.b32 $1, $3;"; Reference;
        "expected_attention_logits_bf16_128": "slots past the last",
            [0..4, 4] "and.pred $1, $2, $3;" => "mov.pred $1, $2;"; By(OutOfBounds), RACE;
        "expected_attention_logits_bf16_128": "no mean",
            [0..1, 1] "ld.global.v4.f32 {$1, $2, $3, $4}, [$5];" => "mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; \
             mov.f32 $3, 0f00000000; mov.f32 $4, 0f00000000;"; Reference;
        "expected_attention_logits_f32_128": "what a key's first term lacks left out",
            [0..256, 256] "sub.f32 $1, $2, $3;" => "mov.f32 $1, 0f00000000;"; Reference;
        "expected_attention_sums": "no barrier before the warps' maxima are read",
            [1..2, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "expected_attention_sums": "no barrier before the warps' sums are read",
            [3..4, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        "expected_attention_sums": "the last slot once more for each thread past it",
            [4..11, 11] "setp.ge.u32 $1, $2, $3;" => "setp.ne.u32 $1, $2, $2;"; Reference;
        "expected_attention_mean": "a sum that is no mean",
            [0..2, 2] "div.rn.f32 $1, $2, $3;" => "mov.f32 $1, $2;"; Reference;
    }
    "expected_attention", expected_attention::sinks => {
        "expected_attention_mean": "sinks take part",
            [1..2, 6] "setp.lt.u32 $1, $2, $3;" => "setp.ne.u32 $1, $2, $2;"; Reference;
    }
}
