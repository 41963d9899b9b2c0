//! Compression of a cache again while it is decoded from: scores, selection and compaction on one stream, launches only.
//!
//! Everything is said in slots, since positions are the device's: the first `sinks` and the last `recent` slots of each
//! head are protected. They are the tokens that one means as long as every compression before protected them as well,
//! which also makes the last `window` slots those of the queries.

use bytemuck::Zeroable;

use super::super::append::lend;
use super::super::driver::{Memory, Ptr};
use super::super::floats::{Sent, Slot, Table};
use super::super::gather::{Held, Kept};
use super::super::selection::{self, Problem, Smoothing, Span};
use super::super::views::HeadRows;
use super::super::window_attention::{self, Head, Operands, Plan, Query, Segment};
use super::super::{Cuda, DeviceLayer, DeviceSlice, Floats, Selection, check, pool, top_k};
use super::attend::queries;
use super::slots::Slots;
use super::thin::Order;
use crate::backend::ops::{Contest, Pool, Pooling, WindowAttention};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use crate::view::Rows;

const METHOD: &str = "recompression";

/// How a cache is thinned at decode time: SnapKV's scores, with a budget per head or, as AdaKV has it, per layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recompress {
    /// Scores from the last `window` queries. No `gap`.
    pub score: WindowAttention,
    /// Smoothing of the scores over neighbouring slots, with an odd kernel.
    pub pool: Option<(Pooling, u32)>,
    /// Slots that all heads keep together.
    pub budget: Share,
    /// Slots that each head keeps at least, whatever the scores.
    pub floor: u32,
    /// First slots of each head that are kept.
    pub sinks: u32,
    /// Last slots of each head that are kept: at least the window.
    pub recent: u32,
}

/// Who competes for slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Every head keeps so many.
    PerHead(u32),
    /// The heads of the layer share so many.
    PerLayer(u64),
}

/// Tables and memory of a [`Recompress`] for caches of the same bounds: made once, used at every step and for every layer
/// that has such a cache, one after the other on one stream.
pub struct Recompression {
    cuda: Cuda,
    of: (Dtype, u32),
    bounds: Vec<u32>,
    query_heads: usize,
    window: u32,
    plan: Plan,
    pool: Option<(Pooling, u32)>,
    shape: selection::Shape,
    sent: Sent,
    segments: Slot<Segment>,
    queries: Slot<Query>,
    problem: selection::Slots,
    scores: Floats,
    pooled: Option<Floats>,
    chosen: Selection,
    workspace: Memory,
}

impl Slots {
    pub(super) fn recompression(
        &self,
        config: &Recompress,
        query_heads: usize,
    ) -> Result<Recompression> {
        let heads = self.bounds.len();
        let none: &[DeviceLayer<'_>] = &[];
        check::window_attention(&config.score, none, &Vec::new(), None::<&Vec<u32>>)?;
        if let Some((kind, kernel)) = config.pool {
            check::pool(&Pool { kind, kernel, lens: &[] }, &Vec::new())?;
        }
        if heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(heads) {
            let (query_heads, kv_heads) = (query_heads as u32, heads as u32);
            return Err(Error::HeadsNotDivisible { query_heads, kv_heads });
        }
        if config.score.probe {
            let why = "it looks with the newest tokens' queries";
            return Err(Error::Unsupported { what: "recompression by a probe", why });
        }
        let window = config.score.window;
        if config.recent < window {
            let (name, expected) = ("recent", "at least the window, whose slots have no scores");
            return Err(Error::Parameter { name, expected, got: config.recent.to_string() });
        }
        let contests = contests(config, &self.bounds)?;
        let recent = Span { start: -1 - i64::from(config.recent), end: -1 };
        let protected: Ragged<Span> =
            (0..heads).map(|_| vec![Span::from(0..config.sinks), recent]).collect();

        let cuda = &self.cuda;
        let group = (query_heads / heads) as u32;
        let head = |h: usize| Head {
            row: h as u32,
            query: h as u32 * group,
            group,
            window,
            tokens: 0,
            ends: None,
            longest: self.bounds[h],
            dim: self.dim,
            dtype: self.dtype,
            lse: false,
        };
        let all: Vec<Head> = (0..heads).map(head).collect();
        let plan = Plan::new(&config.score, false, &all, cuda.driver.processors)?;
        let problem = Problem::new(cuda, &contests, &protected, &self.bounds)?;
        let shape = problem.shape;
        let mut table = Table::default();
        let segments = table.push(plan.segments());
        let queries = table.push(&vec![Query::zeroed(); query_heads]);
        let problem = problem.into_table(&mut table);
        let kept = top_k::bounds(&contests, &self.bounds);
        let bytes = plan.workspace_bytes().max(selection::workspace_bytes(&shape));
        let pool = config.pool.map(|(kind, kernel)| Ok::<_, Error>((kind, pool::radius(kernel)?)));
        Ok(Recompression {
            cuda: cuda.clone(),
            of: (self.dtype, self.dim),
            bounds: self.bounds.clone(),
            query_heads,
            window,
            plan,
            pool: pool.transpose()?,
            shape,
            sent: table.send(cuda)?,
            segments,
            queries,
            problem,
            scores: Floats::new(cuda, &self.bounds)?,
            pooled: config.pool.map(|_| Floats::new(cuda, &self.bounds)).transpose()?,
            chosen: Selection::new(cuda, kept, shape.positions)?,
            workspace: Memory::new(&cuda.driver, "workspace of a recompression", bytes)?,
        })
    }

    pub(super) fn recompress(
        &mut self,
        q: &Rows<'_, DeviceSlice<'_>>,
        with: &mut Recompression,
    ) -> Result<()> {
        self.check_order()?;
        if with.bounds != self.bounds || with.of != (self.dtype, self.dim) {
            let why = "it was made for a cache of other capacities, dtype or head dim";
            return Err(Error::Unsupported { what: METHOD, why });
        }
        check::expect("query heads", with.query_heads, q.heads())?;
        check::expect("head dim of queries", self.dim as usize, q.dim())?;
        if q.dtype() != self.dtype {
            let (expected, got) = (self.dtype, q.dtype());
            return Err(Error::Dtype { what: "queries", expected, got });
        }
        let (needed, got) = (u64::from(with.window), q.len(0) as u64);
        if got < needed {
            return Err(Error::TooFewQueries { method: METHOD, needed, got });
        }
        let (base, head_stride, row_stride) = queries(q)?;
        // The last rows are the window's.
        let base = base + (got - needed) * row_stride as u64;
        with.select((base, head_stride, row_stride), self.held())?;
        let most = with.chosen.segments().iter().map(|&(_, most)| most).max().unwrap_or(0);
        let (cuts, slots) = (with.chosen.cuts(), with.chosen.positions());
        self.thin(Kept { cuts, slots, counts: Ptr::NULL, most }, Order::Ascending)
    }
}

impl Recompression {
    /// Bytes of its tables and memory on the device.
    pub fn bytes(&self) -> usize {
        let rows = |floats: &Floats| floats.lens().iter().map(|&n| n as usize * 4).sum::<usize>();
        let pooled = self.pooled.as_ref().map_or(0, rows);
        self.workspace.bytes() + rows(&self.scores) + pooled + self.shape.positions * 4
    }

