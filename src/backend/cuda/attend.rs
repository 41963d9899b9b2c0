//! Attention of the newest tokens: launches `kernels/attend.cu` and `kernels/attend_mma.cu`.
//!
//! A plan made on the device cuts segments of any lengths into chunks of one length; a fixed number of blocks takes them
//! in turn, and what they leave is merged in the order of chunks. The host knows upper bounds of the lengths only, so
//! that a captured launch stays right while a cache grows into its capacity.

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads};
use super::{Cuda, DeviceSlice, Floats, check};
use crate::backend::AttendView;
use crate::backend::ops::Attend;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Lengths, offsets, items, segments, chunk.
const PLAN: Kernel<(Ptr<u32>, Ptr<u32>, Ptr<[u32; 2]>, u32, u32)> =
    Kernel::new("attend", "attend_plan");
/// Queries, keys, values, pages, lengths, offsets, items, partials, stats; segments, group, queries of a head, dim,
/// chunk, scale.
const F32: Kernel<Work> = Kernel::new("attend", "attend_f32");
/// The same: `attend_mma_bf16_128` and so on.
const MMA: Kernel<Work> = Kernel::new("attend_mma", "attend_mma");
/// The same, then out, log-sum-exps, dtype, dtype of out.
const COMBINE: Kernel<Combine> = Kernel::new("attend", "attend_combine");

type Rows = Ptr<HeadRows>;
#[rustfmt::skip]
type Work = (
    Rows, Rows, Rows, Ptr<u32>, Ptr<u32>, Ptr<u32>, Ptr<[u32; 2]>, Ptr<f32>, Ptr<[f32; 2]>,
    u32, u32, u32, u32, u32, f32,
);
#[rustfmt::skip]
type Combine = (
    Rows, Rows, Rows, Ptr<u32>, Ptr<u32>, Ptr<u32>, Ptr<[u32; 2]>, Ptr<f32>, Ptr<[f32; 2]>,
    u32, u32, u32, u32, u32, f32,
    Rows, Ptr<Ptr<f32>>, u32, u32,
);

/// Head dims of the tensor-core kernels, their warps per block and query rows.
const MMA_DIMS: [(u32, u32); 4] = [(64, 4), (96, 4), (128, 4), (256, 2)];
const MMA_ROWS: u32 = 16;
/// Query rows of a block of the f32 kernel, and keys of a warp.
const F32_ROWS: u32 = 8;
const F32_KEYS: u32 = 8;
/// Longest row of the kernels.
const MAX_DIM: u32 = 256;
/// Chunks are multiples of the largest tile, and so long that partial results are a few percent of what is read.
const TILE: u64 = 64;
const MIN_CHUNK: u64 = 256;
/// Items that each multiprocessor gets: it holds three blocks, and the last one to end should end soon.
const ITEMS_PER_PROCESSOR: u64 = 4;
const BLOCKS_PER_PROCESSOR: u32 = 3;

/// What the host knows of an attention over many segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// KV heads of all sequences.
    pub segments: u32,
    /// Query heads of each.
    pub group: u32,
    /// Newest tokens, `M`.
    pub queries: u32,
    /// Head dim.
    pub dim: u32,
    /// Of queries, keys and values.
    pub dtype: Dtype,
    /// No segment is longer.
    pub longest: u32,
    /// The lengths sum to no more.
    pub total: u64,
}

/// Where everything lies on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inputs {
    /// `[segments * group]`, a row per newest token.
    pub q: Ptr<HeadRows>,
    /// `[segments]`.
    pub k: Ptr<HeadRows>,
    /// `[segments]`.
    pub v: Ptr<HeadRows>,
    /// What the tables of all of them index.
    pub pages: Ptr<u32>,
    /// `[segments]`.
    pub lengths: Ptr<u32>,
    /// `[segments * group]`, a row per newest token; rows start at multiples of 16 bytes.
    pub out: Ptr<HeadRows>,
    /// f32, or rounded to nearest even.
    pub out_dtype: Dtype,
    /// `[segments * group]` rows with an f32 per newest token, or null.
    pub lse: Ptr<Ptr<f32>>,
}

/// How the work is cut, and where its parts lie in the workspace.
struct Layout {
    chunk: u32,
    items: u64,
    rows: u64,
    row_blocks: u32,
    starts: [usize; 3],
    bytes: usize,
}

