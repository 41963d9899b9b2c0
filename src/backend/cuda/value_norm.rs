//! Value norms through the output projection: launches `kernels/value_norm.cu`; [`gram`] has the L2 norm.

use std::collections::BTreeMap;

use bytemuck::{Pod, Zeroable};

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads};
use super::{Cuda, DeviceLayer, Floats, check, key_scores, value_gram as gram};
use crate::backend::ops::ValueNorm;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// `value_norm_f32`, `value_norm_bf16_128`...: values, pages, projections, lengths, norms, partials, arrivals.
type Arguments =
    (Ptr<HeadRows>, Ptr<u32>, Ptr<Projection>, Ptr<u32>, Ptr<Ptr<f32>>, Ptr<f64>, Ptr<u32>);
const VALUE_NORM: Kernel<Arguments> = Kernel::new("value_norm", "value_norm");
/// Head dims of the kernels with tensor cores; smaller ones run in the next.
const DIMS: [usize; 4] = [64, 96, 128, 256];
const THREADS: u32 = 256;
/// Channels of the output that a split takes at least.
const BLOCK: usize = 256;

/// The columns of one segment's query heads. The twin of `Projection` in `kernels/value_norm.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Projection {
    /// First column of the first query head.
    weights: u64,
    /// Bytes from a channel to the next.
    stride: i64,
    hidden: u32,
    group: u32,
    dim: u32,
    /// Row of the norms.
    row: u32,
}

/// The segments of one launch: of one dtype, and of head dims that share a kernel.
#[derive(Default)]
struct Launch {
    values: Heads,
    projections: Vec<Projection>,
    longest: usize,
}

pub(super) fn run(
    cuda: &Cuda,
    op: ValueNorm,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::segments(layers, out)?;
    match op {
        ValueNorm::L1 => l1(cuda, layers, out),
        ValueNorm::L2 => gram::l2(cuda, layers, out),
        ValueNorm::Plain => key_scores::value_norm(cuda, layers, out),
    }
}

fn l1(cuda: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    let mut launches = BTreeMap::<String, Launch>::new();
    let mut row = 0;
    for layer in layers {
        let launch = launches.entry(variant(layer)?).or_default();
        launch.values.push("values", layer.v())?;
        for head in 0..layer.shape().kv_heads() {
            launch.projections.push(projection(layer, head, row)?);
            launch.longest = launch.longest.max(layer.v().len(head));
            row += 1;
        }
    }
    launches.into_iter().try_for_each(|(variant, launch)| launch.run(cuda, &variant, out))
}

/// The kernel for a layer.
fn variant(layer: &DeviceLayer<'_>) -> Result<String> {
    let (dtype, template) = kind(layer, &DIMS)?;
    Ok(if dtype == "f32" { dtype.to_owned() } else { format!("{dtype}_{template}") })
}

/// Type of the values and of the output projection, and the first of `dims` that is no less than theirs.
pub(super) fn kind(layer: &DeviceLayer<'_>, dims: &[usize]) -> Result<(&'static str, usize)> {
    let (dtype, dim) = (layer.v().dtype(), layer.shape().head_dim());
    let got = layer.o_proj("value norms")?.dtype();
    if got != dtype {
        return Err(Error::Dtype { what: "output projection", expected: dtype, got });
    }
    let limit = dims[dims.len() - 1];
    let Some(&template) = dims.iter().find(|&&d| dim <= d) else {
        let (got, limit) = (dim as u64, limit as u64);
        return Err(Error::TooLarge { what: "head dim on CUDA", got, limit });
    };
    let name = match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::BF16 => "bf16",
    };
    Ok((name, template))
}

/// An output projection: address of its first element, bytes from a channel to the next, channels.
pub(super) fn weights(layer: &DeviceLayer<'_>) -> Result<(u64, i64, u32)> {
    let weights = layer.o_proj("value norms")?;
    let (hidden, size) = (weights.len(0), weights.dtype().size() as u64);
    let mut runs = weights.runs(0, 0, hidden);
    let (start, stride) = match (runs.next(), runs.next()) {
        (None, _) => (0, 0),
        (Some(run), None) => (run.start, run.stride),
        _ => {
            let why = "its rows must lie at one stride";
            return Err(Error::Unsupported { what: "an output projection in pages", why });
        }
    };
    let (start, stride) = (weights.storage().address() + start as u64 * size, stride as u64 * size);
    for got in [start, stride] {
        if !got.is_multiple_of(16) {
            return Err(Error::Misaligned { what: "output projection", got, expected: 16 });
        }
    }
    Ok((start, stride as i64, hidden as u32))
}

fn projection(layer: &DeviceLayer<'_>, head: usize, row: u32) -> Result<Projection> {
    let (start, stride, hidden) = weights(layer)?;
    let (group, dim) = (layer.shape().group(), layer.shape().head_dim());
    let before = head * group * dim * layer.v().dtype().size();
    Ok(Projection {
        weights: start + before as u64,
        stride,
        hidden,
        group: group as u32,
        dim: dim as u32,
        row,
    })
}

impl Launch {
    fn run(self, cuda: &Cuda, variant: &str, out: &Floats) -> Result<()> {
        let rows = if variant == "f32" { 128 } else { 256 };
        let (chunks, segments) = (self.longest.div_ceil(rows), self.projections.len());
        // Two blocks fit on a multiprocessor. Where there are fewer, they share the channels of a chunk.
        let blocks = |p: &Projection| p.group as usize * (p.hidden as usize).div_ceil(BLOCK);
        let work = self.projections.iter().map(blocks).max().unwrap_or(0);
        let room = 2 * cuda.driver.processors as usize / (chunks * segments).max(1);
        let splits = room.min(work).max(1);

        let mut table = Table::default();
        let values = self.values.into_table(&mut table);
        let projections = table.push(&self.projections);
        let sent = table.send(cuda)?;
        let shared = if splits > 1 { chunks * segments } else { 0 };
        let arrivals = shared * splits * rows * size_of::<f64>();
        let what = "partial value norms";
        let workspace = Memory::new(&cuda.driver, what, arrivals + shared * size_of::<u32>())?;
        workspace.clear(arrivals, shared * size_of::<u32>())?;
        let mut grid = Grid::new(chunks, segments, THREADS);
        grid.blocks.2 = splits as u32;
        let arguments = (
            sent.at(values.rows),
            sent.at(values.pages),
            sent.at(projections),
            out.lengths(),
            out.rows(),
            workspace.at(0),
            workspace.at(arrivals),
        );
        VALUE_NORM.launch(&cuda.driver, variant, grid, arguments)
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&VALUE_NORM).into()]
}
