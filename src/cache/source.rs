//! Out-of-place compaction: what is kept of a borrowed layer, in whatever layout, goes to new memory.
//!
//! The destination comes as disjoint pieces of one head each, `[rows, D]`; rayon shares them out.

use rayon::prelude::*;

use super::buffer::{prefetch_row, stretches};
use super::slots::{Held, Slots, expect, with_next};
use crate::backend::cpu::{HostLayer, HostSlice, Streamed};
use crate::error::Result;
use crate::ids::Position;
use crate::ragged::Ragged;
use crate::view::Rows;

/// Bytes that a thread copies at a time: enough to forget the scheduling, few enough to share out evenly.
const PIECE_BYTES: usize = 256 << 10;

/// A layer and what is kept of it. Kept positions ascend and are held.
pub(super) struct Source<'a> {
    pub(super) k: Rows<'a, HostSlice<'a>>,
    pub(super) v: Rows<'a, HostSlice<'a>>,
    pub(super) tokens: u32,
    pub(super) held: Vec<Held<'a>>,
    pub(super) kept: Vec<&'a [Position]>,
}

/// Room for the kept positions `first ..` of a head.
pub(super) struct Piece<'a> {
    pub(super) head: usize,
    pub(super) first: usize,
    pub(super) bytes: &'a mut [u8],
}

impl<'a> Source<'a> {
    /// Checks `kept`, one row per KV head, against what the view holds.
    pub(super) fn new(view: &HostLayer<'a>, kept: &'a Ragged<Position>) -> Result<Self> {
        let (k, v) = (*view.k(), *view.v());
        expect("heads of the kept positions", k.heads(), kept.rows())?;
        let mut held = Vec::with_capacity(k.heads());
        for (h, row) in kept.iter().enumerate() {
            let at = view.positions().map_or(Held::Dense(k.len(h)), |p| Held::At(&p[h]));
            at.check(h, row, view.tokens())?;
            held.push(at);
        }
        Ok(Self { k, v, tokens: view.tokens(), held, kept: kept.iter().collect() })
    }

    /// Books for what is kept, with room for `slack` more slots per head.
    pub(super) fn slots(&self, slack: u32) -> Result<Slots> {
        let dim = self.k.dim() as u32;
        Slots::new((self.k.dtype(), dim), self.tokens, &self.kept, slack)
    }

    /// Copies keys to the pieces `k`, values to the pieces `v`.
    pub(super) fn copy(&self, k: Vec<Piece<'_>>, v: Vec<Piece<'_>>) {
        let all = k.into_par_iter().map(|p| (p, &self.k));
        all.chain(v.into_par_iter().map(|p| (p, &self.v))).for_each(|(p, src)| self.fill(p, src));
    }

    fn fill(&self, piece: Piece<'_>, src: &Rows<'_, HostSlice<'_>>) {
        let Piece { head, first, bytes } = piece;
        let row = src.dim() * src.dtype().size();
        let moves = self.held[head].moves(self.kept[head], first, first + bytes.len() / row);
        let mut out = Streamed::new(bytes);
        for (m, next) in with_next(moves) {
            if let Some(next) = next {
                for slot in next.from..next.from + next.rows {
                    prefetch_row(src, head, slot);
                }
            }
            let mut at = (m.to - first) * row;
            for bytes in stretches(src, head, m.from..m.from + m.rows) {
                out.write(at, bytes);
                at += bytes.len();
            }
        }
    }
}

/// Cuts the rows of a head, from its first slot on, into pieces.
pub(super) fn cut<'b>(out: &mut Vec<Piece<'b>>, head: usize, bytes: &'b mut [u8], row: usize) {
    let rows = (PIECE_BYTES / row).max(1);
    let pieces = bytes.chunks_mut(rows * row).enumerate();
    out.extend(pieces.map(|(i, bytes)| Piece { head, first: i * rows, bytes }));
}
