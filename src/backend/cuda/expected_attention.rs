//! Attention of normally distributed queries: launches `kernels/expected_attention.cu`.

use super::driver::{Memory, Ptr};
use super::floats::{Slot, Table};
use super::launch::{Grid, Kernel};
use super::value_gram::{Group, make_terms, matrix_bytes, padded, rows_of};
use super::views::{HeadRows, Heads, Uniform};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::ExpectedAttention;
use crate::error::Result;

/// `expected_attention_logits_bf16_128`...: keys, pages, groups, lengths, terms, vectors, head dim, logits.
type Logits =
    (Ptr<HeadRows>, Ptr<u32>, Ptr<Group>, Ptr<u32>, Ptr<u8>, Ptr<f32>, u32, Ptr<Ptr<f32>>);
const LOGITS: Kernel<Logits> = Kernel::new("expected_attention", "expected_attention_logits");
/// Logits, groups, lengths, starts, sums.
const SUMS: Kernel<(Ptr<Ptr<f32>>, Ptr<Group>, Ptr<u32>, Ptr<u32>, Ptr<[f32; 2]>)> =
    Kernel::new("expected_attention", "expected_attention_sums");
/// Logits, groups, lengths, starts, sums, out.
type Mean = (Ptr<Ptr<f32>>, Ptr<Group>, Ptr<u32>, Ptr<u32>, Ptr<[f32; 2]>, Ptr<Ptr<f32>>);
const MEAN: Kernel<Mean> = Kernel::new("expected_attention", "expected_attention_mean");

/// Slots of a block of the mean.
const TILE: usize = 1024;

const METHOD: &str = "expected attention";

pub(super) fn run(
    cuda: &Cuda,
    op: ExpectedAttention,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::expected_attention(layers, out)?;
    let parts = Uniform::of(layers)?;
    let mut table = Table::default();
    let keys = Heads::keys(layers)?.into_table(&mut table);
    let heads = |layer: &DeviceLayer<'_>| 0..layer.shape().kv_heads();
    let starts: Vec<u32> = layers
        .iter()
        .flat_map(|layer| heads(layer).map(|h| layer.slots_before(h, op.sinks) as u32))
        .collect();
    let starts = table.push(&starts);
    let queries = parts
        .iter()
        .map(|part| Queries::push(&layers[part.layers.clone()], part.dim, &mut table))
        .collect::<Result<Vec<_>>>()?;
    let sent = table.send(cuda)?;

    for (part, queries) in parts.into_iter().zip(queries) {
        let Uniform { dtype, dim, segments, .. } = part;
        let (first, count) = (segments.start, segments.len());
        let logits = Floats::new(cuda, &queries.lens)?;
        let all = queries.lens.len();
        let sums = all * matrix_bytes(dim);
        let what = "expected queries";
        let workspace = Memory::new(&cuda.driver, what, sums + all * size_of::<[f32; 2]>())?;
        make_terms(cuda, sent.at(queries.matrices), 1, all, dim, workspace.at(0))?;

        let (groups, starts) = (sent.at(queries.groups), sent.at(starts).add(first));
        let (rows, lengths) = (out.rows().add(first), out.lengths().add(first));
        let longest = queries.lens.iter().copied().max().unwrap_or(0) as usize;
        let variant = format!("{dtype}_{}", if dim <= 128 { 128 } else { 256 });
        let grid = Grid::new(longest.div_ceil(rows_of(&variant)), count, 256);
        let arguments = (
            sent.at(keys.rows).add(first),
            sent.at(keys.pages),
            groups,
            lengths,
            workspace.at(0),
            sent.at(queries.vectors),
            dim as u32,
            logits.rows(),
        );
        LOGITS.launch(&cuda.driver, &variant, grid, arguments)?;
        let sums = workspace.at(sums);
        let arguments = (logits.rows(), groups, lengths, starts, sums);
        SUMS.launch(&cuda.driver, "", Grid::new(queries.largest, count, 512), arguments)?;
        let grid = Grid::new(longest.div_ceil(TILE), count, 256);
        MEAN.launch(&cuda.driver, "", grid, (logits.rows(), groups, lengths, starts, sums, rows))?;
    }
    Ok(())
}

/// What is expected of the queries of some layers, on its way to the device.
struct Queries {
    groups: Slot<Group>,
    /// Query heads of the largest group.
    largest: usize,
    /// `Σ / (2D)`, padded.
    matrices: Slot<f32>,
    /// `μ / √D`.
    vectors: Slot<f32>,
    /// Slots of each query head.
    lens: Vec<u32>,
}

impl Queries {
    /// Of layers of one head dim.
    fn push(layers: &[DeviceLayer<'_>], dim: usize, table: &mut Table) -> Result<Self> {
        let (linear, square) = (1.0 / (dim as f32).sqrt(), 0.5 / dim as f32);
        let (mut groups, mut lens) = (Vec::new(), Vec::new());
        let (mut matrices, mut vectors) = (Vec::new(), Vec::new());
        for layer in layers {
            let (expected, group) = (layer.expected(METHOD)?, layer.shape().group());
            for head in 0..layer.shape().kv_heads() {
                let (first, row) = (lens.len() as u32, groups.len() as u32);
                groups.push(Group { first, heads: group as u32, row });
                for query_head in head * group..(head + 1) * group {
                    lens.push(layer.k().len(head) as u32);
                    vectors.extend(expected.mean(query_head).iter().map(|x| x * linear));
                    for row in expected.covariance(query_head).chunks_exact(dim) {
                        matrices.extend(row.iter().map(|x| x * square));
                        matrices.resize(matrices.len().next_multiple_of(padded(dim)), 0.0);
                    }
                    let size = padded(dim).pow(2);
                    matrices.resize(matrices.len().next_multiple_of(size), 0.0);
                }
            }
        }
        let largest = groups.iter().map(|group| group.heads as usize).max().unwrap_or(0);
        let (groups, matrices) = (table.push(&groups), table.push(&matrices));
        Ok(Self { groups, largest, matrices, vectors: table.push(&vectors), lens })
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&LOGITS).into(), (&SUMS).into(), (&MEAN).into()]
}
