//! The model of a cache, and all that a caller can see of a real one. Loops over lists of rows; nothing is clever.

use kvbudget::backend::cpu::{HostLayer, HostSlice};
use kvbudget::cache::{FlatCache, PagePool, PagedCache};
use kvbudget::{Dtype, LayerShape, Position, Ragged, Rows};

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub heads: u32,
    pub dim: u32,
    pub dtype: Dtype,
}

impl Shape {
    pub fn layer(self) -> LayerShape {
        LayerShape::new(2 * self.heads, self.heads, self.dim).unwrap()
    }
}

/// A position with its key row and its value row, as bit patterns.
type Slot = (Position, [Vec<u32>; 2]);

/// What each head holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub tokens: u32,
    pub heads: Vec<Vec<Slot>>,
}

/// A mixing function: neighbours in any argument give unrelated bits, NaN patterns included.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Model {
    /// All positions `tokens .. tokens + new`, each row unlike any other.
    pub fn fresh(shape: Shape, tokens: u32, new: u32) -> Self {
        let mask = if shape.dtype == Dtype::F32 { u32::MAX } else { 0xffff };
        let row = |tensor: u64, h: u32, p: u32| {
            let seed = mix(mix(mix(tensor) ^ u64::from(h)) ^ u64::from(p));
            (0..shape.dim).map(|j| mix(seed ^ u64::from(j)) as u32 & mask).collect()
        };
        let slot = |h, p| (Position(p), [row(0, h, p), row(1, h, p)]);
        let head = |h| (tokens..tokens + new).map(|p| slot(h, p)).collect();
        Self { tokens: tokens + new, heads: (0..shape.heads).map(head).collect() }
    }

    /// What a view holds.
    pub fn read(view: &HostLayer<'_>) -> Self {
        let (k, v) = (rows_of(view.k()), rows_of(view.v()));
        let positions = view.positions().unwrap();
        let slot = |h: usize, s: usize| (positions[h][s], [k[h][s].clone(), v[h][s].clone()]);
        let head = |h: usize| (0..positions[h].len()).map(|s| slot(h, s)).collect();
        Self { tokens: view.tokens(), heads: (0..positions.len()).map(head).collect() }
    }

    pub fn keep(&mut self, kept: &Ragged<Position>) {
        for (h, head) in self.heads.iter_mut().enumerate() {
            head.retain(|(p, _)| kept.row(h).contains(p));
        }
    }

    pub fn extend(&mut self, more: &Self) {
        for (head, new) in self.heads.iter_mut().zip(&more.heads) {
            head.extend_from_slice(new);
        }
        self.tokens = more.tokens;
    }

    pub fn lens(&self) -> Vec<u32> {
        self.heads.iter().map(|h| h.len() as u32).collect()
    }

    pub fn positions(&self) -> Ragged<Position> {
        self.heads.iter().map(|h| h.iter().map(|(p, _)| *p).collect::<Vec<_>>()).collect()
    }
}

/// About `percent` of the positions of each head.
pub fn random_subset(model: &Model, seed: u64, percent: u64) -> Ragged<Position> {
    let mut state = seed;
    let mut keep = || {
        state = mix(state);
        state % 100 < percent
    };
    let rows = model.heads.iter().map(|h| h.iter().map(|(p, _)| *p).filter(|_| keep()).collect());
    rows.collect::<Vec<Vec<_>>>().into_iter().collect()
}

/// Bits of every row of every head.
pub fn rows_of(rows: &Rows<'_, HostSlice<'_>>) -> Vec<Vec<Vec<u32>>> {
    let bits = |at: usize| match rows.storage() {
        HostSlice::F32(s) => s[at].to_bits(),
        HostSlice::F16(s) => u32::from(s[at].to_bits()),
        HostSlice::BF16(s) => u32::from(s[at].to_bits()),
    };
    let row = |h, s| (0..rows.dim()).map(|j| bits(rows.start(h, s) + j)).collect();
    (0..rows.heads()).map(|h| (0..rows.len(h)).map(|s| row(h, s)).collect()).collect()
}

/// Everything a caller can see of a cache.
pub type Seen = (Model, Vec<u32>, Vec<u32>, Vec<u64>, Vec<Vec<u32>>, [u64; 2]);

pub fn see_flat(shape: Shape, c: &FlatCache) -> Seen {
    let model = Model::read(&c.view(shape.layer()).unwrap());
    let bytes = [c.bytes_used(), c.bytes_reserved()];
    (model, c.lens().to_vec(), c.capacity().to_vec(), c.starts().to_vec(), vec![], bytes)
}

pub fn see_paged(shape: Shape, c: &PagedCache, pool: &PagePool) -> Seen {
    let model = Model::read(&c.view(pool, shape.layer()).unwrap());
    let bytes = [c.bytes_used(), c.bytes_reserved()];
    (model, c.lens().to_vec(), c.capacity().to_vec(), vec![], c.tables().to_vec(), bytes)
}

pub fn free_list(pool: &PagePool) -> Vec<u32> {
    (0..pool.pages()).filter(|&p| pool.is_free(p)).collect()
}
