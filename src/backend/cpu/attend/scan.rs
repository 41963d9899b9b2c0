//! Attention of a block of query rows to a chunk of slots: the vector code.
//!
//! Lanes are dims. A vector of keys is loaded and widened once and meets up to four queries, whose sums stay in
//! registers until a tree of shuffles folds as many of them as a vector has lanes at once; a vector of values is added to the
//! outputs of up to four queries, which stay in registers while the slots of a tile go by.

use std::ops::Range;

use half::bf16;

use super::super::intrinsics;
use super::super::isa::{Arithmetic, Kernel, exp2};
use super::super::tile::{self, max2};
use super::source::{Chunk, Data, Next, Order, Source, Tile, WIDENED, lanes, read};
use super::{Block, Part, QUERIES};

/// Slots that go through softmax together, at most.
pub(super) const TILE: usize = 32;

/// A task's work on one thread.
pub(super) struct Scan<'a> {
    pub(super) block: &'a Block<'a>,
    pub(super) slots: Range<usize>,
    /// Nothing yet.
    pub(super) part: &'a mut Part,
}

impl Kernel for Scan<'_> {
    type Output = ();
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        // As many sums as a vector has lanes, or half of all registers.
        match lanes(self.block.isa) {
            16 => self.scan::<A, 16, 4, 2>(),
            _ => self.scan::<A, 8, 2, 1>(),
        }
    }
}

impl Scan<'_> {
    /// With `L` lanes, and a quarter and an eighth of that.
    #[inline(always)]
    fn scan<A: Arithmetic, const L: usize, const Q: usize, const E: usize>(self) {
        let Self { block, slots, part } = self;
        let (view, n, pitch) = (block.view, block.rows.len(), block.pitch());
        let mut zeros;
        let widened: &mut [f32] = match [&view.k, &view.v].map(Order::of) {
            [Order::Widened, _] | [_, Order::Widened] => {
                zeros = [0f32; WIDENED];
                &mut zeros
            }
            _ => &mut [],
        };
        let mut starts = [0; TILE];
        let mut weights = [[0f32; TILE]; QUERIES];
        let mut sums = [[0f32; L]; QUERIES];
        let step = TILE.min(WIDENED / pitch);
        for start in slots.clone().step_by(step) {
            let end = slots.end.min(start + step);
            let mut seen = [0; QUERIES];
            for (i, seen) in seen[..n].iter_mut().enumerate() {
                *seen = block.visible(i).clamp(start, end) - start;
            }
            let starts = &mut starts[..end - start];
            let next = &Next::new::<L>(&view.v, block.head, start..end);
            match read(&view.k, block.head, start, starts, widened) {
                Data::F32(data) => logits::<A, f32, L, Q>(
                    &block.q,
                    n,
                    &Tile { data, starts, pitch, next },
                    &mut weights,
                ),
                Data::BF16(data) => logits::<A, bf16, L, Q>(
                    &block.q,
                    n,
                    &Tile { data, starts, pitch, next },
                    &mut weights,
                ),
            }
            for i in 0..n {
                part.weigh::<A, L>(i, pitch, &mut weights[i], seen[i], &mut sums[i]);
            }
            let len = view.k.len(block.head);
            let next = &Next::new::<L>(&view.k, block.head, end..len.min(end + step));
            match read(&view.v, block.head, start, starts, widened) {
                Data::F32(data) => accumulate::<A, f32, L, Q, E>(
                    &weights,
                    &seen[..n],
                    &Tile { data, starts, pitch, next },
                    &mut part.out,
                ),
                Data::BF16(data) => accumulate::<A, bf16, L, Q, E>(
                    &weights,
                    &seen[..n],
                    &Tile { data, starts, pitch, next },
                    &mut part.out,
                ),
            }
        }
        for (part, sums) in part.sum.iter_mut().zip(sums) {
            *part = tile::sum(&sums);
        }
    }
}

