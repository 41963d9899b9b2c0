//! Borrowed tensors: what an engine lends for the length of a call, on any device.
//!
//! `D` is contiguous, token and head strides are free: `[H, T, D]` and `[T, H, D]` both work without a
//! copy, and so do flattened ragged rows and per-head pages. A view is checked against its storage
//! when it is made; later code does not check again.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::{LayerShape, MAX_LEN};
use crate::ids::{KvHead, LayerId, Position};
use crate::moments::ExpectedQueries;
use crate::spans::Spans;

/// Elements of one allocation: a slice on the CPU, a device pointer on CUDA.
pub trait Storage: Copy {
    /// Type of the elements.
    fn dtype(&self) -> Dtype;
    /// Their number.
    fn elements(&self) -> usize;
}

/// Where the rows of each head lie. Row numbers count rows of `dim` elements unless strides are given.
#[derive(Debug, Clone, Copy)]
pub enum Layout<'a> {
    /// Every head has `len` rows, at fixed element strides.
    Strided {
        /// Rows per head.
        len: u32,
        /// Elements from a head to the next.
        head_stride: usize,
        /// Elements from a row to the next of the same head.
        row_stride: usize,
    },
    /// Head `h` has rows `starts[h] .. starts[h] + lens[h]` of a flattened buffer.
    Ragged {
        /// First row of each head.
        starts: &'a [u64],
        /// Rows of each head.
        lens: &'a [u32],
    },
    /// Slot `s` of head `h` is row `tables[h][s / page] * page + s % page`.
    Paged {
        /// Rows per page.
        page: u32,
        /// Pages of each head, in slot order.
        tables: &'a [Vec<u32>],
        /// Rows of each head.
        lens: &'a [u32],
    },
}

/// Rows of `dim` elements, grouped by head: `[heads, len(head), dim]`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, S> {
    storage: S,
    heads: u32,
    dim: u32,
    layout: Layout<'a>,
}

/// Rows of one head that lie at a constant stride.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Element at which the first row starts.
    pub start: usize,
    /// Number of rows.
    pub rows: usize,
    /// Elements from a row to the next.
    pub stride: usize,
}

impl<'a, S: Storage> Rows<'a, S> {
    /// Contiguous `[heads, len, dim]`.
    pub fn heads_first(storage: S, heads: u32, len: u32, dim: u32) -> Result<Self> {
        let row_stride = dim as usize;
        let head_stride = (len as usize).saturating_mul(row_stride);
        Self::strided(storage, heads, len, dim, head_stride, row_stride)
    }

    /// Contiguous `[len, heads, dim]`.
    pub fn tokens_first(storage: S, heads: u32, len: u32, dim: u32) -> Result<Self> {
        let row_stride = (heads as usize).saturating_mul(dim as usize);
        Self::strided(storage, heads, len, dim, dim as usize, row_stride)
    }

    /// Element strides of the caller's choice; `dim` is contiguous.
    pub fn strided(
        storage: S,
        heads: u32,
        len: u32,
        dim: u32,
        head_stride: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let layout = Layout::Strided { len, head_stride, row_stride };
        let last = |n: u32, stride: usize| u128::from(n.saturating_sub(1)) * stride as u128;
        let needed = if heads == 0 || len == 0 {
            0
        } else {
            last(heads, head_stride) + last(len, row_stride) + u128::from(dim)
        };
        Self::checked(storage, heads, dim, layout, u64::from(len), needed)
    }

    /// Rows of all heads back to back (or with slack between heads): see [`Layout::Ragged`].
    pub fn ragged(storage: S, dim: u32, starts: &'a [u64], lens: &'a [u32]) -> Result<Self> {
        expect("ragged starts", lens.len(), starts.len())?;
        let longest = lens.iter().copied().max().unwrap_or(0);
        let rows = starts.iter().zip(lens).map(|(&s, &n)| u128::from(s) + u128::from(n));
        let needed = rows.max().unwrap_or(0) * u128::from(dim);
        let layout = Layout::Ragged { starts, lens };
        Self::checked(storage, lens.len() as u32, dim, layout, u64::from(longest), needed)
    }

