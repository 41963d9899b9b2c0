// What the kernels that count and those that emit agree on. See top_k.cu.
#pragma once
#include "scores.cuh"

constexpr u32 THREADS = 256, TILE = 4096;
// A warp owns 512 consecutive slots of a tile: (warp, round, lane, component) is the order of slots.
constexpr u32 ROUNDS = 4, OF_WARP = ROUNDS * 128, MARKS = 32 * THREADS / 32;

// Written by the host, as are spans.
struct Segment {
    u64 first_tile; // of its tiles among those of all
    u32 floor, contest;
    u32 protected_first, protected_end; // its spans
};
// State of a descent: the digits of the segment's cut so far, how many keys are above all that share them, and the
// digits of the cut for the floor alone. Of all its keys, `nan` are those of NaN.
struct Tally {
    u32 prefix, above, floor_prefix;
    u32 arrivals, ticket;
    u32 nan;
    u32 unused[2];
};

__device__ inline u32 tiles_of(u32 length) { return length / TILE + (length % TILE > 0); }