    /// Scores the cache and selects of it.
    fn select(&self, q: super::super::append::Strided, cache: Held) -> Result<()> {
        let cuda = &self.cuda;
        // Rows come first in a `Query`, and the rest is zero.
        let to = Ptr::<u8>::at(self.sent.at(self.queries).address);
        lend(cuda, self.query_heads, (q, to, size_of::<Query>()), None)?;
        let operands = Operands {
            segments: self.sent.at(self.segments),
            queries: self.sent.at(self.queries),
            keys: cache.rows.keys,
            pages: cache.rows.pages,
            lengths: cache.lengths,
            ends: Ptr::NULL,
            out: self.scores.rows(),
            means: Ptr::NULL,
        };
        window_attention::launch(&cuda.driver, &self.plan, &operands, self.workspace.at(0))?;
        let (scores, lengths) = (self.scores.rows(), cache.lengths);
        let mut inputs = self.problem.inputs(&self.sent, scores, lengths);
        if let (Some((kind, radius)), Some(pooled)) = (self.pool, &self.pooled) {
            inputs.rows = pooled.rows();
            inputs.smoothing = Some(Smoothing { kind, radius, from: scores, lengths });
        }
        let (cuts, positions) = (self.chosen.cuts(), self.chosen.positions());
        selection::launch(cuda, &self.shape, inputs, cuts, positions, self.workspace.at(0))
    }
}

const _: () = assert!(std::mem::offset_of!(Query, rows) == 0 && size_of::<HeadRows>() == 40);

/// Contests that keep what is protected, in which no budget or floor is above what a head may hold.
fn contests(config: &Recompress, bounds: &[u32]) -> Result<Vec<Contest>> {
    let protected = u64::from(config.sinks) + u64::from(config.recent);
    let least = protected.max(config.floor.into());
    let (total, floors) = match config.budget {
        Share::PerHead(slots) => (slots.into(), least),
        Share::PerLayer(slots) => (slots, least * bounds.len() as u64),
    };
    let caps = bounds.iter().map(|&n| u64::from(n)).sum();
    if floors > total {
        return Err(Error::Apportion { total, floors, caps });
    }
    let floor = |s: usize| least.min(bounds[s].into());
    let heads = 0..bounds.len();
    Ok(match config.budget {
        Share::PerHead(slots) => heads
            .map(|s| Contest {
                segments: s..s + 1,
                budget: u64::from(slots.min(bounds[s])),
                floors: vec![floor(s)],
            })
            .collect(),
        Share::PerLayer(slots) => {
            let floors = heads.clone().map(floor).collect();
            vec![Contest { segments: heads, budget: slots.min(caps), floors }]
        }
    })
}