    /// Pages of `page` rows in a pool, listed per head: see [`Layout::Paged`].
    pub fn paged(
        storage: S,
        dim: u32,
        page: u32,
        tables: &'a [Vec<u32>],
        lens: &'a [u32],
    ) -> Result<Self> {
        if page == 0 {
            return Err(Error::Zero { what: "page size" });
        }
        expect("page tables", lens.len(), tables.len())?;
        let mut rows = 0u128;
        for (table, &len) in tables.iter().zip(lens) {
            let pages = len.div_ceil(page) as usize;
            if table.len() < pages {
                return Err(Error::Shape {
                    what: "pages of a head",
                    expected: pages as u64,
                    got: table.len() as u64,
                });
            }
            let top = table[..pages].iter().map(|&p| (u128::from(p) + 1) * u128::from(page));
            rows = rows.max(top.max().unwrap_or(0));
        }
        let longest = lens.iter().copied().max().unwrap_or(0);
        let layout = Layout::Paged { page, tables, lens };
        let needed = rows * u128::from(dim);
        Self::checked(storage, lens.len() as u32, dim, layout, u64::from(longest), needed)
    }

    fn checked(
        storage: S,
        heads: u32,
        dim: u32,
        layout: Layout<'a>,
        longest: u64,
        needed: u128,
    ) -> Result<Self> {
        if dim == 0 {
            return Err(Error::Zero { what: "row dimension" });
        }
        if longest > MAX_LEN {
            return Err(Error::TooLarge { what: "rows of a head", got: longest, limit: MAX_LEN });
        }
        if needed > storage.elements() as u128 {
            return Err(Error::OutOfStorage {
                what: "tensor view",
                needed: u64::try_from(needed).unwrap_or(u64::MAX),
                available: storage.elements() as u64,
            });
        }
        Ok(Self { storage, heads, dim, layout })
    }

    /// The borrowed elements.
    pub fn storage(&self) -> S {
        self.storage
    }
    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.storage.dtype()
    }
    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads as usize
    }
    /// Elements per row.
    pub fn dim(&self) -> usize {
        self.dim as usize
    }
    /// Where the rows lie.
    pub fn layout(&self) -> Layout<'a> {
        self.layout
    }

    /// Rows of a head.
    pub fn len(&self, head: usize) -> usize {
        match self.layout {
            Layout::Strided { len, .. } => len as usize,
            Layout::Ragged { lens, .. } | Layout::Paged { lens, .. } => lens[head] as usize,
        }
    }

    /// Rows of all heads.
    pub fn total(&self) -> usize {
        (0..self.heads()).map(|h| self.len(h)).sum()
    }

    /// Element at which row `row` of `head` starts.
    #[inline]
    pub fn start(&self, head: usize, row: usize) -> usize {
        match self.layout {
            Layout::Strided { head_stride, row_stride, .. } => {
                head * head_stride + row * row_stride
            }
            Layout::Ragged { starts, .. } => (starts[head] as usize + row) * self.dim(),
            Layout::Paged { page, tables, .. } => {
                let page = page as usize;
                (tables[head][row / page] as usize * page + row % page) * self.dim()
            }
        }
    }

    /// The rows `from..to` of a head as runs of constant stride: one run, or one per page.
    pub fn runs(&self, head: usize, from: usize, to: usize) -> impl Iterator<Item = Run> + '_ {
        let stride = match self.layout {
            Layout::Strided { row_stride, .. } => row_stride,
            Layout::Ragged { .. } | Layout::Paged { .. } => self.dim(),
        };
        let mut at = from;
        std::iter::from_fn(move || {
            if at >= to {
                return None;
            }
            let end = match self.layout {
                Layout::Paged { page, .. } => to.min((at / page as usize + 1) * page as usize),
                _ => to,
            };
            let run = Run { start: self.start(head, at), rows: end - at, stride };
            at = end;
            Some(run)
        })
    }
}

/// What one layer of one sequence lends for scoring: its cache and, where the method asks, queries,
/// the output projection, the prefill's log-sum-exp, the norms of hidden rows, what queries are to be expected, the positions of
/// an already compressed cache, and what its stretches are.
#[derive(Debug, Clone, Copy)]
pub struct LayerView<'a, S> {
    shape: LayerShape,
    tokens: u32,
    k: Rows<'a, S>,
    v: Rows<'a, S>,
    q: Option<Rows<'a, S>>,
    probe: Option<Rows<'a, S>>,
    o_proj: Option<Rows<'a, S>>,
    lse: Option<Rows<'a, S>>,
    hidden_norms: Option<Rows<'a, S>>,
    expected: Option<&'a ExpectedQueries>,
    positions: Option<&'a [Vec<Position>]>,
    spans: Option<&'a Spans>,
}

