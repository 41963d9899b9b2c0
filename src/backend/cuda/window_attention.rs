//! Scores from the last queries: launches `kernels/window_attention.cu`.

mod plan;

use std::sync::Arc;

use bytemuck::Zeroable;

use super::driver::{Driver, Memory, Ptr};
use super::floats::{Sent, Slot, Table};
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, HeadSlots, Heads};
use super::{Cuda, DeviceLayer, DeviceSlice, Floats, check};
use crate::backend::ops::WindowAttention;
use crate::error::{Error, Result};
use crate::view::Rows;
use plan::flags;
pub(super) use plan::{Head, Part, Plan, Query, Segment, limit};

const METHOD: &str = "window attention";

/// Segments, queries, keys, pages, lengths, ends, statistics, out, means, partial results, chunk, radius, gap, flags.
type Pass = Kernel<(
    Ptr<Segment>,
    Ptr<Query>,
    Ptr<HeadRows>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<[f32; 4]>,
    Ptr<Ptr<f32>>,
    Ptr<Ptr<f32>>,
    Ptr<f32>,
    u32,
    u32,
    u32,
    u32,
)>;
const LSE: Pass = Kernel::new("window_attention", "window_attention_lse");
const SUM: Pass = Kernel::new("window_attention", "window_attention_sum");
const MAX: Pass = Kernel::new("window_attention", "window_attention_max");
/// Segments, queries, lengths, ends, statistics, chunk, radius, flags.
const ROWS: Kernel<(Ptr<Segment>, Ptr<Query>, Ptr<u32>, Ptr<u32>, Ptr<[f32; 4]>, u32, u32, u32)> =
    Kernel::new("window_attention", "window_attention_rows");
/// Segments, lengths, ends, partial results, out, means, radius, gap, flags.
const MERGE: Kernel<(
    Ptr<Segment>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<f32>,
    Ptr<Ptr<f32>>,
    Ptr<Ptr<f32>>,
    u32,
    u32,
    u32,
)> = Kernel::new("window_attention", "window_attention_merge");

/// What [`launch`] reads and writes, all of it on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    /// Those of the plan.
    pub segments: Ptr<Segment>,
    pub queries: Ptr<Query>,
    pub keys: Ptr<HeadRows>,
    /// Page tables of keys and queries.
    pub pages: Ptr<u32>,
    /// Slots of each head, by [`Head::row`].
    pub lengths: Ptr<u32>,
    /// Null if no head has [`Head::ends`].
    pub ends: Ptr<u32>,
    pub out: Ptr<Ptr<f32>>,
    /// Null if the plan is without means.
    pub means: Ptr<Ptr<f32>>,
}

/// What a launch of any pass takes.
struct Passes<'a> {
    driver: &'a Arc<Driver>,
    plan: &'a Plan,
    operands: &'a Operands,
    stats: Ptr<[f32; 4]>,
    planes: Ptr<f32>,
}

impl<'a> Passes<'a> {
    fn new(
        driver: &'a Arc<Driver>,
        plan: &'a Plan,
        operands: &'a Operands,
        workspace: Ptr<u8>,
    ) -> Self {
        let stats = Ptr::<[f32; 4]>::at(workspace.address);
        let planes = Ptr::<f32>::at(workspace.address + plan.stats_bytes() as u64);
        Self { driver, plan, operands, stats, planes }
    }

    fn pass(&self, part: &Part, kernel: &Pass, shape: plan::Shape, flags: u32) -> Result<()> {
        let Operands { queries, keys, pages, lengths, ends, out, means, .. } = *self.operands;
        let chunks = part.longest.div_ceil(shape.chunk) as usize;
        let mut grid = Grid::new(chunks, part.count, shape.threads);
        grid.blocks.2 = shape.blocks;
        let arguments = (
            self.operands.segments.add(part.first),
            queries,
            keys,
            pages,
            lengths,
            ends,
            self.stats,
            out,
            means,
            self.planes,
            shape.chunk,
            self.plan.radius,
            self.plan.gap,
            flags | part.template.flags,
        );
        kernel.launch(self.driver, part.template.variant, grid, arguments)
    }

