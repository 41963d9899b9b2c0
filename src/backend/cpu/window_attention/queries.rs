//! Query rows in the order in which lanes take them, and their products with tiles of keys.
//!
//! Rows of a block lie head after head of the group, `[g, w]`; the product of a tile of keys and a panel of rows is `[slot, row]`, so
//! that [`LANES`] rows go through exponentials side by side, sums over slots are sums of vectors, and so is pooling.

use std::ops::Range;

use super::super::isa::{Isa, LANES, Lanes};
use super::super::pairs::{self, Left, Packed, Right, Unit};
use super::super::tile::{self, Aligned};
use super::Head;
use crate::dtype::Dtype;

/// Query rows of a block of window tokens.
#[derive(Default)]
pub(super) struct Queries {
    /// `[row, D]`, scaled by a power of two: exact, and enough to keep products finite.
    rows: Vec<f32>,
    packed: Right,
    /// With which instructions pairs are multiplied, if at all.
    by: Option<Isa>,
    pub(super) shape: Shape,
    /// Rows that are multiplied at once.
    pub(super) panel: usize,
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
        Self { width: (head.group * pitch).next_multiple_of(pairs::BLOCK), pitch }
    }
}

/// Slots that are multiplied at once: in pairs what takes part stays in L1 or next to it, without them a product pays for packing.
pub(super) fn tile(isa: Isa, head: &Head<'_>) -> usize {
    let keys = head.layer.k().dtype();
    match (pairs::suit(isa, keys, head.q.dtype()), pairs::planes(keys)) {
        (true, 1) => 128,
        (true, 2) => 64,
        (true, _) => 32,
        (false, _) => 256,
    }
}

/// Rows of a block that are multiplied at once.
pub(super) fn panel(isa: Isa, head: &Head<'_>, shape: Shape) -> usize {
    match pairs::suit(isa, head.layer.k().dtype(), head.q.dtype()) {
        true => pairs::BLOCK,
        false => shape.width,
    }
}

impl Queries {
    /// Queries of a block.
    pub(super) fn load(&mut self, isa: Isa, head: &Head<'_>, block: Range<usize>) {
        let (dim, len) = (head.q.dim(), block.len());
        self.shape = Shape::new(head, &block);
        self.panel = panel(isa, head, self.shape);
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
        let pairs = pairs::suit(isa, head.layer.k().dtype(), head.q.dtype())
            && self.packed.load(head.q.dtype(), dim, &self.rows);
        self.by = pairs.then_some(isa);
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

    /// Whether products cost more than keeping them: all but those of one plane by the tile unit.
    pub(super) fn worth_keeping(isa: Isa, head: &Head<'_>) -> bool {
        isa < Isa::Amx || head.layer.k().dtype() != Dtype::BF16 || head.q.dtype() != Dtype::BF16
    }

    /// Panels of rows, by their blocks of lanes.
    pub(super) fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, panel) = (self.shape.width / LANES, self.panel / LANES);
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

    /// `q · k` of a panel of queries and the current slots of its head, in `to` if they are kept.
    pub(super) fn multiply<'a>(
        &'a mut self,
        head: &Head<'_>,
        queries: &Queries,
        panel: &Range<usize>,
        slots: Range<usize>,
        to: Option<&'a mut [f32]>,
    ) -> Logits<'a> {
        let (dim, keys, pitch) = (head.q.dim(), head.layer.k(), queries.panel);
        let Self { unit, packed, keys: widened, split, widened: ready, logits } = self;
        let padded = slots.len().next_multiple_of(pairs::BLOCK) * pitch;
        let c = to.unwrap_or_else(|| logits.first(padded));
        let mut by_unit = false;
        if let Some(isa) = queries.by {
            let unit = unit.get_or_insert_with(|| Unit::open(isa));
            let block = panel.start * LANES / pitch;
            if let Some(left) = Left::in_place(keys, head.head, slots.clone()) {
                unit.multiply(&left, &queries.packed, block, c, pitch);
                by_unit = true;
            } else if *split.get_or_insert_with(|| packed.load(keys, head.head, slots.clone())) {
                unit.multiply(&packed.left(), &queries.packed, block, c, pitch);
                by_unit = true;
            }
        }
        if !by_unit {
            if !*ready {
                widened.resize(slots.len() * dim, 0.0);
                tile::widen_rows(keys, head.head, slots.clone(), widened);
                *ready = true;
            }
            let rows = &queries.rows[panel.start * LANES * dim..panel.end * LANES * dim];
            tile::matmul_nt_to(dim, widened, rows, c, pitch);
        }
        Logits { products: &c[..slots.len() * pitch], pitch }
    }
}

/// Products of some slots and blocks of lanes: `[slot, row]`.
#[derive(Clone, Copy)]
pub(super) struct Logits<'a> {
    pub(super) products: &'a [f32],
    pub(super) pitch: usize,
}

impl<'a> Logits<'a> {
    /// A block of lanes of a slot.
    #[inline(always)]
    pub(super) fn at(&self, slot: usize, block: usize) -> &'a Lanes {
        &self.products[slot * self.pitch..][..self.pitch].as_chunks().0[block]
    }

    #[inline(always)]
    pub(super) fn slots(&self) -> usize {
        self.products.len() / self.pitch
    }
}
