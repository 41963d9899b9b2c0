//! Test tensors that own their memory, and how a device lends them.
//!
//! Values are rounded to their dtype when a tensor is made, so that the oracle sees what the backend sees.
//! Memory that no row covers (gaps, slack, unused pages) holds NaN: who reads past a row turns red.

use half::{bf16, f16};
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::{Dtype, ExpectedQueries, LayerShape, LayerView, Position, Rows, Storage};

use crate::naive::{Float, Matrix, num};

/// A tensor's memory, in its dtype.
#[derive(Debug, Clone)]
pub enum Elements {
    /// f32 elements.
    F32(Vec<f32>),
    /// f16 elements.
    F16(Vec<f16>),
    /// bf16 elements.
    BF16(Vec<bf16>),
}

/// A device under test: where test tensors go, and what they look like there.
pub trait TestDevice: Sync {
    /// The backend.
    type Backend: Backend;
    /// Device memory that the test owns.
    type Memory;
    /// The backend.
    fn backend(&self) -> &Self::Backend;
    /// Copies a tensor to the device.
    fn upload(&self, elements: &Elements) -> Self::Memory;
    /// Borrows it as the engine would.
    fn lend<'a>(&self, memory: &'a Self::Memory) -> Lent<'a, Self>;
}

/// What a device's backend borrows.
pub type Lent<'a, D> = <<D as TestDevice>::Backend as Backend>::Storage<'a>;
/// What a device's backend fills.
pub type Floats<D> = <<D as TestDevice>::Backend as Backend>::Floats;

impl TestDevice for Cpu {
    type Backend = Cpu;
    type Memory = Elements;
    fn backend(&self) -> &Cpu {
        self
    }
    fn upload(&self, elements: &Elements) -> Elements {
        elements.clone()
    }
    fn lend<'a>(&self, memory: &'a Elements) -> HostSlice<'a> {
        match memory {
            Elements::F32(e) => HostSlice::F32(e),
            Elements::F16(e) => HostSlice::F16(e),
            Elements::BF16(e) => HostSlice::BF16(e),
        }
    }
}

/// Where the rows of a tensor lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Contiguous `[heads, len, dim]`; heads of equal length.
    HeadsFirst,
    /// Contiguous `[len, heads, dim]`; heads of equal length.
    TokensFirst,
    /// `[heads, len, dim]` with gaps after each row and head; heads of equal length.
    Gapped,
    /// Heads back to back with this many unused rows before each.
    Ragged {
        /// Unused rows.
        slack: u32,
    },
    /// Pages of this many rows, in descending order and shared out in turn, so that no head is contiguous.
    Paged {
        /// Rows per page.
        page: u32,
    },
}

/// Rows grouped by head, with the memory that holds them.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// `[head][row][dim]`, exactly as stored.
    pub heads: Vec<Matrix<f64>>,
    dim: u32,
    dtype: Dtype,
    place: Place,
    elements: Elements,
    arrangement: Arrangement,
}

#[derive(Debug, Clone)]
enum Arrangement {
    Strided { len: u32, head_stride: usize, row_stride: usize },
    Ragged { starts: Vec<u64>, lens: Vec<u32> },
    Paged { page: u32, tables: Vec<Vec<u32>>, lens: Vec<u32> },
}

impl Arrangement {
    fn new(place: Place, lens: Vec<u32>, dim: usize) -> Self {
        let heads = lens.len();
        let strided = |head_stride, row_stride| {
            assert!(lens.iter().all(|&n| n == lens[0]), "strides need heads of equal length");
            Self::Strided { len: lens[0], head_stride, row_stride }
        };
        match place {
            Place::HeadsFirst => strided(lens[0] as usize * dim, dim),
            Place::TokensFirst => strided(dim, heads * dim),
            // Sixteen bytes of every dtype: what vector loads ask for.
            Place::Gapped => strided((lens[0] as usize + 2) * (dim + 8), dim + 8),
            Place::Ragged { slack } => {
                let mut end = 0;
                let mut starts = Vec::new();
                for &len in &lens {
                    starts.push(end + u64::from(slack));
                    end += u64::from(slack + len);
                }
                Self::Ragged { starts, lens }
            }
            Place::Paged { page } => {
                let mut free: u32 = lens.iter().map(|n| n.div_ceil(page)).sum();
                let mut tables = vec![Vec::new(); heads];
                while free > 0 {
                    for (table, len) in tables.iter_mut().zip(&lens) {
                        if table.len() < len.div_ceil(page) as usize {
                            // Page 0 stays unused: a table that is ignored does not look right by luck.
                            table.push(free);
                            free -= 1;
                        }
                    }
                }
                Self::Paged { page, tables, lens }
            }
        }
    }