impl Layout {
    fn new(cuda: &Cuda, shape: &Shape) -> Self {
        let rows = u64::from(shape.group) * u64::from(shape.queries);
        let block = if shape.dtype == Dtype::F32 { F32_ROWS } else { MMA_ROWS };
        let row_blocks = rows.div_ceil(block.into());
        let wanted = ITEMS_PER_PROCESSOR * u64::from(cuda.driver.processors);
        let chunk = (shape.total.saturating_mul(row_blocks) / wanted)
            .min(shape.longest.into())
            .max(MIN_CHUNK)
            .next_multiple_of(TILE);
        let segments = u64::from(shape.segments);
        // Every segment may end in a chunk that is not full.
        let items = (shape.total / chunk + segments)
            .min(segments * u64::from(shape.longest).div_ceil(chunk))
            .max(1);
        let mut end = 0;
        let mut place = |bytes: u64| {
            let start = end;
            end += (bytes as usize).next_multiple_of(16);
            start
        };
        let _offsets = place((segments + 1) * 4);
        let starts = [
            place(items * 8),
            place(items * rows * 8),
            place(items * rows * u64::from(shape.dim) * 4),
        ];
        let (chunk, row_blocks) = (chunk as u32, u32::try_from(row_blocks).unwrap_or(u32::MAX));
        Self { chunk, items, rows, row_blocks, starts, bytes: end }
    }
}

/// Bytes that [`launch`] needs, aligned to 16.
pub(super) fn workspace_bytes(cuda: &Cuda, shape: &Shape) -> usize {
    Layout::new(cuda, shape).bytes
}

/// Attends. Allocates nothing, copies nothing, waits for nothing: three launches.
///
/// Errors: head dims beyond 256, as [`check_dim`] has it, and what the driver says.
pub(super) fn launch(
    cuda: &Cuda,
    op: &Attend,
    shape: &Shape,
    inputs: &Inputs,
    workspace: Ptr<u8>,
) -> Result<()> {
    check_dim(shape.dim)?;
    let layout = Layout::new(cuda, shape);
    let Shape { segments, group, queries, dim, dtype, .. } = *shape;
    let Inputs { q, k, v, pages, lengths, out, out_dtype, lse } = *inputs;
    if layout.rows * u64::from(segments) == 0 {
        return Ok(());
    }
    let [items, stats, partials] = layout.starts.map(|start| workspace.address + start as u64);
    let (offsets, items) = (Ptr::at(workspace.address), Ptr::at(items));
    let (stats, partials) = (Ptr::at(stats), Ptr::at(partials));
    let chunk = layout.chunk;

    let block = Grid::new(1, 1, 1024);
    PLAN.launch(&cuda.driver, "", block, (lengths, offsets, items, segments, chunk))?;

    // As many blocks as the device holds, whatever the number of items: they stride over them.
    let resident = (BLOCKS_PER_PROCESSOR * cuda.driver.processors).div_ceil(layout.row_blocks);
    let blocks = resident.min(u32::try_from(layout.items).unwrap_or(u32::MAX));
    let (kernel, variant, warps, shared) = match dtype {
        Dtype::F32 => {
            let pitch = (dim / 4) | 1;
            let warps = if dim <= 128 { 4 } else { 2 };
            (&F32, String::new(), warps, pitch * 16 * (F32_ROWS + warps * 4 * F32_KEYS))
        }
        Dtype::F16 | Dtype::BF16 => {
            let fits = MMA_DIMS.into_iter().find(|&(width, _)| dim <= width);
            let (width, warps) = fits.expect("checked above");
            let shared = width * 2 * (MMA_ROWS + warps * 4 * 16);
            (&MMA, format!("{dtype}_{width}"), warps, shared)
        }
    };
    let grid = Grid { blocks: (blocks, layout.row_blocks, 1), threads: warps * 32, shared };
    #[rustfmt::skip]
    let work = (
        q, k, v, pages, lengths, offsets, items, partials, stats,
        segments, group, queries, dim, chunk, op.scale,
    );
    kernel.launch(&cuda.driver, &variant, grid, work)?;

    let rows = usize::try_from(layout.rows * u64::from(segments)).unwrap_or(usize::MAX);
    let code = |dtype| match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
    };
    #[rustfmt::skip]
    let combine = (
        q, k, v, pages, lengths, offsets, items, partials, stats,
        segments, group, queries, dim, chunk, op.scale,
        out, lse, code(dtype), code(out_dtype),
    );
    COMBINE.launch(&cuda.driver, "", Grid::new(rows, 1, 128), combine)
}

