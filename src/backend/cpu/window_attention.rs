//! Scores from the last queries, or a probe's: softmax attention, reduced over the window and the group.
//!
//! In: q `[Hq, ≥W, D]`, k `[H, len, D]`; out `[H, len]` f32. Sources: SnapKV (the window), DefensiveKV
//! (`row_pool`: its code pools every row and scales it back to its mass), H2O (`W = T`).
//!
//! Two passes, because a probability is final only when its row's denominator is known. Pass 1 finds the maximum and the
//! sums of each row; pass 2 forms probabilities tile by tile and reduces them at once. What passes between them: nothing
//! where a second product costs less than memory (bf16 by the tile unit), else the logits, four times the keys at most. With
//! the prefill's log-sum-exp pass 1 is skipped, unless `row_pool` needs the mass that a row has on the past.
//! Cost: `2·Hq·W·len·D` flops, or twice that, a read of K each (the second from cache: heads are done a few at a time), and
//! as many exponentials as probabilities, twice. Scratch per thread: a tile of K and its product with a panel of queries.
//!
//! Positions ascend, so the slots that a query sees are a prefix of the head, and so is the past. Every tile
//! and piece has a size that follows from the shapes and the instruction set; partial results are joined in slot order:
//! the number of threads does not change a bit.

mod probabilities;
mod queries;
mod reduce;
mod stats;

use std::ops::Range;

use rayon::prelude::*;

use super::isa::{Isa, LANES};
use super::tile::Aligned;
use super::{HostLayer, HostSlice, pairs, tile};
use crate::backend::check;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use crate::view::Rows;
pub(super) use probabilities::Attention;
use queries::{Product, Queries};
use reduce::{Chunk, Factors};
use stats::{Stat, row_stats};

/// Query rows per block (of all heads of a group); at least one token's.
const BLOCK: usize = 128;
/// Blocks of queries that are kept for all tasks; longer windows load theirs in each.
const KEPT: usize = 4;
/// Slots of a task of pass 2, rounded up to whole tiles.
const CHUNK: usize = 1024;
/// Keys, in bytes, that a thread's share of the caches holds from one pass to the next.
const CACHED: usize = 1 << 20;
/// Bytes of logits that are kept from one pass to the next, for each of keys.
const KEPT_LOGITS: usize = 4;

const METHOD: &str = "window attention";

pub(super) fn run(
    isa: Isa,
    logits: &mut Aligned,
    op: &WindowAttention,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
    mean: Option<&mut Ragged<f32>>,
) -> Result<()> {
    check::window_attention(op, layers, out, mean.as_deref())?;
    let heads =
        tile::segments(layers).map(|(l, h)| Head::new(op, l, h)).collect::<Result<Vec<_>>>()?;
    let mut rows = out.rows_mut().into_iter();
    let mut means = mean.map(|mean| mean.rows_mut().into_iter());
    let mut heads = heads.as_slice();
    while !heads.is_empty() {
        let mut bytes = 0;
        let room = CACHED * rayon::current_num_threads();
        let fit = heads.iter().take_while(|head| {
            let before = bytes;
            bytes += head.bytes();
            before < room
        });
        let (now, later) = heads.split_at(fit.count());
        heads = later;
        let means = means.as_mut().map(|rows| rows.take(now.len()).collect());
        let rows = rows.by_ref().take(now.len()).collect();
        score(isa, now, logits, rows, means);
    }
    Ok(())
}