impl<'a, S: Storage> LayerView<'a, S> {
    /// Keys and values `[H, len, D]` of a sequence that has seen `tokens` tokens.
    pub fn new(shape: LayerShape, tokens: u32, k: Rows<'a, S>, v: Rows<'a, S>) -> Result<Self> {
        for rows in [&k, &v] {
            expect("kv heads of a layer", shape.kv_heads(), rows.heads())?;
            expect("head dim of keys and values", shape.head_dim(), rows.dim())?;
        }
        if k.dtype() != v.dtype() {
            return Err(Error::Dtype { what: "values", expected: k.dtype(), got: v.dtype() });
        }
        for h in 0..shape.kv_heads() {
            expect("value rows of a head", k.len(h), v.len(h))?;
            if k.len(h) > tokens as usize {
                return Err(Error::TooLarge {
                    what: "slots of a head",
                    got: k.len(h) as u64,
                    limit: u64::from(tokens),
                });
            }
        }
        let (q, probe, o_proj, lse, hidden_norms) = (None, None, None, None, None);
        let (expected, positions, spans) = (None, None, None);
        Ok(Self {
            shape,
            tokens,
            k,
            v,
            q,
            probe,
            o_proj,
            lse,
            hidden_norms,
            expected,
            positions,
            spans,
        })
    }

    /// Queries `[Hq, W, D]` of the last `W` tokens, after RoPE.
    pub fn with_queries(mut self, q: Rows<'a, S>) -> Result<Self> {
        expect("query heads", self.shape.query_heads(), q.heads())?;
        expect("head dim of queries", self.shape.head_dim(), q.dim())?;
        if q.heads() > 0 && q.len(0) > self.tokens as usize {
            return Err(Error::TooLarge {
                what: "window of queries",
                got: q.len(0) as u64,
                limit: u64::from(self.tokens),
            });
        }
        self.q = Some(q);
        Ok(self)
    }

    /// Queries `[Hq, M, D]`, after RoPE, of tokens that probe the cache: run over it and rolled back, or masks of a diffusion
    /// model. Each may look at all slots; their own keys are not among them, or are as those of any other token.
    pub fn with_probe(mut self, probe: Rows<'a, S>) -> Result<Self> {
        expect("probe query heads", self.shape.query_heads(), probe.heads())?;
        expect("head dim of probe queries", self.shape.head_dim(), probe.dim())?;
        for h in 1..probe.heads() {
            expect("probe queries of a head", probe.len(0), probe.len(h))?;
        }
        if probe.heads() > 0 && probe.len(0) == 0 {
            return Err(Error::Zero { what: "probe queries" });
        }
        self.probe = Some(probe);
        Ok(self)
    }

    /// The attention's output projection `[hidden, Hq·D]`, as one head of `hidden` rows.
    pub fn with_output_projection(mut self, o_proj: Rows<'a, S>) -> Result<Self> {
        expect("heads of the output projection", 1, o_proj.heads())?;
        let columns = self.shape.query_heads() * self.shape.head_dim();
        expect("columns of the output projection", columns, o_proj.dim())?;
        self.o_proj = Some(o_proj);
        Ok(self)
    }

    /// Natural log of the softmax denominators of the query rows, `[Hq, W, 1]` in f32: spares a pass over K.
    pub fn with_lse(mut self, lse: Rows<'a, S>) -> Result<Self> {
        let window = self.q.as_ref().map_or(0, |q| q.len(0));
        expect("heads of the log-sum-exp", self.shape.query_heads(), lse.heads())?;
        expect("rows of the log-sum-exp", window, lse.len(0))?;
        expect("columns of the log-sum-exp", 1, lse.dim())?;
        if lse.dtype() != Dtype::F32 {
            return Err(Error::Dtype {
                what: "log-sum-exp",
                expected: Dtype::F32,
                got: lse.dtype(),
            });
        }
        self.lse = Some(lse);
        Ok(self)
    }

    /// L2 norms of the rows that enter the layer's attention, one per token of the sequence, `[1, tokens, 1]` in f32.
    /// Of the residual stream, or behind the norm before attention: the method says which it means.
    pub fn with_hidden_norms(mut self, norms: Rows<'a, S>) -> Result<Self> {
        expect("heads of the hidden norms", 1, norms.heads())?;
        expect("hidden norms", self.tokens as usize, norms.len(0))?;
        expect("columns of the hidden norms", 1, norms.dim())?;
        if norms.dtype() != Dtype::F32 {
            let (expected, got) = (Dtype::F32, norms.dtype());
            return Err(Error::Dtype { what: "hidden norms", expected, got });
        }
        self.hidden_norms = Some(norms);
        Ok(self)
    }

