//! Mean and variance of the last queries' attention: launches `kernels/attention_spread.cu`, after the row statistics of
//! `kernels/window_attention.cu`.

use bytemuck::{Pod, Zeroable};

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::HeadRows;
use super::window_attention::{self, Inputs, Part, Plan, Query, Segment};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::{AttentionSpread, Reduce, WindowAttention};
use crate::error::Result;

/// Segments, queries, keys, pages, lengths, ends, statistics, out, parts of sums, moments, chunk, stride of moments, gamma, flags.
const SPREAD: Kernel<(
    Ptr<Segment>,
    Ptr<Query>,
    Ptr<HeadRows>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<u32>,
    Ptr<[f32; 4]>,
    Ptr<Ptr<f32>>,
    Ptr<[f64; 2]>,
    Ptr<[f32; 2]>,
    u32,
    u32,
    f32,
    u32,
)> = Kernel::new("attention_spread", "attention_spread");
/// Parts of the heads, parts of sums, sums, heads.
const SUMS: Kernel<(Ptr<Parts>, Ptr<[f64; 2]>, Ptr<Ptr<f32>>, u32)> =
    Kernel::new("attention_spread", "attention_spread_sums");

/// Query rows of a block, and of a warp.
const BLOCK_ROWS: u32 = 128;
const WARP_ROWS: u32 = 32;
/// Slots that a block takes at least.
const CHUNK: u64 = 256;

/// Where the parts of a head's sums are; a twin in `kernels/attention_spread.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Parts {
    first: u64,
    count: u32,
    unused: u32,
}

/// How the pass over a part is launched, and where its parts of sums and its moments begin.
struct Pass {
    threads: u32,
    chunk: u32,
    chunks: u32,
    parts: u64,
    moments: u64,
}

pub(super) fn run(
    cuda: &Cuda,
    op: AttentionSpread,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
    sums: &mut Floats,
) -> Result<()> {
    check::attention_spread(op, layers, out, sums)?;
    let attention = WindowAttention::plain(op.window, Reduce::Mean);
    let inputs = Inputs::of(&attention, layers)?;
    let plan = Plan::new(&attention, false, &inputs.heads, cuda.driver.processors)?;

    let count = inputs.heads.len();
    let mut of_heads = vec![Parts::zeroed(); count];
    let mut passes = Vec::new();
    let (mut parts, mut moments) = (0, 0);
    for (part, segments) in plan.parts() {
        let pass = Pass::new(part, segments, cuda.driver.processors, parts, moments);
        for segment in segments {
            let count = inputs.heads[segment.row as usize].longest.div_ceil(pass.chunk);
            of_heads[segment.row as usize] = Parts { first: parts, count, unused: 0 };
            parts += u64::from(pass.chunks);
        }
        if segments.iter().any(|segment| segment.window > BLOCK_ROWS) {
            moments += u64::from(part.longest) * part.count as u64;
        }
        passes.push(pass);
    }

    let mut table = Table::default();
    let slots = inputs.into_table(&plan, &mut table);
    let of_heads = table.push(&of_heads);
    let sent = table.send(cuda)?;
    let stats = plan.stats_bytes();
    let bytes_of_parts = parts as usize * size_of::<[f64; 2]>();
    let bytes = stats + bytes_of_parts + moments as usize * size_of::<[f32; 2]>();
    let workspace = Memory::new(&cuda.driver, "sums of attention", bytes)?;
    let operands = slots.operands(&sent, out);
    window_attention::statistics(&cuda.driver, &plan, &operands, workspace.at(0))?;
    let parts = workspace.at::<[f64; 2]>(stats);
    for ((part, _), pass) in plan.parts().zip(passes) {
        let arguments = (
            operands.segments.add(part.first),
            operands.queries,
            operands.keys,
            operands.pages,
            operands.lengths,
            operands.ends,
            workspace.at(0),
            operands.out,
            parts.add(pass.parts as usize),
            workspace.at::<[f32; 2]>(stats + bytes_of_parts).add(pass.moments as usize),
            pass.chunk,
            part.longest,
            op.gamma,
            part.template.flags,
        );
        let grid = Grid::new(pass.chunks as usize, part.count, pass.threads);
        SPREAD.launch(&cuda.driver, part.template.variant, grid, arguments)?;
    }
    let grid = Grid::new(count.div_ceil(128), 1, 128);
    let arguments = (sent.at(of_heads), parts, sums.rows(), count as u32);
    SUMS.launch(&cuda.driver, "", grid, arguments)
}

impl Pass {
    fn new(part: &Part, segments: &[Segment], processors: u32, parts: u64, moments: u64) -> Self {
        let warps = |segment: &Segment| {
            let of_head = segment.window.min(BLOCK_ROWS).div_ceil(WARP_ROWS);
            (segment.group * of_head).min(BLOCK_ROWS / WARP_ROWS)
        };
        let slots = u64::from(part.longest) * part.count as u64;
        // A few blocks for each processor.
        let even = slots.div_ceil(4 * u64::from(processors)).next_multiple_of(64);
        let chunk = even.clamp(CHUNK, 1 << 30) as u32;
        Self {
            threads: segments.iter().map(warps).max().unwrap_or(1) * WARP_ROWS,
            chunk,
            chunks: part.longest.div_ceil(chunk),
            parts,
            moments,
        }
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&SPREAD).into(), (&SUMS).into()]
}