fn check_dim(dim: u32) -> Result<()> {
    if dim > MAX_DIM {
        let (got, limit) = (dim.into(), MAX_DIM.into());
        return Err(Error::TooLarge { what: "head dim of attention on CUDA", got, limit });
    }
    Ok(())
}

/// Sequences that one launch can take together, with the row at which the first query head of each lies.
type Batch<'a> = (Shape, Vec<(&'a AttendView<'a, DeviceSlice<'a>>, usize)>);

pub(super) fn run(
    cuda: &Cuda,
    op: &Attend,
    sequences: &[AttendView<'_, DeviceSlice<'_>>],
    out: &mut Floats,
    lse: Option<&mut Floats>,
) -> Result<()> {
    check::attend(sequences, out, lse.as_deref())?;
    let mut batches: Vec<Batch<'_>> = Vec::new();
    let mut row = 0;
    for sequence in sequences {
        let AttendView { q, k, v } = sequence;
        for (what, tensor) in [("queries", q), ("values", v)] {
            if tensor.dtype() != k.dtype() {
                return Err(Error::Dtype { what, expected: k.dtype(), got: tensor.dtype() });
            }
        }
        check_dim(u32::try_from(k.dim()).unwrap_or(u32::MAX))?;
        let lens = || (0..k.heads()).map(|h| k.len(h) as u32);
        let shape = Shape {
            segments: k.heads() as u32,
            group: (q.heads() / k.heads()) as u32,
            queries: q.len(0) as u32,
            dim: k.dim() as u32,
            dtype: k.dtype(),
            longest: lens().max().unwrap_or(0),
            total: lens().map(u64::from).sum(),
        };
        let alike = |s: &Shape| (s.group, s.queries, s.dim, s.dtype);
        match batches.iter_mut().find(|(of, _)| alike(of) == alike(&shape)) {
            Some((of, members)) => {
                of.segments += shape.segments;
                of.longest = of.longest.max(shape.longest);
                of.total += shape.total;
                members.push((sequence, row));
            }
            None => batches.push((shape, vec![(sequence, row)])),
        }
        row += q.heads();
    }
    // All tables first: after an error nothing has been written.
    let prepared = batches.iter().map(|batch| prepare(cuda, batch, out, lse.as_deref()));
    for (shape, inputs, memory) in prepared.collect::<Result<Vec<_>>>()? {
        launch(cuda, op, &shape, &inputs, memory.1.at(0))?;
    }
    Ok(())
}

/// Sends the tables of a batch and allocates its workspace.
fn prepare(
    cuda: &Cuda,
    (shape, members): &Batch<'_>,
    out: &Floats,
    lse: Option<&Floats>,
) -> Result<(Shape, Inputs, (super::floats::Sent, Memory))> {
    let mut heads = Heads::default();
    members.iter().try_for_each(|(of, _)| heads.push("queries", &of.q).map(drop))?;
    members.iter().try_for_each(|(of, _)| heads.push("keys", &of.k).map(drop))?;
    members.iter().try_for_each(|(of, _)| heads.push("values", &of.v).map(drop))?;
    let rows = || members.iter().flat_map(|(of, first)| *first..first + of.q.heads());
    let lens = members.iter().flat_map(|(of, _)| (0..of.k.heads()).map(|h| of.k.len(h) as u32));
    let bytes = shape.dim as usize * size_of::<f32>();
    let outs: Vec<_> = rows().map(|row| HeadRows::strided(out.row(row).address, bytes)).collect();
    let lses: Vec<_> = lse.iter().flat_map(|lse| rows().map(|row| lse.row(row).address)).collect();

    let mut table = Table::default();
    let lengths = table.push(&lens.collect::<Vec<_>>());
    let (outs, lses) = (table.push(&outs), table.push(&lses));
    let slots = heads.into_table(&mut table);
    let sent = table.send(cuda)?;
    let q = sent.at(slots.rows);
    let k = q.add((shape.segments * shape.group) as usize);
    let inputs = Inputs {
        q,
        k,
        v: k.add(shape.segments as usize),
        pages: sent.at(slots.pages),
        lengths: sent.at(lengths),
        out: sent.at(outs),
        out_dtype: Dtype::F32,
        lse: if lse.is_some() { Ptr::at(sent.at(lses).address) } else { Ptr::NULL },
    };
    let workspace =
        Memory::new(&cuda.driver, "workspace of attention", workspace_bytes(cuda, shape))?;
    Ok((*shape, inputs, (sent, workspace)))
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&PLAN).into(), (&F32).into(), (&MMA).into(), (&COMBINE).into()]
}
