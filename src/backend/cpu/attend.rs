//! Decode attention over what the heads still hold: every head its own length, no allocation.
//!
//! In: q `[Hq, M, D]`, k and v `[H, len, D]` in any layout; out `Hq` rows `[M, D]` f32, and `Hq` rows `[M]`
//! of log-sum-exp (natural). Query `i` sees all but the last `M - 1 - i` slots; one that sees none gets zeros
//! and -∞.
//!
//! Cost: one read of K and V per block of [`QUERIES`] query rows (at `M = 1` a group is one block), and
//! `4·G·M·len·D` flops. It is to be memory bound: at `G = 4` a slot takes some 50 cycles, less than its bytes take to come. The vector
//! code is in [`scan`]. Softmax is online, tile by tile, to base two.
//!
//! Work is shared out over (sequence, head, block of queries), and inside a head over halves down to
//! [`CHUNK`] slots by `rayon::join`, whose partial results live on the stack and merge in slot order: heads differ in
//! length. Chunks have a fixed size, so the bits do not depend on threads. Results go out under a mutex: rows are
//! short. Below [`SMALL`] the caller's thread does it all, by the same chunks.

mod scan;
mod source;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::HostSlice;
use super::isa::Isa;
use super::tile;
use crate::backend::ops::Attend;
use crate::backend::{AttendView, check};
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use scan::Scan;
use source::{Order, lanes, pitch};

/// Query rows that share a pass over K and V, at most.
const QUERIES: usize = 8;
/// Elements of a block's queries, and of its outputs.
const BLOCK: usize = QUERIES * 256;
/// Products below which waking other threads takes longer than they save: some 100 µs of a thread.
const SMALL: usize = 1 << 20;
/// Slots that one task attends to.
const CHUNK: usize = 512;

type View<'a> = AttendView<'a, HostSlice<'a>>;

pub(super) fn run(
    isa: Isa,
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
        let block = Block::find(isa, op, sequences, item);
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
    QUERIES.min(BLOCK / pitch(sequence.k.dim()))
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
#[repr(C, align(64))]
struct Block<'a> {
    /// Queries, scaled to logits to base two, in rows of [`Block::pitch`] and in the order of the keys.
    q: [f32; BLOCK],
    isa: Isa,
    view: &'a View<'a>,
    head: usize,
    rows: Range<usize>,
    /// Row of the outputs at which the sequence starts.
    first_row: usize,
}

impl<'a> Block<'a> {
    fn find(isa: Isa, op: &Attend, sequences: &'a [View<'a>], mut item: usize) -> Self {
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
        let head = item / blocks;
        let mut block = Self { q: [0.0; BLOCK], isa, view, head, rows, first_row };
        let (order, lanes, scale) =
            (Order::of(&view.k), lanes(isa), op.scale * std::f32::consts::LOG2_E);
        let (dim, pitch) = (view.k.dim(), block.pitch());
        let mut query = [0.0; BLOCK];
        let query = &mut query[..dim];
        for i in 0..block.rows.len() {
            let (hq, m) = block.query(i);
            tile::widen_rows(&view.q, hq, m..m + 1, query);
            for (element, x) in query.iter().enumerate() {
                block.q[i * pitch + order.place(element, lanes)] = x * scale;
            }
        }
        block
    }

    /// Elements of a row of queries and outputs.
    fn pitch(&self) -> usize {
        pitch(self.view.k.dim())
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
            return self.isa.run(Scan { block: self, slots, part });
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
        for i in 0..self.rows.len() {
            part.merge(i, self.pitch(), &right);
        }
    }

    /// Divides by the denominators and writes the rows.
    fn write(&self, part: &Part, out: &mut Ragged<f32>, lse: Option<&mut Ragged<f32>>) {
        let (dim, pitch) = (self.view.k.dim(), self.pitch());
        let (order, lanes) = (Order::of(&self.view.v), lanes(self.isa));
        let mut lse = lse;
        for i in 0..self.rows.len() {
            let (hq, m) = self.query(i);
            let row = &mut out.row_mut(self.first_row + hq)[m * dim..][..dim];
            // A query that sees nothing has no denominator.
            let factor = if self.visible(i) == 0 { 0.0 } else { 1.0 / part.sum[i] };
            let sums = &part.out[i * pitch..][..pitch];
            for (element, x) in row.iter_mut().enumerate() {
                *x = sums[order.place(element, lanes)] * factor;
            }
            if let Some(lse) = &mut lse {
                let log = f64::from(part.max[i]) + f64::from(part.sum[i]).log2();
                lse.row_mut(self.first_row + hq)[m] = (log * std::f64::consts::LN_2) as f32;
            }
        }
    }
}

/// Softmax state of a block over some slots: maxima of logits to base two, and sums and outputs relative to them.
#[repr(C, align(64))]
struct Part {
    /// Rows of [`Block::pitch`], in the order of the values.
    out: [f32; BLOCK],
    max: [f32; QUERIES],
    sum: [f32; QUERIES],
}

impl Part {
    const EMPTY: Self =
        Self { max: [f32::NEG_INFINITY; QUERIES], sum: [0.0; QUERIES], out: [0.0; BLOCK] };

    /// Joins the state of row `i` over later slots.
    fn merge(&mut self, i: usize, pitch: usize, later: &Self) {
        if later.sum[i] == 0.0 {
            return;
        }
        let max = tile::max2(self.max[i], later.max[i]);
        let (a, b) = ((self.max[i] - max).exp2(), (later.max[i] - max).exp2());
        self.max[i] = max;
        self.sum[i] = self.sum[i] * a + later.sum[i] * b;
        let out = self.out[i * pitch..][..pitch].iter_mut();
        out.zip(&later.out[i * pitch..]).for_each(|(x, &y)| *x = *x * a + y * b);
    }
}