/// Scores of some heads.
fn score(
    isa: Isa,
    heads: &[Head<'_>],
    logits: &mut Aligned,
    out: Vec<&mut [f32]>,
    means: Option<Vec<&mut [f32]>>,
) {
    let kept: Vec<Vec<Queries>> = heads.par_iter().map(|head| head.kept(isa)).collect();
    let room: Vec<Vec<Room>> = heads.iter().map(|head| head.kept_logits(isa)).collect();
    let logits = logits.first(room.iter().flatten().map(|r| r.panels * r.each).sum());
    let stats = row_stats(isa, heads, &kept, split(&room, logits));
    let logits = split(&room, logits);
    let factors: Vec<Vec<Vec<Factors>>> =
        heads.iter().zip(&stats).map(|(head, stats)| head.factors(stats)).collect();
    let mut means = means.into_iter().flatten();
    let mut tasks = Vec::new();
    for ((((head, kept), factors), logits), row) in
        heads.iter().zip(&kept).zip(&factors).zip(&logits).zip(out)
    {
        row.fill(0.0);
        let chunk = CHUNK.next_multiple_of(reduce::width(isa, head));
        let mut mean = means.next().map(|row| {
            row.fill(0.0);
            row.chunks_mut(chunk)
        });
        for (i, out) in row[..head.scored].chunks_mut(chunk).enumerate() {
            let mean = mean.as_mut().and_then(Iterator::next);
            let chunk = Chunk { isa, head, kept, factors, logits, start: i * chunk };
            tasks.push((chunk, out, mean));
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (chunk, out, mean)| {
        chunk.reduce(scratch, out, mean)
    });
}

/// Logits of a block of queries: panel after panel, in each slot after slot.
struct Room {
    panels: usize,
    each: usize,
}

/// Kept logits of each panel of a block.
type Kept<'a> = Vec<&'a mut [f32]>;

/// The parts of each block of each head.
fn split<'a>(room: &[Vec<Room>], mut logits: &'a mut [f32]) -> Vec<Vec<Kept<'a>>> {
    let mut of = |room: &Room| -> Kept<'a> {
        (0..room.panels).filter_map(|_| logits.split_off_mut(..room.each)).collect()
    };
    room.iter().map(|blocks| blocks.iter().map(&mut of).collect()).collect()
}

/// One segment: what of it is scored, by which queries.
struct Head<'a> {
    op: &'a WindowAttention,
    layer: &'a HostLayer<'a>,
    q: &'a Rows<'a, HostSlice<'a>>,
    /// Log-sum-exp of the query rows, if lent.
    lse: Option<&'a Rows<'a, HostSlice<'a>>>,
    head: usize,
    /// Query rows used.
    window: u32,
    /// Position of the first of them. A probe's stand behind the last token: all slots are the past.
    first: u32,
    /// Slots before the window.
    past: usize,
    /// Slots that get a score: the past, or all.
    scored: usize,
    group: usize,
    /// Window tokens per block of query rows.
    block: usize,
}

impl<'a> Head<'a> {
    fn new(op: &'a WindowAttention, layer: &'a HostLayer<'a>, head: usize) -> Result<Self> {
        let group = layer.shape().group();
        let (q, lse, window, first) = if op.probe {
            let q = layer.probe(METHOD)?;
            (q, None, op.window.min(q.len(0) as u32), layer.tokens())
        } else {
            // A sequence shorter than the window is all window.
            let window = op.window.min(layer.tokens());
            (layer.q(METHOD)?, layer.lse(), window, layer.tokens() - window)
        };
        for hq in head * group..(head + 1) * group {
            let rows = lse.map_or(q.len(hq), |lse| q.len(hq).min(lse.len(hq)));
            if rows < window as usize {
                return Err(Error::TooFewQueries {
                    method: METHOD,
                    needed: u64::from(window),
                    got: rows as u64,
                });
            }
        }
        let past = layer.slots_before(head, first);
        let scored = if op.score_window { layer.k().len(head) } else { past };
        let block = (BLOCK / group).max(1);
        Ok(Self { op, layer, q, lse, head, window, first, past, scored, group, block })
    }

    fn window(&self) -> usize {
        self.window as usize
    }

    /// Slots visible to query row `w` of the window: the first ones.
    fn visible(&self, w: usize) -> usize {
        self.layer.slots_before(self.head, self.first + w as u32 + 1)
    }

    /// Slots that query row `w` of the window gives scores to: the first ones.
    fn reached(&self, w: usize) -> usize {
        let end = self.first + w as u32 + 1;
        self.layer.slots_before(self.head, end.saturating_sub(self.op.gap))
    }