    /// Pass 1, if it is needed.
    fn statistics(&self, part: &Part) -> Result<()> {
        let Some(sums) = part.sums else { return Ok(()) };
        let Plan { radius, flags, .. } = *self.plan;
        self.pass(part, &LSE, sums, flags)?;
        let Operands { segments, queries, lengths, ends, .. } = *self.operands;
        let grid = Grid::new(part.rows.div_ceil(128) as usize, part.count, 128);
        let segments = segments.add(part.first);
        let arguments = (segments, queries, lengths, ends, self.stats, sums.chunk, radius, flags);
        ROWS.launch(self.driver, "", grid, arguments)
    }
}

/// Pass 1 alone, for kernels of other files: the statistics of all rows, at the start of the workspace, of which it needs
/// [`Plan::stats_bytes`].
pub(super) fn statistics(
    driver: &Arc<Driver>,
    plan: &Plan,
    operands: &Operands,
    workspace: Ptr<u8>,
) -> Result<()> {
    let passes = Passes::new(driver, plan, operands, workspace);
    plan.parts.iter().try_for_each(|part| passes.statistics(part))
}

/// Scores every head of a plan. Allocates nothing, copies nothing, waits for nothing: lengths may have changed on the device
/// since the plan was made, up to [`Head::longest`].
pub(super) fn launch(
    driver: &Arc<Driver>,
    plan: &Plan,
    operands: &Operands,
    workspace: Ptr<u8>,
) -> Result<()> {
    let passes = Passes::new(driver, plan, operands, workspace);
    let Plan { radius, gap, flags, .. } = *plan;
    for part in &plan.parts {
        passes.statistics(part)?;
        if flags & flags::WINDOW_MAX != 0 {
            passes.pass(part, &MAX, part.scores, flags)?;
        } else {
            passes.pass(part, &SUM, part.scores, flags)?;
            if flags & flags::POOLED != 0 && flags & flags::MEANS != 0 {
                // The same sums with other factors.
                let flags = (flags & !flags::POOLED) | flags::ONLY_MEANS;
                passes.pass(part, &SUM, part.scores, flags)?;
            }
        }
        if part.merge {
            let Operands { segments, lengths, ends, out, means, .. } = *operands;
            let grid = Grid::new(part.longest.div_ceil(256) as usize, part.count, 256);
            let segments = segments.add(part.first);
            let arguments =
                (segments, lengths, ends, passes.planes, out, means, radius, gap, flags);
            MERGE.launch(driver, "", grid, arguments)?;
        }
    }
    Ok(())
}

pub(super) fn run(
    cuda: &Cuda,
    op: &WindowAttention,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
    mean: Option<&mut Floats>,
) -> Result<()> {
    check::window_attention(op, layers, out, mean.as_deref())?;
    let inputs = Inputs::of(op, layers)?;
    let plan = Plan::new(op, mean.is_some(), &inputs.heads, cuda.driver.processors)?;
    let mut table = Table::default();
    let slots = inputs.into_table(&plan, &mut table);
    let sent = table.send(cuda)?;
    let workspace = Memory::new(&cuda.driver, "window attention", plan.workspace_bytes())?;
    let means = mean.map_or(Ptr::NULL, |mean| mean.rows());
    let operands = Operands { means, ..slots.operands(&sent, out) };
    launch(&cuda.driver, &plan, &operands, workspace.at(0))
}

/// What the views lend, in the order of their segments.
pub(super) struct Inputs {
    /// Keys of all segments first.
    pub rows: Heads,
    pub heads: Vec<Head>,
    pub queries: Vec<Query>,
    pub ends: Vec<u32>,
}