/// `weights[i][row] = q[i] · tile[row]`, four queries at a time, then one by one: loops for two do not
/// become vector code.
#[inline(always)]
fn logits<A: Arithmetic, T: Source, const L: usize, const Q: usize>(
    q: &[f32],
    n: usize,
    tile: &Tile<'_, T>,
    weights: &mut [[f32; TILE]; QUERIES],
) {
    let mut i = 0;
    while i < n {
        let (q, weights) = (&q[i * tile.pitch..], &mut weights[i..n]);
        i += match n - i {
            4.. => dots::<A, T, L, 4, Q>(q, tile, weights),
            _ => dots::<A, T, L, 1, L>(q, tile, weights),
        }
    }
}

/// Dot products of `N` queries with the rows, `R` rows at a time; returns `N`. `N · R = L`.
#[inline(always)]
fn dots<A: Arithmetic, T: Source, const L: usize, const N: usize, const R: usize>(
    q: &[f32],
    tile: &Tile<'_, T>,
    weights: &mut [[f32; TILE]],
) -> usize {
    const { assert!(N * R == L) };
    let chunks = tile.pitch / (2 * L);
    let mut rows = q.chunks_exact(tile.pitch);
    let q: [&[[[f32; L]; 2]]; N] = std::array::from_fn(|_| {
        &rows.next().expect("a row of each query").as_chunks().0.as_chunks().0[..chunks]
    });
    let last = tile.starts.len() - 1;
    let mut sums = [[[0f32; L]; L]; N];
    for first in (0..=last).step_by(L) {
        for r in (0..L).step_by(R) {
            // Beyond the last row its products are found again.
            let mut rows: [&[Chunk<T, L>]; R] = [&[]; R];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = &tile.row(last.min(first + r + i))[..chunks];
            }
            let asked = first + r..first + r + R;
            products::<A, T, L, N, R>(&q, &rows, tile.next, asked, &mut sums);
        }
        for i in 0..N {
            let weights = weights[i][first..].first_chunk_mut().expect("whole vectors of slots");
            intrinsics::folds(&sums[i], weights);
        }
    }
    N
}

/// Products of `N` queries with `R` rows, lane by lane; which `slots` of the tile they are.
#[inline(always)]
fn products<A: Arithmetic, T: Source, const L: usize, const N: usize, const R: usize>(
    q: &[&[[[f32; L]; 2]]; N],
    rows: &[&[Chunk<T, L>]; R],
    next: &Next<'_>,
    slots: Range<usize>,
    out: &mut [[[f32; L]; L]; N],
) {
    let mut sums = [[[0f32; L]; R]; N];
    for c in 0..q[0].len() {
        for r in 0..R {
            next.ask(slots.start + r, c);
            let k = T::load(&rows[r][c]);
            for i in 0..N {
                for h in 0..2 {
                    for l in 0..L {
                        sums[i][r][l] = A::mul_add(q[i][c][h][l], k[h][l], sums[i][r][l]);
                    }
                }
            }
        }
    }
    let first = slots.start % L;
    for i in 0..N {
        out[i][first..first + R].copy_from_slice(&sums[i]);
    }
}

/// `out[i] += Σ_row weights[i][row] · tile[row]` over the rows that query `i` sees: together over those that all see.
#[inline(always)]
fn accumulate<A: Arithmetic, T: Source, const L: usize, const Q: usize, const E: usize>(
    weights: &[[f32; TILE]; QUERIES],
    seen: &[usize],
    tile: &Tile<'_, T>,
    out: &mut [f32],
) {
    let mut i = 0;
    while i < seen.len() {
        let (weights, seen, out) = (&weights[i..], &seen[i..], &mut out[i * tile.pitch..]);
        // Later queries see as much or more.
        let all = 0..seen[0];
        let n = match seen.len() {
            4.. => add_rows::<A, T, L, 4, E>(weights, all, tile, out),
            _ => add_rows::<A, T, L, 1, Q>(weights, all, tile, out),
        };
        for i in 1..n {
            let out = &mut out[i * tile.pitch..];
            add_rows::<A, T, L, 1, Q>(&weights[i..], seen[0]..seen[i], tile, out);
        }
        i += n;
    }
}

