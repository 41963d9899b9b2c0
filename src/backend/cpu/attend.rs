//! Decode attention over what the heads still hold: every head its own length, no allocation.
//!
//! In: q `[Hq, M, D]`, k and v `[H, len, D]` in any layout; out `Hq` rows `[M, D]` f32, and `Hq` rows `[M]`
//! of log-sum-exp (natural). Query `i` sees all but the last `M - 1 - i` slots; one that sees none gets zeros
//! and -∞.
//!
//! Cost: one read of K and V per block of [`QUERIES`] query rows (at `M = 1` a group is one block), and
//! `4·G·M·len·D` flops: at `G = 1` memory bound, from `G = 4` on it is the arithmetic, hence tiles of K and V
//! that are widened once into L1 and met by all queries there; f32 rows are read where they lie, so that memory is
//! fetched while the arithmetic goes on. Softmax is online, tile by tile.
//!
//! Work is shared out over (sequence, head, block of queries), and inside a head over halves down to
//! [`CHUNK`] slots by `rayon::join`, whose partial results live on the stack and merge in slot order: heads differ in
//! length. Chunks have a fixed size, so the bits do not depend on threads. Results go out under a mutex: rows are
//! short. Below [`SMALL`] the caller's thread does it all, by the same chunks.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::HostSlice;
use super::tile::{self, exp, simd};
use crate::backend::ops::Attend;
use crate::backend::{AttendView, check};
use crate::error::{Error, Result};
use crate::ragged::Ragged;

/// Query rows that share a pass over K and V, at most.
const QUERIES: usize = 8;
/// Elements of a block's queries, and of its outputs.
const BLOCK: usize = QUERIES * 256;
/// Elements of the tile that K and V are widened into, and its rows at most.
const TILE: usize = 8192;
const TILE_ROWS: usize = 128;
/// Products below which waking other threads takes longer than they save: some 100 µs of a thread.
const SMALL: usize = 1 << 18;
/// Slots that one task attends to.
const CHUNK: usize = 256;

type View<'a> = AttendView<'a, HostSlice<'a>>;

pub(super) fn run(
    op: &Attend,
    sequences: &[AttendView<'_, HostSlice<'_>>],
    out: &mut Ragged<f32>,
    lse: Option<&mut Ragged<f32>>,
) -> Result<()> {
    check::attend(sequences, out, lse.as_deref())?;
    for AttendView { k, .. } in sequences {
        if k.dim() > BLOCK {
            return Err(Error::TooLarge {
                what: "head dim of attention",
                got: k.dim() as u64,
                limit: BLOCK as u64,
            });
        }
    }
    let items = sequences.iter().map(items).sum::<usize>();
    let sink = Mutex::new((out, lse));
    let small = sequences.iter().map(products).sum::<usize>() < SMALL;
    let attend = |item| {
        let block = Block::find(op, sequences, item);
        let part = block.attend(small);
        let (out, lse) = &mut *sink.lock().unwrap_or_else(PoisonError::into_inner);
        block.write(&part, out, lse.as_deref_mut());
    };
    match small {
        true => (0..items).for_each(attend),
        false => (0..items).into_par_iter().for_each(attend),
    }
    Ok(())
}

/// Query rows per block: [`QUERIES`], fewer for dims beyond 256.
fn width(sequence: &View<'_>) -> usize {
    QUERIES.min(BLOCK / sequence.k.dim())
}

/// Query rows that share a KV head.
fn queries(sequence: &View<'_>) -> usize {
    sequence.q.heads() / sequence.k.heads() * sequence.q.len(0)
}

/// Blocks of a sequence.
fn items(sequence: &View<'_>) -> usize {
    sequence.k.heads() * queries(sequence).div_ceil(width(sequence))
}

/// Products of one element of a query and a key; as many follow with values.
fn products(sequence: &View<'_>) -> usize {
    let slots: usize = (0..sequence.k.heads()).map(|h| sequence.k.len(h)).sum();
    slots * sequence.k.dim() * queries(sequence)
}

/// A block of query rows of one KV head. Row `r` is query `r / G` of the group's head `r % G`, so that the rows
/// of a block see nearly the same slots.
struct Block<'a> {
    view: &'a View<'a>,
    head: usize,
    rows: Range<usize>,
    /// Row of the outputs at which the sequence starts.
    first_row: usize,
    /// Scaled queries.
    q: [f32; BLOCK],
}