impl Inputs {
    pub(super) fn of(op: &WindowAttention, layers: &[DeviceLayer<'_>]) -> Result<Self> {
        let mut rows = Heads::keys(layers)?;
        let (mut heads, mut queries, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for layer in layers {
            let first = queries.len();
            let (q, lse, window, tokens) = if op.probe {
                // Behind the last token: all slots are the past.
                let q = layer.probe(METHOD)?;
                let window = op.window.min(q.len(0) as u32);
                (q, None, window, layer.tokens() + window)
            } else {
                // A sequence shorter than the window is all window.
                (layer.q(METHOD)?, layer.lse(), op.window.min(layer.tokens()), layer.tokens())
            };
            push_queries(layer, q, lse, window, &mut rows, &mut queries)?;
            for h in 0..layer.shape().kv_heads() {
                let group = layer.shape().group();
                // A probe sees all slots, wherever they are.
                let holes = layer.positions().filter(|_| !op.probe);
                let at = holes.map(|_| ends.len() as u32);
                if at.is_some() {
                    push_ends(layer, h, window, op.gap, &mut ends);
                }
                heads.push(Head {
                    row: heads.len() as u32,
                    query: (first + h * group) as u32,
                    group: group as u32,
                    window,
                    tokens,
                    ends: at,
                    longest: layer.k().len(h) as u32,
                    dim: layer.shape().head_dim() as u32,
                    dtype: layer.k().dtype(),
                    lse: lse.is_some(),
                });
            }
        }
        Ok(Self { rows, heads, queries, ends })
    }
}

/// Where a table has a plan's segments, and what the views lend.
pub(super) struct InputSlots {
    segments: Slot<Segment>,
    queries: Slot<Query>,
    ends: Slot<u32>,
    rows: HeadSlots,
}

impl Inputs {
    pub(super) fn into_table(self, plan: &Plan, table: &mut Table) -> InputSlots {
        InputSlots {
            segments: table.push(plan.segments()),
            queries: table.push(&self.queries),
            ends: table.push(&self.ends),
            rows: self.rows.into_table(table),
        }
    }
}

impl InputSlots {
    /// Of a plan without means.
    pub(super) fn operands(&self, sent: &Sent, out: &Floats) -> Operands {
        Operands {
            segments: sent.at(self.segments),
            queries: sent.at(self.queries),
            keys: sent.at(self.rows.rows),
            pages: sent.at(self.rows.pages),
            lengths: out.lengths(),
            ends: sent.at(self.ends),
            out: out.rows(),
            means: Ptr::NULL,
        }
    }
}

/// The last rows of a layer's query heads.
fn push_queries(
    layer: &DeviceLayer<'_>,
    q: &Rows<'_, DeviceSlice<'_>>,
    lse: Option<&Rows<'_, DeviceSlice<'_>>>,
    window: u32,
    rows: &mut Heads,
    queries: &mut Vec<Query>,
) -> Result<()> {
    if q.dtype() != layer.k().dtype() {
        let expected = layer.k().dtype();
        return Err(Error::Dtype { what: "queries", expected, got: q.dtype() });
    }
    let of_queries = rows.push("queries", q)?;
    let of_lse = lse.map(|lse| rows.push_scalars("log-sum-exp", lse)).transpose()?;
    for hq in 0..q.heads() {
        let lent = lse.map_or(q.len(hq), |lse| lse.len(hq));
        let least = q.len(hq).min(lent) as u64;
        if least < u64::from(window) {
            let needed = window.into();
            return Err(Error::TooFewQueries { method: METHOD, needed, got: least });
        }
        queries.push(Query {
            rows: rows.row(of_queries.start + hq),
            lse: of_lse.as_ref().map_or(HeadRows::zeroed(), |lse| rows.row(lse.start + hq)),
            first: q.len(hq) as u32 - window,
            lse_first: lent as u32 - window,
            unused: [0; 2],
        });
    }
    Ok(())
}

/// The past, what each query row sees and what each gives scores to, where slots are not positions.
fn push_ends(layer: &DeviceLayer<'_>, head: usize, window: u32, gap: u32, ends: &mut Vec<u32>) {
    let first = layer.tokens() - window;
    let before = |position: u32| layer.slots_before(head, position) as u32;
    ends.push(before(first));
    ends.extend((0..window).map(|w| before(first + w + 1)));
    ends.extend((0..window).map(|w| before((first + w + 1).saturating_sub(gap))));
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&LSE).into(), (&SUM).into(), (&MAX).into(), (&ROWS).into(), (&MERGE).into()]
}
