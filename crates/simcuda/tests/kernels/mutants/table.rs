//! The seeded bugs.

use simcuda::Class::{self, *};

use super::Caught::{self, By, Counter, Reference};
use super::edit::Edit;
use crate::gpu::Drive;
use crate::{attention, copy, rows, top_k};

pub struct Mutant {
    pub kernel: &'static str,
    pub bug: &'static str,
    pub ptx: &'static str,
    pub drive: Drive,
    pub edits: &'static [Edit],
    pub expected: &'static [Caught],
}

macro_rules! mutants {
    ($($file:ident, $drive:path {
        $($kernel:ident: $bug:literal, $([$which:expr, $of:literal] $find:literal => $with:expr),+; $($expected:expr),+;)*
    })*) => {
        pub const MUTANTS: &[Mutant] = &[$($(Mutant {
            kernel: stringify!($kernel),
            bug: $bug,
            ptx: include_str!(concat!("../../../../../kernels/ptx/", stringify!($file), ".ptx")),
            drive: $drive,
            edits: &[$(Edit { kernel: stringify!($kernel), find: $find, with: $with, which: $which, of: $of }),+],
            expected: &[$($expected),+],
        },)*)*];
    };
}

const UNINITIALISED: Caught = By(Uninitialised);
const RACE: Caught = By(Race);
const ASYNC: Caught = By(Class::AsyncNotWaited);

/// Executes `bar.sync 0` in some lanes of the second warp only.
const PART_OF_A_WARP: &str = "{ .reg .pred %few; .reg .b32 %thread; mov.u32 %thread, %tid.x; \
    setp.lt.u32 %few, %thread, 40; @%few bar.sync 0; }";
/// A vote of seven lanes that names all.
const SEVEN_LANES: &str = "{ .reg .pred %few; .reg .b32 %lane; mov.u32 %lane, %laneid; setp.lt.u32 %few, %lane, 7; \
    mov.u32 $1, 0; @%few vote.sync.ballot.b32 $1, $2, $3; }";
/// `tid` with its low four bits on top and bit 4 at bit 3: of sixteen rows of sixteen units, a warp takes u and u + 8.
const HALF_SECTORS: &str = "mov.u32 $1, %tid.x; { .reg .b32 %row, %half; and.b32 %row, $1, 15; shl.b32 %row, %row, 4; \
    shr.u32 %half, $1, 1; and.b32 %half, %half, 8; shr.u32 $1, $1, 5; or.b32 $1, $1, %half; or.b32 $1, $1, %row; }";
const PLAIN_SHARED: &str = "{ .reg .b32 %sum; ld.shared.u32 %sum, [$2]; add.s32 %sum, %sum, 1; st.shared.u32 [$2], %sum; }";
const PLAIN_GLOBAL: &str = "{ .reg .b32 %sum; ld.global.u32 %sum, [$2]; add.s32 %sum, %sum, $3; st.global.u32 [$2], %sum; }";