impl<'a> Block<'a> {
    fn find(op: &Attend, sequences: &'a [View<'a>], mut item: usize) -> Self {
        let (mut index, mut first_row) = (0, 0);
        while item >= items(&sequences[index]) {
            item -= items(&sequences[index]);
            first_row += sequences[index].q.heads();
            index += 1;
        }
        let view = &sequences[index];
        let (all, width) = (queries(view), width(view));
        let blocks = all.div_ceil(width);
        let start = item % blocks * width;
        let rows = start..all.min(start + width);
        let mut block = Self { view, head: item / blocks, rows, first_row, q: [0.0; BLOCK] };
        for i in 0..block.rows.len() {
            let (hq, m) = block.query(i);
            let row = &mut block.q[i * view.q.dim()..][..view.q.dim()];
            tile::widen_rows(&view.q, hq, m..m + 1, row);
            row.iter_mut().for_each(|x| *x *= op.scale);
        }
        block
    }

    /// Query head and query of row `i` of the block.
    fn query(&self, i: usize) -> (usize, usize) {
        let group = self.view.q.heads() / self.view.k.heads();
        let r = self.rows.start + i;
        (self.head * group + r % group, r / group)
    }

    /// Slots that row `i` of the block sees.
    fn visible(&self, i: usize) -> usize {
        let hidden = self.view.q.len(0) - 1 - self.query(i).1;
        self.view.k.len(self.head).saturating_sub(hidden)
    }

    fn attend(&self, alone: bool) -> Part {
        let seen = self.visible(self.rows.len() - 1);
        let mut part = Part::EMPTY;
        self.reduce(0..seen, alone, &mut part);
        part
    }

    /// Attention over some slots, halved until a task is small enough; on this thread `alone` if asked to.
    fn reduce(&self, slots: Range<usize>, alone: bool, part: &mut Part) {
        let chunks = slots.len().div_ceil(CHUNK);
        if chunks <= 1 {
            return self.scan(slots, part);
        }
        let middle = slots.start + chunks / 2 * CHUNK;
        let mut right = Part::EMPTY;
        let mut halves = (
            || self.reduce(slots.start..middle, alone, part),
            || self.reduce(middle..slots.end, alone, &mut right),
        );
        match alone {
            true => (halves.0(), halves.1()),
            false => rayon::join(halves.0, halves.1),
        };
        let dim = self.view.k.dim();
        for i in 0..self.rows.len() {
            part.merge(i, dim, &right);
        }
    }

    fn scan(&self, slots: Range<usize>, part: &mut Part) {
        let (view, dim, n) = (self.view, self.view.k.dim(), self.rows.len());
        let mut tile = [0f32; TILE];
        let mut weights = [[0f32; TILE_ROWS]; QUERIES];
        for start in slots.clone().step_by(TILE_ROWS.min(TILE / dim)) {
            let end = slots.end.min(start + TILE_ROWS.min(TILE / dim));
            let seen: [usize; QUERIES] = std::array::from_fn(|i| {
                if i < n { self.visible(i).clamp(start, end) - start } else { 0 }
            });
            let keys =
                tile::f32_rows(&view.k, self.head, start..end, &mut tile[..(end - start) * dim]);
            simd(
                #[inline(always)]
                || logits(dim, &self.q[..n * dim], keys, &mut weights),
            );
            let values =
                tile::f32_rows(&view.v, self.head, start..end, &mut tile[..(end - start) * dim]);
            simd(
                #[inline(always)]
                || {
                    for i in 0..n {
                        part.weigh(i, dim, &mut weights[i][..seen[i]]);
                    }
                    accumulate(dim, &weights, &seen[..n], values, &mut part.out);
                },
            );
        }
    }

    /// Divides by the denominators and writes the rows.
    fn write(&self, part: &Part, out: &mut Ragged<f32>, lse: Option<&mut Ragged<f32>>) {
        let dim = self.view.k.dim();
        let mut lse = lse;
        for i in 0..self.rows.len() {
            let (hq, m) = self.query(i);
            let row = &mut out.row_mut(self.first_row + hq)[m * dim..][..dim];
            // A query that sees nothing has no denominator.
            let factor = if self.visible(i) == 0 { 0.0 } else { 1.0 / part.sum[i] };
            let sums = &part.out[i * dim..][..dim];
            row.iter_mut().zip(sums).for_each(|(o, &x)| *o = x * factor);
            if let Some(lse) = &mut lse {
                lse.row_mut(self.first_row + hq)[m] = part.max[i] + part.sum[i].ln();
            }
        }
    }
}

/// Softmax state of a block over some slots: maxima, and sums and outputs relative to them.
struct Part {
    max: [f32; QUERIES],
    sum: [f32; QUERIES],
    out: [f32; BLOCK],
}

impl Part {
    const EMPTY: Self =
        Self { max: [f32::NEG_INFINITY; QUERIES], sum: [0.0; QUERIES], out: [0.0; BLOCK] };