    /// Mean and covariance of the queries to come.
    pub fn with_expected(mut self, expected: &'a ExpectedQueries) -> Result<Self> {
        let shape = expected.shape();
        expect(
            "query heads of the expected queries",
            self.shape.query_heads(),
            shape.query_heads(),
        )?;
        expect("head dim of the expected queries", self.shape.head_dim(), shape.head_dim())?;
        self.expected = Some(expected);
        Ok(self)
    }

    /// What stretches of the sequence are. A planner adds those of its [`Sequence`](crate::Sequence).
    pub fn with_spans(mut self, spans: &'a Spans) -> Result<Self> {
        if spans.end() > self.tokens {
            return Err(Error::TooLarge {
                what: "end of a span",
                got: spans.end().into(),
                limit: self.tokens.into(),
            });
        }
        self.spans = Some(spans);
        Ok(self)
    }

    /// Logical positions of the slots of each head, strictly ascending; without them slot = position.
    pub fn with_positions(mut self, positions: &'a [Vec<Position>]) -> Result<Self> {
        expect("heads of the positions", self.shape.kv_heads(), positions.len())?;
        for (h, row) in positions.iter().enumerate() {
            expect("positions of a head", self.k.len(h), row.len())?;
            let bad = |i: usize| row[i].0 >= self.tokens || (i > 0 && row[i] <= row[i - 1]);
            if let Some(index) = (0..row.len()).find(|&i| bad(i)) {
                return Err(Error::Positions {
                    layer: LayerId(0),
                    head: KvHead(h as u32),
                    index,
                    got: u64::from(row[index].0),
                    tokens: u64::from(self.tokens),
                });
            }
        }
        self.positions = Some(positions);
        Ok(self)
    }

    /// Heads and head dim.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }
    /// Tokens the sequence has seen: the position of the next one.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }
    /// Keys `[H, len, D]`.
    pub fn k(&self) -> &Rows<'a, S> {
        &self.k
    }
    /// Values `[H, len, D]`.
    pub fn v(&self) -> &Rows<'a, S> {
        &self.v
    }
    /// Queries `[Hq, W, D]`, or the error that names the method in need.
    pub fn q(&self, method: &'static str) -> Result<&Rows<'a, S>> {
        self.q.as_ref().ok_or(Error::Missing { method, what: "queries (q)" })
    }
    /// Probe queries `[Hq, M, D]`, or the error that names the method in need.
    pub fn probe(&self, method: &'static str) -> Result<&Rows<'a, S>> {
        self.probe.as_ref().ok_or(Error::Missing { method, what: "probe queries (q_probe)" })
    }
    /// Output projection `[1, hidden, Hq·D]`, or the error that names the method in need.
    pub fn o_proj(&self, method: &'static str) -> Result<&Rows<'a, S>> {
        self.o_proj
            .as_ref()
            .ok_or(Error::Missing { method, what: "the output projection (o_proj)" })
    }
    /// Log-sum-exp of the query rows, if lent.
    pub fn lse(&self) -> Option<&Rows<'a, S>> {
        self.lse.as_ref()
    }
    /// Norms of hidden rows `[1, tokens, 1]`, or the error that names the method in need.
    pub fn hidden_norms(&self, method: &'static str) -> Result<&Rows<'a, S>> {
        self.hidden_norms
            .as_ref()
            .ok_or(Error::Missing { method, what: "norms of hidden rows (hidden_norms)" })
    }
    /// Mean and covariance of the queries to come, or the error that names the method in need.
    pub fn expected(&self, method: &'static str) -> Result<&'a ExpectedQueries> {
        let what = "expected queries (expected_mean, expected_covariance)";
        self.expected.ok_or(Error::Missing { method, what })
    }
    /// What stretches of the sequence are, or the error that names the method in need.
    pub fn spans(&self, method: &'static str) -> Result<&'a Spans> {
        self.spans.ok_or(Error::Missing { method, what: "spans of the sequence (spans)" })
    }
    /// Positions of a compressed cache, if it is one.
    pub fn positions(&self) -> Option<&'a [Vec<Position>]> {
        self.positions
    }

    /// Slots of a head whose position is below `position`: the first slots, since positions ascend.
    pub fn slots_before(&self, head: usize, position: u32) -> usize {
        match self.positions {
            Some(p) => p[head].partition_point(|p| p.0 < position),
            None => self.k.len(head).min(position as usize),
        }
    }
}

pub(crate) fn expect(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected as u64, got: got as u64 })
}
