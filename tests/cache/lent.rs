//! A model's rows as an engine would lend them, in every layout that a view can have.

use half::{bf16, f16};
use kvbudget::backend::cpu::{HostLayer, HostSlice};
use kvbudget::{Dtype, LayerView, Position, Rows};

use super::model::{Model, Shape};

/// How an engine may hold a layer.
#[derive(Debug, Clone, Copy)]
pub enum Borrow {
    HeadsFirst,
    TokensFirst,
    /// Elements between rows, rows between heads.
    Gaps {
        row: usize,
        head: usize,
    },
    /// Rows between heads.
    Ragged {
        slack: u64,
    },
    Paged {
        page: u32,
    },
}

enum Typed {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Typed {
    fn new(dtype: Dtype, bits: &[u32]) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(bits.iter().map(|&b| f32::from_bits(b)).collect()),
            Dtype::F16 => Self::F16(bits.iter().map(|&b| f16::from_bits(b as u16)).collect()),
            Dtype::BF16 => Self::BF16(bits.iter().map(|&b| bf16::from_bits(b as u16)).collect()),
        }
    }

    fn slice(&self) -> HostSlice<'_> {
        match self {
            Self::F32(s) => HostSlice::F32(s),
            Self::F16(s) => HostSlice::F16(s),
            Self::BF16(s) => HostSlice::BF16(s),
        }
    }
}

/// A model's rows in one of the layouts. Strided layouts have no ragged form: with heads of unequal
/// lengths they become [`Borrow::Ragged`].
pub struct Lent {
    borrow: Borrow,
    data: [Typed; 2],
    starts: Vec<u64>,
    tables: Vec<Vec<u32>>,
    lens: Vec<u32>,
    positions: Vec<Vec<Position>>,
    tokens: u32,
}

impl Lent {
    pub fn new(shape: Shape, model: &Model, borrow: Borrow) -> Self {
        let lens = model.lens();
        let even = lens.iter().all(|&n| n == lens[0]);
        let borrow = match borrow {
            Borrow::Ragged { .. } | Borrow::Paged { .. } => borrow,
            _ if even => borrow,
            _ => Borrow::Ragged { slack: 1 },
        };
        let positions = model.positions().iter().map(<[_]>::to_vec).collect();
        let mut lent = Self {
            borrow,
            data: [Typed::F32(vec![]), Typed::F32(vec![])],
            starts: vec![],
            tables: vec![vec![]; lens.len()],
            lens: lens.clone(),
            positions,
            tokens: model.tokens,
        };
        // Page tables go backwards through the pool, so that no two pages are neighbours in order.
        let page = if let Borrow::Paged { page } = borrow { page } else { 1 };
        let mut free: u32 = lens.iter().map(|n| n.div_ceil(page)).sum();
        let slack = if let Borrow::Ragged { slack } = borrow { slack } else { 0 };
        let mut end = slack;
        for (h, &len) in lens.iter().enumerate() {
            lent.starts.push(end);
            end += u64::from(len) + slack;
            for _ in 0..len.div_ceil(page) {
                free -= 1;
                lent.tables[h].push(free);
            }
        }
        let dim = shape.dim as usize;
        let (heads, longest) = (lens.len(), lens.iter().max().map_or(0, |&n| n as usize));
        let gaps = if let Borrow::Gaps { row, head } = borrow { row.max(head) } else { 0 };
        // Ample: rows, gaps after each row and head, slack, padded pages.
        let room = (heads + 1) * (longest + gaps + slack as usize + page as usize) * (dim + gaps);
        for (t, data) in [0, 1].into_iter().enumerate() {
            let mut bits = vec![0xdead_u32; room + dim];
            for (h, head) in model.heads.iter().enumerate() {
                for (s, (_, rows)) in head.iter().enumerate() {
                    let at = lent.element(shape, h, s);
                    bits[at..at + dim].copy_from_slice(&rows[t]);
                }
            }
            lent.data[data] = Typed::new(shape.dtype, &bits);
        }
        lent
    }

    fn strides(&self, shape: Shape) -> (usize, usize) {
        let (dim, len) = (shape.dim as usize, self.lens[0] as usize);
        match self.borrow {
            Borrow::TokensFirst => (dim, dim * self.lens.len()),
            Borrow::Gaps { row, head } => ((dim + row) * (len + head), dim + row),
            _ => (dim * len, dim),
        }
    }

    fn element(&self, shape: Shape, h: usize, s: usize) -> usize {
        let dim = shape.dim as usize;
        match self.borrow {
            Borrow::Ragged { .. } => (self.starts[h] as usize + s) * dim,
            Borrow::Paged { page } => {
                let page = page as usize;
                (self.tables[h][s / page] as usize * page + s % page) * dim
            }
            _ => {
                let (head, row) = self.strides(shape);
                h * head + s * row
            }
        }
    }

    fn rows(&self, shape: Shape, tensor: usize) -> Rows<'_, HostSlice<'_>> {
        let (data, dim, heads) = (self.data[tensor].slice(), shape.dim, shape.heads);
        let len = self.lens[0];
        match self.borrow {
            Borrow::HeadsFirst => Rows::heads_first(data, heads, len, dim),
            Borrow::TokensFirst => Rows::tokens_first(data, heads, len, dim),
            Borrow::Gaps { .. } => {
                let (head, row) = self.strides(shape);
                Rows::strided(data, heads, len, dim, head, row)
            }
            Borrow::Ragged { .. } => Rows::ragged(data, dim, &self.starts, &self.lens),
            Borrow::Paged { page } => Rows::paged(data, dim, page, &self.tables, &self.lens),
        }
        .unwrap()
    }

    /// The layer; with positions unless slot and position are the same everywhere.
    pub fn view(&self, shape: Shape) -> HostLayer<'_> {
        let slots = |p: &Vec<Position>| p.iter().map(|p| p.0).eq(0..p.len() as u32);
        let view = self.dense_view(shape);
        if self.positions.iter().all(slots) {
            return view;
        }
        view.with_positions(&self.positions).unwrap()
    }

    /// The layer without positions.
    pub fn dense_view(&self, shape: Shape) -> HostLayer<'_> {
        let (k, v) = (self.rows(shape, 0), self.rows(shape, 1));
        LayerView::new(shape.layer(), self.tokens, k, v).unwrap()
    }
}
