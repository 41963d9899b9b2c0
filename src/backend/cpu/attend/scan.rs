//! Attention of a block of query rows to a chunk of slots: the vector code.
//!
//! Lanes are dims. A vector of keys is loaded and widened once and meets up to four queries, whose sums stay in
//! registers until a tree of shuffles folds as many of them as a vector has lanes at once; a vector of values is added to the
//! outputs of up to four queries, which stay in registers while the slots of a tile go by. f32 and bf16 rows are
//! read where they lie, bf16 two at a time: an even element is the low half of a word, an odd one the high half,
//! so queries and outputs of such rows are [in that order](Order) too. What is left (f16, dims that are no multiple of 32) is
//! widened into a tile first.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use super::super::HostSlice;
use super::super::tile::{self, Arithmetic, Isa, Kernel, exp2, max2};
use super::{Block, Part, QUERIES};
use crate::view::Rows;

/// Slots that go through softmax together, at most.
const TILE: usize = 32;
/// Elements of a tile of widened rows.
const WIDENED: usize = 8192;
/// Rows take a multiple of this where they are widened, and are read where they lie if they have one.
pub(super) const UNIT: usize = 32;

/// How rows are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie.
    InPlace,
    /// As they lie, elements two by two: of `2 L` elements the even ones come first.
    Pairs,
    /// From a tile of f32.
    Widened,
}

impl Order {
    pub(super) fn of(rows: &Rows<'_, HostSlice<'_>>) -> Self {
        match rows.storage() {
            _ if !rows.dim().is_multiple_of(UNIT) => Self::Widened,
            HostSlice::F32(_) => Self::InPlace,
            HostSlice::BF16(_) => Self::Pairs,
            HostSlice::F16(_) => Self::Widened,
        }
    }

    /// Where an element of a row comes, with so many lanes.
    pub(super) fn place(self, element: usize, lanes: usize) -> usize {
        if self != Self::Pairs {
            return element;
        }
        // No division: lanes are a power of two.
        let i = element & (2 * lanes - 1);
        element - i + (i & 1) * lanes + (i >> 1)
    }
}

/// Lanes of a vector.
pub(super) fn lanes(isa: Isa) -> usize {
    if isa >= Isa::Avx512 { 16 } else { 8 }
}

/// Two vectors of elements.
type Chunk<T, const L: usize> = [[T; 2]; L];

/// What rows are made of.
trait Source: Pod {
    /// Widens two vectors.
    fn load<const L: usize>(chunk: &Chunk<Self, L>) -> [[f32; L]; 2];
}

impl Source for f32 {
    #[inline(always)]
    fn load<const L: usize>(chunk: &Chunk<f32, L>) -> [[f32; L]; 2] {
        let (x, mut lanes) = (chunk.as_flattened(), [[0.0; L]; 2]);
        lanes[0].copy_from_slice(&x[..L]);
        lanes[1].copy_from_slice(&x[L..]);
        lanes
    }
}

impl Source for bf16 {
    #[inline(always)]
    fn load<const L: usize>(chunk: &Chunk<bf16, L>) -> [[f32; L]; 2] {
        let mut lanes = [[0.0; L]; 2];
        for l in 0..L {
            let word: u32 = bytemuck::cast(chunk[l]);
            let word = if cfg!(target_endian = "little") { word } else { word.rotate_left(16) };
            lanes[0][l] = f32::from_bits(word << 16);
            lanes[1][l] = f32::from_bits(word & 0xffff_0000);
        }
        lanes
    }
}

/// Rows of a tile.
#[derive(Clone, Copy)]
struct Tile<'a, T> {
    data: &'a [T],
    /// Element at which each row starts.
    starts: &'a [usize],
    pitch: usize,
    /// As many rows that are read next: each chunk of this tile asks for its like of those.
    next: &'a Next<'a>,
}

/// Rows to be asked for: the memory is to be busy while the arithmetic goes on, and lines that are asked for all at
/// once would stop both.
struct Next<'a> {
    bytes: &'a [u8],
    /// Byte at which each row starts.
    starts: [usize; TILE],
    /// Bytes of a chunk.
    chunk: usize,
}

impl<'a> Next<'a> {
    #[inline(always)]
    fn new<const L: usize>(
        rows: &Rows<'_, HostSlice<'a>>,
        head: usize,
        slots: Range<usize>,
    ) -> Self {
        let size = rows.dtype().size();
        let bytes = match rows.storage() {
            HostSlice::F32(data) => bytemuck::cast_slice(data),
            HostSlice::F16(data) => bytemuck::cast_slice(data),
            HostSlice::BF16(data) => bytemuck::cast_slice(data),
        };
        let mut starts = [0; TILE];
        find(rows, head, &slots, &mut starts[..slots.len()]);
        starts.iter_mut().for_each(|start| *start *= size);
        Self { bytes, starts, chunk: 2 * L * size }
    }

    #[inline(always)]
    fn ask(&self, row: usize, chunk: usize) {
        const LINE: usize = 64;
        let at = self.starts[row] + chunk * self.chunk;
        tile::prefetch(self.bytes, at);
        if self.chunk > LINE {
            tile::prefetch(self.bytes, at + LINE);
        }
    }
}

/// Elements at which rows start.
#[inline(always)]
fn find(rows: &Rows<'_, HostSlice<'_>>, head: usize, slots: &Range<usize>, starts: &mut [usize]) {
    let mut rest = starts;
    for run in rows.runs(head, slots.start, slots.end) {
        let (now, later) = rest.split_at_mut(run.rows);
        now.iter_mut().enumerate().for_each(|(i, start)| *start = run.start + i * run.stride);
        rest = later;
    }
}

impl<'a, T: Source> Tile<'a, T> {
    #[inline(always)]
    fn row<const L: usize>(&self, i: usize) -> &'a [Chunk<T, L>] {
        self.data[self.starts[i]..][..self.pitch].as_chunks().0.as_chunks().0
    }
}

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

/// Elements that a tile's rows are in.
enum Data<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
}

/// The slots from `first` on, and where their rows start.
#[inline(always)]
fn read<'a>(
    rows: &Rows<'_, HostSlice<'a>>,
    head: usize,
    first: usize,
    starts: &mut [usize],
    widened: &'a mut [f32],
) -> Data<'a> {
    let (dim, slots) = (rows.dim(), first..first + starts.len());
    let data = match (Order::of(rows), rows.storage()) {
        (Order::InPlace, HostSlice::F32(data)) => Data::F32(data),
        (Order::Pairs, HostSlice::BF16(data)) => Data::BF16(data),
        _ => {
            let pitch = pitch(dim);
            starts.iter_mut().enumerate().for_each(|(i, start)| *start = i * pitch);
            // The padding stays zero.
            tile::widen_apart(rows, head, slots, pitch, widened);
            return Data::F32(widened);
        }
    };
    find(rows, head, &slots, starts);
    data
}

/// Elements of a widened row, padding included.
pub(super) fn pitch(dim: usize) -> usize {
    dim.next_multiple_of(UNIT)
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
            tile::folds(&sums[i], weights);
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
