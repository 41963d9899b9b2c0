//! Query rows in the order in which lanes take them, and their products with tiles of keys.
//!
//! Rows of a block lie head after head of the group, `[g, w]`; the product of a tile of keys and a panel of rows is `[slot, row]`, so
//! that [`LANES`] rows go through exponentials side by side, sums over slots are sums of vectors, and so is pooling.

use std::ops::Range;

use super::super::amx::{self, Left, Packed, Right, Unit};
use super::super::isa::{Isa, LANES};
use super::super::tile::{self, Aligned};
use super::Head;

/// Query rows of a block of window tokens.
#[derive(Default)]
pub(super) struct Queries {
    /// `[row, D]`, scaled by a power of two: exact, and enough to keep products finite.
    rows: Vec<f32>,
    packed: Right,
    /// Whether the tile unit can take them.
    splits: bool,
    pub(super) shape: Shape,
}

/// Rows, padding included.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Shape {
    pub(super) width: usize,
    /// Of each head of the group.
    pub(super) pitch: usize,
}

impl Shape {
    /// Heads of the group are padded to whole lanes if they are to be [apart](Head::apart).
    pub(super) fn new(head: &Head<'_>, block: &Range<usize>) -> Self {
        let pitch = match head.apart() {
            true => block.len().next_multiple_of(LANES),
            false => block.len(),
        };
        Self { width: (head.group * pitch).next_multiple_of(amx::BLOCK), pitch }
    }
}

/// Slots that are multiplied at once: with the tile unit all that takes part stays in L1, without it a product pays for packing.
pub(super) fn tile(isa: Isa) -> usize {
    if isa == Isa::Amx { 64 } else { 256 }
}

impl Queries {
    /// Queries of a block.
    pub(super) fn load(&mut self, isa: Isa, head: &Head<'_>, block: Range<usize>) {
        let (dim, len) = (head.q.dim(), block.len());
        self.shape = Shape::new(head, &block);
        self.rows.clear();
        self.rows.resize(self.shape.width * dim, 0.0);
        for g in 0..head.group {
            let hq = head.head * head.group + g;
            let first = head.q.len(hq) - head.window() + block.start;
            let to = &mut self.rows[g * self.shape.pitch * dim..][..len * dim];
            tile::widen_rows(head.q, hq, first..first + len, to);
        }
        let scale = power(dim);
        self.rows.iter_mut().for_each(|x| *x *= scale);
        self.splits = isa == Isa::Amx && self.packed.load(head.q.dtype(), dim, &self.rows);
    }

    /// The queries of a block: those that were kept, or loaded into `scratch`.
    pub(super) fn of<'a>(
        kept: Option<&'a Self>,
        scratch: &'a mut Self,
        isa: Isa,
        head: &Head<'_>,
        block: Range<usize>,
    ) -> &'a Self {
        kept.unwrap_or_else(|| {
            scratch.load(isa, head, block);
            scratch
        })
    }

    /// Rows that are multiplied at once.
    fn panel(&self) -> usize {
        if self.splits { amx::BLOCK } else { self.shape.width }
    }

    /// Panels of rows, by their blocks of lanes.
    pub(super) fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, panel) = (self.shape.width / LANES, self.panel() / LANES);
        (0..all).step_by(panel).map(move |first| first..first + panel)
    }

    /// Factor from products to logits to base two.
    pub(super) fn scale(dim: usize) -> f32 {
        let scale = std::f64::consts::LOG2_E / (dim as f64).sqrt();
        (scale / f64::from(power(dim))) as f32
    }
}

/// The power of two next to `1 / √D`.
fn power(dim: usize) -> f32 {
    (-(dim as f64).log2() / 2.0).round().exp2() as f32
}

/// A thread's means of multiplication.
#[derive(Default)]
pub(super) struct Product {
    unit: Option<Unit>,
    packed: Packed,
    keys: Vec<f32>,
    /// Whether they hold the current slots.
    split: Option<bool>,
    widened: bool,
    logits: Aligned,
}

impl Product {
    /// Turns to other slots.
    pub(super) fn turn(&mut self) {
        (self.split, self.widened) = (None, false);
    }

    /// `q · k` of a panel of queries and the current slots of its head: `[slot, row]`.
    pub(super) fn multiply(
        &mut self,
        head: &Head<'_>,
        queries: &Queries,
        panel: &Range<usize>,
        slots: Range<usize>,
    ) -> &mut [f32] {
        let (dim, keys, width) = (head.q.dim(), head.layer.k(), queries.panel());
        let len = slots.len() * width;
        let logits = self.logits.first(slots.len().next_multiple_of(amx::BLOCK) * width);
        if queries.splits {
            let unit = self.unit.get_or_insert_with(Unit::open);
            let block = panel.start * LANES / width;
            if let Some(left) = Left::in_place(keys, head.head, slots.clone()) {
                unit.multiply(&left, &queries.packed, block, logits);
                return &mut logits[..len];
            }
            let load = || self.packed.load(keys, head.head, slots.clone());
            if *self.split.get_or_insert_with(load) {
                unit.multiply(&self.packed.left(), &queries.packed, block, logits);
                return &mut logits[..len];
            }
        }
        if !self.widened {
            self.keys.resize(slots.len() * dim, 0.0);
            tile::widen_rows(keys, head.head, slots.clone(), &mut self.keys);
            self.widened = true;
        }
        let rows = &queries.rows[panel.start * LANES * dim..panel.end * LANES * dim];
        tile::matmul_nt(dim, &self.keys, rows, &mut logits[..len]);
        &mut logits[..len]
    }
}