    /// Blocks of window tokens.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (window, block) = (self.window(), self.block);
        (0..window).step_by(block).map(move |w| w..window.min(w + block))
    }

    /// Whether pass 1 is needed.
    fn two_passes(&self) -> bool {
        self.scored > 0 && (self.lse.is_none() || self.op.row_pool.is_some())
    }

    /// Logits of each block, those of padding included, if they are kept: where products cost more than memory, and not
    /// those of long windows. Depends on the head alone, as results may.
    fn kept_logits(&self, isa: Isa) -> Vec<Room> {
        let last = self.blocks().last();
        let seen = last.map_or(0, |block| self.visible(block.end - 1));
        let slots = seen.next_multiple_of(pairs::BLOCK);
        let of = |block| {
            let shape = queries::Shape::new(self, &block);
            let panel = queries::panel(isa, self, shape);
            Room { panels: shape.width / panel, each: slots * panel }
        };
        let blocks: Vec<Room> = self.blocks().map(of).collect();
        let bytes = blocks.iter().map(|r| r.panels * r.each).sum::<usize>() * size_of::<f32>();
        let keep = self.two_passes()
            && bytes <= KEPT_LOGITS * self.bytes()
            && Queries::worth_keeping(isa, self);
        if keep { blocks } else { Vec::new() }
    }

    /// Bytes of its keys.
    fn bytes(&self) -> usize {
        let k = self.layer.k();
        k.len(self.head) * k.dim() * k.dtype().size()
    }

    /// Whether the heads of the group are reduced each by itself before they meet.
    fn apart(&self) -> bool {
        self.group > 1 && self.window > 1 && self.op.over_window != self.op.over_group
    }

    /// How rows are reduced; heads that are [`apart`](Self::apart), each by itself.
    fn reduction(&self) -> Reduce {
        if self.window == 1 { self.op.over_group } else { self.op.over_window }
    }

    /// Head of the group and window token of each row of a block, padding included.
    fn rows(&self, block: &Range<usize>) -> Vec<Option<(usize, usize)>> {
        let shape = queries::Shape::new(self, block);
        let row = |i: usize| {
            let (g, w) = (i / shape.pitch, block.start + i % shape.pitch);
            (g < self.group && w < block.end).then_some((g, w))
        };
        (0..shape.width).map(row).collect()
    }

    /// Slots of each row of a block up to a limit that depends on its window token.
    fn limits(&self, block: &Range<usize>, limit: impl Fn(usize) -> usize) -> Vec<[u32; LANES]> {
        let limits: Vec<u32> = block.clone().map(|w| limit(w) as u32).collect();
        let of = |row: Option<(usize, usize)>| row.map_or(0, |(_, w)| limits[w - block.start]);
        let rows: Vec<u32> = self.rows(block).into_iter().map(of).collect();
        rows.as_chunks().0.to_vec()
    }

    /// Queries of short windows, by block.
    fn kept(&self, isa: Isa) -> Vec<Queries> {
        let blocks: Vec<_> = self.blocks().collect();
        if blocks.len() > KEPT {
            return Vec::new();
        }
        let load = |block: Range<usize>| {
            let mut queries = Queries::default();
            queries.load(isa, self, block);
            queries
        };
        blocks.into_iter().map(load).collect()
    }

    /// By block of rows, by block of lanes.
    fn factors(&self, stats: &[Vec<Stat>]) -> Vec<Vec<Factors>> {
        let of = |(block, stats): (Range<usize>, &Vec<Stat>)| {
            let visible = self.limits(&block, |w| self.visible(w));
            let reached = self.limits(&block, |w| self.reached(w));
            let lanes = stats.iter().zip(visible).zip(reached);
            lanes
                .map(|((stat, visible), reached)| Factors::new(self, stat, visible, reached))
                .collect()
        };
        self.blocks().zip(stats).map(of).collect()
    }

    /// What a slot counts for in a row's mass, and in that of the pooled row.
    #[inline(always)]
    fn weights(&self, slot: usize) -> (f32, f32) {
        let (n, r) = (self.scored, self.radius());
        if slot >= n {
            return (0.0, 0.0);
        }
        let windows = (slot + r).min(n - 1) - slot.saturating_sub(r) + 1;
        (1.0, windows as f32 / (2 * r + 1) as f32)
    }

    /// Radius of the row pooling.
    fn radius(&self) -> usize {
        self.op.row_pool.unwrap_or(1) as usize / 2
    }

    /// Log-sum-exp of a row, if lent.
    fn lse(&self, g: usize, w: usize) -> Option<f32> {
        let lse = self.lse?;
        let hq = self.head * self.group + g;
        let HostSlice::F32(data) = lse.storage() else { return None };
        Some(data[lse.start(hq, lse.len(hq) - self.window() + w)])
    }
}

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    queries: Queries,
    product: Product,
    scores: reduce::Sums,
    means: reduce::Sums,
    exponentials: Aligned,
}
