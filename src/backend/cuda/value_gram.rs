//! L2 value norms through Gram matrices: launches `kernels/value_gram.cu`.

use std::collections::BTreeMap;

use bytemuck::{Pod, Zeroable};

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::value_norm::{kind, weights};
use super::views::{HeadRows, Heads};
use super::{Cuda, DeviceLayer, Floats};
use crate::error::Result;

/// `value_gram_sums_bf16`...: columns, head dim, sums.
const SUMS: Kernel<(Ptr<Columns>, u32, Ptr<f32>)> = Kernel::new("value_gram", "value_gram_sums");
/// Sums, parts, head dim, terms.
const TERMS: Kernel<(Ptr<f32>, u32, u32, Ptr<u8>)> = Kernel::new("value_gram", "value_gram_terms");
/// `value_gram_bf16_128`...: values, pages, groups, lengths, terms, head dim, norms.
type Arguments = (Ptr<HeadRows>, Ptr<u32>, Ptr<Group>, Ptr<u32>, Ptr<u8>, u32, Ptr<Ptr<f32>>);
const VALUE_GRAM: Kernel<Arguments> = Kernel::new("value_gram", "value_gram");
/// Head dims of the templates; others run in the next.
const DIMS: [usize; 2] = [128, 256];
/// Side of the tiles of the sums.
const TILE: usize = 64;
/// Channels that a part takes at least.
const CHANNELS: usize = 256;
/// Bytes of a 16 x 16 block of a matrix: three bf16 terms.
const BLOCK: usize = 3 * 16 * 16 * 2;

/// Bytes of a matrix in three bf16 terms.
pub(super) fn matrix_bytes(dim: usize) -> usize {
    blocks(dim) * BLOCK
}

/// Blocks of a matrix on and above its diagonal.
fn blocks(dim: usize) -> usize {
    let side = dim.div_ceil(32) * 2;
    side * (side + 1) / 2
}

/// Side of a matrix of sums, of which the tiles on and above the diagonal are read.
pub(super) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(TILE)
}

/// Adds up the `parts` of the sums of so many matrices, into terms.
pub(super) fn make_terms(
    cuda: &Cuda,
    sums: Ptr<f32>,
    parts: usize,
    matrices: usize,
    dim: usize,
    terms: Ptr<u8>,
) -> Result<()> {
    let grid = Grid::new(blocks(dim).div_ceil(8), matrices, 256);
    TERMS.launch(&cuda.driver, "", grid, (sums, parts as u32, dim as u32, terms))
}

/// Rows of a block.
pub(super) fn rows_of(variant: &str) -> usize {
    if variant == "bf16_128" { 256 } else { 128 }
}

/// A query head's columns. The twin of `Columns` in `kernels/value_gram.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Columns {
    /// First column.
    weights: u64,
    /// Bytes from a channel to the next.
    stride: i64,
    hidden: u32,
    unused: u32,
}

/// The query heads of a segment. The twin of `Group` in `kernels/quadratic.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Group {
    /// First of their matrices, and how many.
    pub first: u32,
    pub heads: u32,
    /// Row of the results.
    pub row: u32,
}

/// The segments of one launch: of one dtype and head dim.
#[derive(Default)]
struct Launch {
    values: Heads,
    groups: Vec<Group>,
    longest: usize,
    /// Query heads, of each projection once: sequences share their model's.
    columns: Vec<Columns>,
    /// First query head of each projection: address, stride, channels, heads.
    known: BTreeMap<(u64, i64, u32, usize), u32>,
}

pub(super) fn l2(cuda: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    let mut launches = BTreeMap::<_, Launch>::new();
    let mut row = 0;
    for layer in layers {
        let (dtype, template) = kind(layer, &DIMS)?;
        let key = (dtype, template, layer.shape().head_dim());
        launches.entry(key).or_default().push(layer, row)?;
        row += layer.shape().kv_heads() as u32;
    }
    launches.into_iter().try_for_each(|((dtype, template, dim), launch)| {
        launch.run(cuda, dtype, template, dim, out)
    })
}

impl Launch {
    fn push(&mut self, layer: &DeviceLayer<'_>, row: u32) -> Result<()> {
        let (start, stride, hidden) = weights(layer)?;
        self.values.push("values", layer.v())?;
        let (shape, columns) = (layer.shape(), &mut self.columns);
        let bytes = (shape.head_dim() * layer.v().dtype().size()) as u64;
        let first =
            *self.known.entry((start, stride, hidden, shape.query_heads())).or_insert_with(|| {
                let first = columns.len() as u32;
                columns.extend((0..shape.query_heads() as u64).map(|head| Columns {
                    weights: start + head * bytes,
                    stride,
                    hidden,
                    unused: 0,
                }));
                first
            });
        let heads = shape.group() as u32;
        for head in 0..shape.kv_heads() {
            let before = head as u32;
            self.groups.push(Group { first: first + before * heads, heads, row: row + before });
            self.longest = self.longest.max(layer.v().len(head));
        }
        Ok(())
    }

    fn run(
        self,
        cuda: &Cuda,
        dtype: &str,
        template: usize,
        dim: usize,
        out: &Floats,
    ) -> Result<()> {
        let heads = self.columns.len();
        let tiles = dim.div_ceil(TILE);
        let pairs = tiles * (tiles + 1) / 2;
        // Blocks of two warps: where there are few, they share the channels.
        let channels = self.columns.iter().map(|c| c.hidden as usize).max().unwrap_or(0);
        let room = 8 * cuda.driver.processors as usize / (pairs * heads).max(1);
        let parts = room.min(channels.div_ceil(CHANNELS)).max(1);

        let mut table = Table::default();
        let values = self.values.into_table(&mut table);
        let (groups, columns) = (table.push(&self.groups), table.push(&self.columns));
        let sent = table.send(cuda)?;
        let terms = parts * heads * padded(dim).pow(2) * size_of::<f32>();
        let bytes = terms + heads * matrix_bytes(dim);
        let workspace = Memory::new(&cuda.driver, "Gram matrices", bytes)?;
        let terms = workspace.at(terms);

        let mut grid = Grid::new(pairs, heads, 64);
        grid.blocks.2 = parts as u32;
        let arguments = (sent.at(columns), dim as u32, workspace.at(0));
        SUMS.launch(&cuda.driver, dtype, grid, arguments)?;
        make_terms(cuda, workspace.at(0), parts, heads, dim, terms)?;
        let variant = format!("{dtype}_{template}");
        let rows = rows_of(&variant);
        let grid = Grid::new(self.longest.div_ceil(rows), self.groups.len(), 256);
        let arguments = (
            sent.at(values.rows),
            sent.at(values.pages),
            sent.at(groups),
            out.lengths(),
            terms,
            dim as u32,
            out.rows(),
        );
        VALUE_GRAM.launch(&cuda.driver, &variant, grid, arguments)
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&SUMS).into(), (&TERMS).into(), (&VALUE_GRAM).into()]
}