mutants! {
    pool, rows::pool {
        pool_avg: "no barrier after the tile is filled", [0..1, 1] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        pool_avg: "a barrier in part of a warp", [0..1, 1] "bar.sync 0;" => PART_OF_A_WARP; By(DivergentBarrier);
        pool_avg: "results one column too far",
            [0..2, 2] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+4], $2;"; By(OutOfBounds);
        pool_avg: "results two bytes too far",
            [0..2, 2] "st.global.f32 [$1], $2;" => "st.global.f32 [$1+2], $2;"; By(Misaligned);
        pool_max: "a maximum that forgets NaN", [0..1, 7] "max.NaN.f32" => "max.f32"; Reference;
    }
    reduce, rows::reduce {
        reduce_sum: "no barrier before the warps' sums are read", [1..2, 6] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        reduce_sum: "an arrival that does not release", [0..1, 1] "atom.acq_rel" => "atom.acquire"; RACE;
        reduce_sum: "an arrival that does not acquire", [0..1, 1] "atom.acq_rel" => "atom.release"; RACE;
        reduce_sum: "no barrier before the last block is known", [3..4, 6] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        reduce_sum: "a counter that does not wrap",
            [0..1, 1] "global.inc.u32 $1, [$2], $3;" => "global.add.u32 $1, [$2], 1;"; Reference;
        reduce_sum: "partial sums read as constants",
            [1..2, 2] "ld.global.f32" => "ld.global.nc.f32"; By(ReadOnly), RACE;
        reduce_max: "a shuffle that names half a warp",
            [0..1, 20] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" =>
                "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, 65535;"; By(BadMask);
    }
    softmax, rows::softmax {
        softmax: "no barrier before the warps' maxima are read", [1..2, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        softmax: "sums written while maxima are read", [2..3, 4] "bar.sync 0;" => ""; RACE;
    }
    top_k, top_k::top_k {
        top_k_level: "no barrier after the histogram is zeroed", [0..1, 20] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        top_k_level: "no barrier before the histogram is added up", [1..2, 20] "bar.sync 0;" => ""; RACE, Reference;
        top_k_level: "counting without atomics",
            [0..96, 96] "atom.shared.add.u32 $1, [$2], 1;" => PLAIN_SHARED; RACE;
        top_k_level: "a histogram flushed without atomics",
            [1..3, 5] "atom.global.add.u32 $1, [$2], $3;" => PLAIN_GLOBAL; RACE;
        top_k_level: "an arrival that does not release", [0..1, 2] "atom.acq_rel" => "atom.relaxed"; RACE;
        top_k_emit: "no barrier before the positions leave", [3..4, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        top_k_emit: "plain stores of the tiles' states", [0..2, 2] "st.relaxed.gpu" => "st"; RACE;
        top_k_emit: "plain loads of the tiles' states", [0..1, 1] "ld.relaxed.gpu" => "ld"; RACE;
        top_k_emit: "states never published", [0..2, 2] "st.relaxed.gpu.global.u64 [$1], $2;" => ""; By(Deadlock);
        top_k_emit: "a full mask in seven lanes",
            [0..1, 65] "vote.sync.ballot.b32 $1, $2, $3;" => SEVEN_LANES; By(BadMask), By(Deadlock);
        top_k_emit: "a reduction that names half a warp",
            [0..1, 2] "redux.sync.add.u32 $1, $2, $3;" => "redux.sync.add.u32 $1, $2, 65535;"; By(BadMask);
        top_k_emit: "one tie too many",
            [0..16, 16] "setp.ge.u32 $1, $2, $3; or.pred $4, $1, $5;" =>
                "setp.gt.u32 $1, $2, $3; or.pred $4, $1, $5;"; Reference, RACE;
        top_k_emit: "the zeros are two", [0..28, 28] "add.f32 $1, $2, 0f00000000;" => "mov.f32 $1, $2;"; Reference;
    }
    gather, copy::gather {
        gather: "rows that are no multiple of 16 bytes",
            [0..1, 8] "shl.b64 $1, $2, 4;" => "mul.lo.s64 $1, $2, 20;"; By(Misaligned);
        gather: "one row too many",
            [0..4, 4] "setp.ge.u32 $1, $2, $3;" => "setp.gt.u32 $1, $2, $3;"; By(OutOfBounds), RACE;
        gather_in_place: "plain stores of the tiles' states", [0..2, 2] "st.release.gpu" => "st"; RACE;
        gather_in_place: "states stored without release", [0..2, 2] "st.release" => "st.relaxed"; RACE;
        gather_in_place: "plain loads of the tiles' states", [0..1, 1] "ld.acquire.gpu" => "ld"; RACE;
        gather_in_place: "states loaded without acquire", [0..1, 1] "ld.acquire" => "ld.relaxed"; RACE;
        gather_in_place: "published before the block has read", [1..2, 3] "bar.sync 0;" => ""; RACE;
        gather_in_place: "written before the others have read", [2..3, 3] "bar.sync 0;" => ""; RACE;
        gather_in_place: "states never published",
            [0..2, 2] "st.release.gpu.global.u32 [$1], $2;" => ""; By(Deadlock);
        gather_in_place: "the block's index for a ticket",
            [0..1, 1] "atom.global.add.u32 $1, [$2], 1;" => "mov.u32 $1, %ctaid.x;"; By(Deadlock);
    }
    gather, copy::gather_256_bytes {
        gather: "half a sector a lane", [0..1, 1] "mov.u32 $1, %tid.x;" => HALF_SECTORS; Counter;
    }
    append, copy::append {
        append: "a length that changes while it is read", [0..1, 1] "bar.sync 0;" => ""; RACE;
    }
    window_attention, attention::window_attention {
        window_attention_scores_bf16: "copies not waited for", [0..1, 1] "cp.async.wait_group 1;" => ""; ASYNC;
        window_attention_scores_bf16: "copies waited for one group short",
            [0..1, 1] "cp.async.wait_group 1;" => "cp.async.wait_group 2;"; ASYNC;
        window_attention_scores_bf16: "copies waited for, no barrier", [2..3, 4] "bar.sync 0;" => ""; ASYNC, RACE;
        window_attention_scores_bf16: "a stage refilled while it is read", [3..4, 4] "bar.sync 0;" => ""; ASYNC, RACE;
        window_attention_scores_bf16: "copies from half a unit further",
            [0..1, 13] "cp.async.cg.shared.global [$1], [$2], 16, $3;" =>
                "cp.async.cg.shared.global [$1], [$2+8], 16, $3;"; By(Misaligned);
        window_attention_scores_bf16: "halves of a key swapped",
            [0..1, 128] "}, {$1, $2}, {" => "}, {$2, $1}, {"; Reference;
        window_attention_scores_bf16: "no swizzle",
            [1..9, 29] "xor.b32 $1, $2, $3;" => "mov.b32 $1, $2;",
            [0..21, 21] "xor.b32 $1, $2, $3;" => "mov.b32 $1, $3;"; Counter;
        window_attention_lse_bf16: "arrival before all have written", [4..5, 6] "bar.sync 0;" => ""; RACE;
        window_attention_lse_bf16: "a row's statistics not written",
            [0..1, 4] "st.global.v2.u32 [$1], {$2, $3};" => ""; UNINITIALISED;
        window_attention_sum_bf16: "the warps' sums read before they are written",
            [3..4, 4] "bar.sync 0;" => ""; UNINITIALISED, RACE;
        window_attention_sum_bf16: "a shuffle to the wrong lane",
            [0..1, 14] "shfl.sync.bfly.b32 $1|$2, $3, $4, $5, $6;" =>
                "shfl.sync.bfly.b32 $1|$2, $3, 2, $5, $6;"; Reference;
    }
    attend, attention::attend {
        attend_bf16: "copies not waited for", [0..1, 1] "cp.async.wait_group 1;" => ""; ASYNC;
        attend_bf16: "lanes that do not wait for each other's copies", [2..3, 4] "bar.warp.sync -1;" => ""; ASYNC, RACE;
        attend_bf16: "shared memory misplaced",
            [0..10, 10] "mov.u64 $1, ring;" => "mov.u64 $1, ring; add.s64 $1, $1, 1024;"; By(OutOfBounds);
        attend_bf16: "keys read past the end",
            [1..7, 7] "selp.b32 $1, 16, 0, $2;" => "mov.b32 $1, 16;"; By(OutOfBounds), UNINITIALISED;
        attend_bf16: "values not transposed", [0..1, 8] ".trans.shared" => ".shared"; Reference;
    }
}