    /// Elements that a view of this arrangement may reach, pages whole.
    fn size(&self, dim: usize) -> usize {
        match self {
            Self::Strided { .. } => 0,
            Self::Ragged { starts, lens } => {
                let ends = starts.iter().zip(lens).map(|(&s, &n)| s as usize + n as usize);
                ends.max().unwrap_or(0) * dim
            }
            Self::Paged { page, tables, .. } => {
                let pages = tables.iter().flatten().max().unwrap_or(&0) + 1;
                (pages * page) as usize * dim
            }
        }
    }

    fn element(&self, head: usize, row: usize, dim: usize) -> usize {
        match self {
            Self::Strided { head_stride, row_stride, .. } => head * head_stride + row * row_stride,
            Self::Ragged { starts, .. } => (starts[head] as usize + row) * dim,
            Self::Paged { page, tables, .. } => {
                let page = *page as usize;
                (tables[head][row / page] as usize * page + row % page) * dim
            }
        }
    }
}

impl Tensor {
    /// Rounds `heads` to `dtype` and lays them out.
    pub fn new(mut heads: Vec<Matrix<f64>>, dim: u32, dtype: Dtype, place: Place) -> Self {
        let lens = heads.iter().map(|rows| rows.len() as u32).collect();
        let d = dim as usize;
        let arrangement = Arrangement::new(place, lens, d);
        let mut flat = vec![f32::NAN; arrangement.size(d)];
        for (h, rows) in heads.iter_mut().enumerate() {
            for (t, row) in rows.iter_mut().enumerate() {
                row.iter_mut().for_each(|x| *x = rounded(*x, dtype));
                let at = arrangement.element(h, t, d);
                flat.resize(flat.len().max(at + d), f32::NAN);
                let narrow: Vec<f32> = row.iter().map(|&x| x as f32).collect();
                flat[at..at + d].copy_from_slice(&narrow);
            }
        }
        let elements = match dtype {
            Dtype::F32 => Elements::F32(flat),
            Dtype::F16 => Elements::F16(flat.into_iter().map(f16::from_f32).collect()),
            Dtype::BF16 => Elements::BF16(flat.into_iter().map(bf16::from_f32).collect()),
        };
        Self { heads, dim, dtype, place, elements, arrangement }
    }

    /// The same tensor with one row of one head multiplied by `factor`, elementwise from the row's start.
    pub fn with_row_scaled(&self, head: usize, row: usize, factors: &[f64]) -> Self {
        let mut heads = self.heads.clone();
        heads[head][row].iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
        Self::new(heads, self.dim, self.dtype, self.place)
    }

    /// The values of one head as `F`.
    pub fn head<F: Float>(&self, head: usize) -> Matrix<F> {
        self.heads[head].iter().map(|row| row.iter().map(|&x| num(x)).collect()).collect()
    }

    /// Rows of each head.
    pub fn lens(&self) -> Vec<u32> {
        self.heads.iter().map(|rows| rows.len() as u32).collect()
    }

    /// The tensor as a view of `storage`, which holds its elements.
    fn rows<'a, S: Storage>(&'a self, storage: S) -> Rows<'a, S> {
        let heads = self.heads.len() as u32;
        match &self.arrangement {
            &Arrangement::Strided { len, head_stride, row_stride } => {
                Rows::strided(storage, heads, len, self.dim, head_stride, row_stride)
            }
            Arrangement::Ragged { starts, lens } => Rows::ragged(storage, self.dim, starts, lens),
            Arrangement::Paged { page, tables, lens } => {
                Rows::paged(storage, self.dim, *page, tables, lens)
            }
        }
        .expect("a test tensor fits its own memory")
    }
}

fn rounded(x: f64, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(x as f32),
        Dtype::F16 => f64::from(f16::from_f32(x as f32)),
        Dtype::BF16 => f64::from(bf16::from_f32(x as f32)),
    }
}

