//! How far values reach along what the last queries read: launches `kernels/projection.cu`, after the row statistics of
//! `kernels/window_attention.cu`.

use bytemuck::{Pod, Zeroable};

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::HeadRows;
use super::window_attention::{self, Inputs, Part, Plan, Query, Segment, limit};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::{Projection, Reduce, WindowAttention};
use crate::error::Result;

/// Segments, queries, keys, values, pages, lengths, ends, statistics, anchors, outputs, their parts, out, chunk, radius, flags.
type Pass = Kernel<(
    Ptr<Segment>,
    Ptr<Query>,
    Ptr<HeadRows>,
    Ptr<HeadRows>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<[f32; 4]>,
    Ptr<Anchor>,
    Ptr<f32>,
    Ptr<f32>,
    Ptr<Ptr<f32>>,
    u32,
    u32,
    u32,
)>;
const READ: Pass = Kernel::new("projection", "projection_read");
const SCORE: Pass = Kernel::new("projection", "projection_score");
/// Segments, anchors, parts of outputs, outputs, chunk, elements of 16 bytes, whether rows are normalised.
const OUTPUTS: Kernel<(Ptr<Segment>, Ptr<Anchor>, Ptr<f32>, Ptr<f32>, u32, u32, u32)> =
    Kernel::new("projection", "projection_outputs");

/// Largest pooling kernel: what a row's ring of weights holds.
const POOL: u32 = 17;
/// Query rows of a block, and of a warp.
const BLOCK_ROWS: u32 = 128;
const WARP_ROWS: u32 = 32;
/// Slots that a block takes at least: of the anchor, whose parts are stored, and of those that are scored.
const READ_CHUNK: u64 = 1024;
const SCORE_CHUNK: u64 = 256;

/// Slots read by a segment, and where its outputs are; a twin in `kernels/projection.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Anchor {
    first: u32,
    end: u32,
    outputs: u64,
    partials: u64,
}

pub(super) fn run(
    cuda: &Cuda,
    op: &Projection<'_>,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::projection(op, layers, out)?;
    let kernel = op.row_pool.unwrap_or(1);
    limit("row pooling kernel of a projection on CUDA", kernel, POOL)?;
    let radius = kernel / 2;
    let attention =
        WindowAttention { score_window: true, ..WindowAttention::plain(op.window, Reduce::Mean) };
    let mut inputs = Inputs::of(&attention, layers)?;
    let plan = Plan::new(&attention, false, &inputs.heads, cuda.driver.processors)?;
    let mut first_value = None;
    for layer in layers {
        let values = inputs.rows.push("values", layer.v())?;
        first_value.get_or_insert(values.start);
    }

    let chunk_of: Vec<Chunks> =
        plan.parts().map(|(part, _)| Chunks::of(part, cuda.driver.processors)).collect();
    let range = |r: usize| (op.anchor[r].start, op.anchor[r].end);
    let mut anchors = vec![Anchor::zeroed(); inputs.heads.len()];
    let (mut outputs, mut partials) = (0, 0);
    for ((_, segments), chunks) in plan.parts().zip(&chunk_of) {
        for segment in segments {
            let (first, end) = range(segment.row as usize);
            anchors[segment.row as usize] = Anchor { first, end, outputs, partials };
            let dim = inputs.heads[segment.row as usize].dim;
            let floats = u64::from(segment.group * segment.window) * u64::from(dim);
            outputs += floats;
            partials += floats * u64::from((end - first).div_ceil(chunks.read));
        }
    }

    let mut table = Table::default();
    let slots = inputs.into_table(&plan, &mut table);
    let anchors = table.push(&anchors);
    let sent = table.send(cuda)?;
    // Statistics, outputs, their parts: in units of 16 bytes each.
    let stats = plan.stats_bytes();
    let floats = size_of::<f32>() as u64;
    let bytes = stats + ((outputs + partials) * floats) as usize;
    let workspace = Memory::new(&cuda.driver, "outputs of a projection", bytes)?;
    let operands = slots.operands(&sent, out);
    window_attention::statistics(&cuda.driver, &plan, &operands, workspace.at(0))?;

    let (values, anchors) = (operands.keys.add(first_value.unwrap_or(0)), sent.at(anchors));
    let y = workspace.at::<f32>(stats);
    let parts_of_y = y.add(outputs as usize);
    for ((part, _), chunks) in plan.parts().zip(&chunk_of) {
        let segments = operands.segments.add(part.first);
        let pass = |kernel: &Pass, chunk: u32, blocks: u32| {
            let slots = part.longest.div_ceil(chunk) as usize;
            let mut grid = Grid::new(slots, part.count, chunks.threads);
            grid.blocks.2 = blocks;
            let arguments = (
                segments,
                operands.queries,
                operands.keys,
                values,
                operands.pages,
                operands.lengths,
                operands.ends,
                workspace.at(0),
                anchors,
                y,
                parts_of_y,
                operands.out,
                chunk,
                radius,
                part.template.flags,
            );
            kernel.launch(&cuda.driver, part.template.variant, grid, arguments)
        };
        pass(&READ, chunks.read, chunks.blocks)?;
        let grid = Grid::new(part.rows.div_ceil(BLOCK_ROWS / WARP_ROWS) as usize, part.count, 128);
        let (elements, normalise) = (chunks.elements, op.normalise.into());
        let arguments = (segments, anchors, parts_of_y, y, chunks.read, elements, normalise);
        OUTPUTS.launch(&cuda.driver, "", grid, arguments)?;
        pass(&SCORE, chunks.score, 1)?;
    }
    Ok(())
}

/// How the passes of a part are launched.
struct Chunks {
    threads: u32,
    /// Elements of 16 bytes.
    elements: u32,
    /// Blocks of rows and of columns.
    blocks: u32,
    /// Slots of a block.
    read: u32,
    score: u32,
}

impl Chunks {
    fn of(part: &Part, processors: u32) -> Self {
        // Columns that the variants hold, of how many at most: the twin of `Shape` in the kernel's file.
        let (elements, columns, dim) = match part.template.variant {
            "64" => (8, 64, 64),
            "128" => (8, 64, 128),
            "256" => (8, 32, 256),
            _ => (4, 64, 256),
        };
        let blocks = part.rows.div_ceil(BLOCK_ROWS) * (dim / columns);
        let slots = u64::from(part.longest) * part.count as u64;
        // A few blocks for each processor.
        let chunk = |work: u64, least| {
            let even = work.div_ceil(4 * u64::from(processors)).next_multiple_of(16);
            even.clamp(least, 1 << 30) as u32
        };
        Self {
            threads: part.rows.min(BLOCK_ROWS).next_multiple_of(WARP_ROWS),
            elements,
            blocks,
            read: chunk(slots * u64::from(blocks), READ_CHUNK),
            score: chunk(slots, SCORE_CHUNK),
        }
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&READ).into(), (&SCORE).into(), (&OUTPUTS).into()]
}