/// Adds rows to `N` outputs, `P` chunks of dims at a time; returns `N`.
#[inline(always)]
fn add_rows<A: Arithmetic, T: Source, const L: usize, const N: usize, const P: usize>(
    weights: &[[f32; TILE]],
    slots: Range<usize>,
    tile: &Tile<'_, T>,
    out: &mut [f32],
) -> usize {
    if slots.is_empty() {
        return N;
    }
    let weights: [&[f32; TILE]; N] = std::array::from_fn(|i| &weights[i]);
    let chunks = tile.pitch / (2 * L);
    let blocks = chunks / P * P;
    for c in (0..blocks).step_by(P) {
        add_chunks::<A, T, L, N, P>(weights, slots.clone(), tile, c, out);
    }
    for c in blocks..chunks {
        add_chunks::<A, T, L, N, 1>(weights, slots.clone(), tile, c, out);
    }
    N
}

/// `P` chunks of the rows from chunk `c` on.
#[inline(always)]
fn add_chunks<A: Arithmetic, T: Source, const L: usize, const N: usize, const P: usize>(
    weights: [&[f32; TILE]; N],
    slots: Range<usize>,
    tile: &Tile<'_, T>,
    c: usize,
    out: &mut [f32],
) {
    let mut out: [&mut [[[f32; L]; 2]; P]; N] = {
        let mut rows = out.chunks_exact_mut(tile.pitch);
        std::array::from_fn(|_| {
            let row = rows.next().expect("a row of each query");
            row.as_chunks_mut().0.as_chunks_mut().0[c..].first_chunk_mut().expect("a chunk")
        })
    };
    let mut sums: [[[[f32; L]; 2]; P]; N] = std::array::from_fn(|i| *out[i]);
    for slot in slots {
        let row: &[Chunk<T, L>; P] = tile.row(slot)[c..].first_chunk().expect("a chunk");
        for p in 0..P {
            tile.next.ask(slot, c + p);
            let v = T::load(&row[p]);
            for i in 0..N {
                let weight = weights[i][slot];
                for h in 0..2 {
                    for l in 0..L {
                        sums[i][p][h][l] = A::mul_add(weight, v[h][l], sums[i][p][h][l]);
                    }
                }
            }
        }
    }
    out.iter_mut().zip(sums).for_each(|(out, sums)| **out = sums);
}

impl Part {
    /// Turns the logits of row `i`, as many as it sees, into weights, moving its state to the new maximum; `sums` are those of
    /// its denominator.
    #[inline(always)]
    fn weigh<A: Arithmetic, const L: usize>(
        &mut self,
        i: usize,
        pitch: usize,
        logits: &mut [f32; TILE],
        seen: usize,
        sums: &mut [f32; L],
    ) {
        if seen == 0 {
            return;
        }
        let whole = seen.next_multiple_of(L);
        logits[seen..whole].fill(f32::NEG_INFINITY);
        let logits = logits[..whole].as_chunks_mut::<L>().0;
        let mut greatest = [f32::NEG_INFINITY; L];
        for x in logits.iter() {
            for l in 0..L {
                greatest[l] = max2(greatest[l], x[l]);
            }
        }
        let below = greatest.iter().fold(true, |below, &x| below & (x <= self.max[i]));
        if !below {
            let max = greatest.into_iter().fold(self.max[i], max2);
            let factor = exp2::<A>(self.max[i] - max);
            // Before the first slots there is nothing to scale, and no maximum.
            let factor = if self.max[i] == f32::NEG_INFINITY { 0.0 } else { factor };
            self.max[i] = max;
            sums.iter_mut().for_each(|x| *x *= factor);
            self.out[i * pitch..][..pitch].iter_mut().for_each(|x| *x *= factor);
        }
        let max = self.max[i];
        for x in logits {
            for l in 0..L {
                x[l] = exp2::<A>(x[l] - max);
                sums[l] += x[l];
            }
        }
    }
}