/// Lends tensors for the length of a call.
pub fn with_rows<D: TestDevice, R>(
    device: &D,
    tensors: &[&Tensor],
    f: impl FnOnce(&[Rows<'_, Lent<'_, D>>]) -> R,
) -> R {
    let memory: Vec<_> = tensors.iter().map(|t| device.upload(&t.elements)).collect();
    let rows: Vec<_> = tensors.iter().zip(&memory).map(|(t, m)| t.rows(device.lend(m))).collect();
    f(&rows)
}

/// One layer of one sequence.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Heads and head dim.
    pub shape: LayerShape,
    /// Tokens seen.
    pub tokens: u32,
    /// Keys `[H, len, D]`.
    pub k: Tensor,
    /// Values `[H, len, D]`.
    pub v: Tensor,
    /// Queries `[Hq, W, D]`.
    pub q: Option<Tensor>,
    /// Probe queries `[Hq, M, D]`.
    pub probe: Option<Tensor>,
    /// Output projection `[1, hidden, Hq·D]`.
    pub o_proj: Option<Tensor>,
    /// Log-sum-exp `[Hq, W, 1]`.
    pub lse: Option<Tensor>,
    /// Norms of hidden rows `[1, tokens, 1]`.
    pub hidden_norms: Option<Tensor>,
    /// Mean and covariance of the queries to come.
    pub expected: Option<ExpectedQueries>,
    /// Positions of a compressed cache.
    pub positions: Option<Vec<Vec<Position>>>,
}

impl Layer {
    /// Position of every slot of every head.
    pub fn slot_positions(&self) -> Vec<Vec<u32>> {
        match &self.positions {
            Some(rows) => rows.iter().map(|row| row.iter().map(|p| p.0).collect()).collect(),
            None => self.k.lens().iter().map(|&len| (0..len).collect()).collect(),
        }
    }

    /// The query heads that share KV head `h`.
    pub fn group(&self, h: usize) -> std::ops::Range<usize> {
        h * self.shape.group()..(h + 1) * self.shape.group()
    }
}

/// Lengths of the segments of all layers.
pub fn segment_lens(layers: &[Layer]) -> Vec<u32> {
    layers.iter().flat_map(|layer| layer.k.lens()).collect()
}

/// Lends whole layers for the length of a call.
pub fn with_layers<D: TestDevice, R>(
    device: &D,
    layers: &[Layer],
    f: impl FnOnce(&[LayerView<'_, Lent<'_, D>>]) -> R,
) -> R {
    let optional = |layer: &Layer| {
        [&layer.q, &layer.probe, &layer.o_proj, &layer.lse, &layer.hidden_norms]
            .map(|t| t.as_ref().map(|t| device.upload(&t.elements)))
    };
    let memory: Vec<_> = layers
        .iter()
        .map(|l| (device.upload(&l.k.elements), device.upload(&l.v.elements), optional(l)))
        .collect();
    let views: Vec<_> = layers
        .iter()
        .zip(&memory)
        .map(|(layer, (k, v, [q, probe, o_proj, lse, norms]))| {
            let (k, v) = (layer.k.rows(device.lend(k)), layer.v.rows(device.lend(v)));
            let mut view = LayerView::new(layer.shape, layer.tokens, k, v)?;
            if let (Some(tensor), Some(memory)) = (&layer.q, q) {
                view = view.with_queries(tensor.rows(device.lend(memory)))?;
            }
            if let (Some(tensor), Some(memory)) = (&layer.probe, probe) {
                view = view.with_probe(tensor.rows(device.lend(memory)))?;
            }
            if let (Some(tensor), Some(memory)) = (&layer.o_proj, o_proj) {
                view = view.with_output_projection(tensor.rows(device.lend(memory)))?;
            }
            if let (Some(tensor), Some(memory)) = (&layer.lse, lse) {
                view = view.with_lse(tensor.rows(device.lend(memory)))?;
            }
            if let (Some(tensor), Some(memory)) = (&layer.hidden_norms, norms) {
                view = view.with_hidden_norms(tensor.rows(device.lend(memory)))?;
            }
            if let Some(expected) = &layer.expected {
                view = view.with_expected(expected)?;
            }
            match &layer.positions {
                Some(positions) => view.with_positions(positions),
                None => Ok(view),
            }
        })
        .collect::<kvbudget::Result<_>>()
        .expect("a test layer is consistent");
    f(&views)
}
