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

/// The query heads of a segment. The twin of `Group`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Group {
    /// First of their matrices, and how many.
    first: u32,
    heads: u32,
    /// Row of the norms.
    row: u32,
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
        let side = dim.div_ceil(32) * 2;
        let blocks = side * (side + 1) / 2;

        let mut table = Table::default();
        let values = self.values.into_table(&mut table);
        let (groups, columns) = (table.push(&self.groups), table.push(&self.columns));
        let sent = table.send(cuda)?;
        let terms = parts * heads * (tiles * TILE).pow(2) * size_of::<f32>();
        let workspace = Memory::new(&cuda.driver, "Gram matrices", terms + heads * blocks * BLOCK)?;
        let (terms, dim) = (workspace.at(terms), dim as u32);

        let mut grid = Grid::new(pairs, heads, 64);
        grid.blocks.2 = parts as u32;
        SUMS.launch(&cuda.driver, dtype, grid, (sent.at(columns), dim, workspace.at(0)))?;
        let grid = Grid::new(blocks.div_ceil(8), heads, 256);
        TERMS.launch(&cuda.driver, "", grid, (workspace.at(0), parts as u32, dim, terms))?;
        let variant = format!("{dtype}_{template}");
        let rows = if variant == "bf16_128" { 256 } else { 128 };
        let grid = Grid::new(self.longest.div_ceil(rows), self.groups.len(), 256);
        let arguments = (
            sent.at(values.rows),
            sent.at(values.pages),
            sent.at(groups),
            out.lengths(),
            terms,
            dim,
            out.rows(),
        );
        VALUE_GRAM.launch(&cuda.driver, &variant, grid, arguments)
    }
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&SUMS).into(), (&TERMS).into(), (&VALUE_GRAM).into()]
}