    /// Turns the logits of row `i` into weights, moving its state to the new maximum.
    #[inline(always)]
    fn weigh(&mut self, i: usize, dim: usize, logits: &mut [f32]) {
        if logits.is_empty() {
            return;
        }
        let max = tile::max2(self.max[i], tile::max(logits));
        if max != self.max[i] {
            let factor = if self.sum[i] == 0.0 { 0.0 } else { exp(self.max[i] - max) };
            self.max[i] = max;
            self.sum[i] *= factor;
            self.out[i * dim..][..dim].iter_mut().for_each(|x| *x *= factor);
        }
        logits.iter_mut().for_each(|x| *x = exp(*x - max));
        self.sum[i] += tile::sum(logits);
    }

    /// Joins the state of row `i` over later slots.
    fn merge(&mut self, i: usize, dim: usize, later: &Self) {
        if later.sum[i] == 0.0 {
            return;
        }
        let max = tile::max2(self.max[i], later.max[i]);
        let (a, b) = (exp(self.max[i] - max), exp(later.max[i] - max));
        self.max[i] = max;
        self.sum[i] = self.sum[i] * a + later.sum[i] * b;
        let out = self.out[i * dim..][..dim].iter_mut();
        out.zip(&later.out[i * dim..]).for_each(|(x, &y)| *x = *x * a + y * b);
    }
}

/// `weights[i][row] = q[i] · tile[row]`.
#[inline(always)]
fn logits(dim: usize, q: &[f32], tile: &[f32], weights: &mut [[f32; TILE_ROWS]; QUERIES]) {
    /// Rows that meet a query together: as many chains of additions as hide their latency.
    const ROWS: usize = 8;
    let blocks = tile.chunks_exact(ROWS * dim);
    let (rest, done) = (blocks.remainder(), tile.len() / (ROWS * dim) * ROWS);
    for (b, block) in blocks.enumerate() {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|r| &block[r * dim..(r + 1) * dim]);
        for (q, weights) in q.chunks_exact(dim).zip(weights.iter_mut()) {
            weights[b * ROWS..(b + 1) * ROWS].copy_from_slice(&dots(q, rows));
        }
    }
    for (r, row) in rest.chunks_exact(dim).enumerate() {
        for (q, weights) in q.chunks_exact(dim).zip(weights.iter_mut()) {
            [weights[done + r]] = dots(q, [row]);
        }
    }
}

/// Dot products of a query with several rows; each the same bits as alone.
#[inline(always)]
fn dots<const R: usize>(q: &[f32], rows: [&[f32]; R]) -> [f32; R] {
    /// Wider sums cost more to fold than they save.
    const LANES: usize = 8;
    let (chunks, q_rest) = q.as_chunks::<LANES>();
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..chunks.len()]);
    let mut lanes = [[0f32; LANES]; R];
    for (c, q) in chunks.iter().enumerate() {
        for r in 0..R {
            for l in 0..LANES {
                lanes[r][l] += q[l] * row_chunks[r][c][l];
            }
        }
    }
    let mut sums = [0f32; R];
    for (sum, x) in sums.iter_mut().zip(&lanes) {
        *sum = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
    }
    // Apart from the loops above, whose lanes must stay in registers.
    if !q_rest.is_empty() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            let rest = q_rest.iter().zip(&row[q.len() - q_rest.len()..]);
            *sum += rest.map(|(&a, &b)| a * b).sum::<f32>();
        }
    }
    sums
}

/// `out[i] += Σ_row weights[i][row] · tile[row]` over the rows that query `i` sees.
#[inline(always)]
fn accumulate(
    dim: usize,
    weights: &[[f32; TILE_ROWS]; QUERIES],
    seen: &[usize],
    tile: &[f32],
    out: &mut [f32],
) {
    /// Outputs that stay in registers while the rows go by.
    const LANES: usize = 32;
    for (i, (out, &seen)) in out.chunks_exact_mut(dim).zip(seen).enumerate() {
        let weights = &weights[i][..seen];
        let (chunks, rest) = out.as_chunks_mut::<LANES>();
        for (c, sums) in chunks.iter_mut().enumerate() {
            let mut lanes = *sums;
            for (&w, row) in weights.iter().zip(tile.chunks_exact(dim)) {
                let row: &[f32; LANES] = &row.as_chunks().0[c];
                for l in 0..LANES {
                    lanes[l] += w * row[l];
                }
            }
            *sums = lanes;
        }
        let skip = dim - rest.len();
        for (&w, row) in weights.iter().zip(tile.chunks_exact(dim)) {
            rest.iter_mut().zip(&row[skip..]).for_each(|(o, &x)| *o += w * x);
        }
    }
}
