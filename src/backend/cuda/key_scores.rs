//! Scores that look at keys alone, or at positions alone, and plain norms of values: launches `kernels/key_scores.cu`.

use super::driver::{Memory, Ptr};
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads, Positions, Uniform};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Positional;
use crate::error::Result;

/// `key_norm_T`: out, lengths, heads, pages, chunks of a row, sign.
const KEY_NORM: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<HeadRows>, Ptr<u32>, u32, f32)> =
    Kernel::new("key_scores", "key_norm");
/// `key_cosine_T`: out, lengths, heads, pages, chunks of a key, anchors.
const KEY_COSINE: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<HeadRows>, Ptr<u32>, u32, Ptr<f32>)> =
    Kernel::new("key_scores", "key_cosine");
/// `unit_keys_T_D`: lengths, heads, pages, chunks of a key, partial sums, arrivals, anchors.
type UnitKeys = (Ptr<u32>, Ptr<HeadRows>, Ptr<u32>, u32, Ptr<f64>, Ptr<u32>, Ptr<f32>);
const UNIT_KEYS: Kernel<UnitKeys> = Kernel::new("key_scores", "unit_keys");
/// Out, lengths, where each row's positions start, positions.
const RECENCY: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<i64>, Ptr<u32>)> =
    Kernel::new("key_scores", "recency");
/// Out, lengths, where each row's positions start, positions, key of each row.
const RANDOM: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<i64>, Ptr<u32>, Ptr<u64>)> =
    Kernel::new("key_scores", "random");

/// Slots of a block: of the scores of keys, of the sums of unit keys, of the scores of positions.
const SCORE_ROWS: u32 = 128;
const SUM_ROWS: u32 = 256;
const TILE: u32 = 1024;
const THREADS: u32 = 256;

pub(super) fn key_norm(cuda: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::segments(layers, out)?;
    norms(cuda, layers, Heads::keys(layers)?, -1.0, out)
}

/// `‖v‖₂` per slot, into rows that have been checked.
pub(super) fn value_norm(cuda: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    norms(cuda, layers, Heads::values(layers)?, 1.0, out)
}

/// Lengths, times a sign, of the keys or values of the layers.
fn norms(
    cuda: &Cuda,
    layers: &[DeviceLayer<'_>],
    rows: Heads,
    sign: f32,
    out: &mut Floats,
) -> Result<()> {
    let parts = Uniform::of(layers)?;
    let mut table = Table::default();
    let rows = rows.into_table(&mut table);
    let sent = table.send(cuda)?;
    for Uniform { dtype, chunks, segments, .. } in parts {
        let first = segments.start;
        let grid = grid(out, SCORE_ROWS, segments.len());
        let (heads, pages) = (sent.at(rows.rows).add(first), sent.at(rows.pages));
        let (out, lengths) = (out.rows().add(first), out.lengths().add(first));
        let arguments = (out, lengths, heads, pages, chunks, sign);
        KEY_NORM.launch(&cuda.driver, dtype, grid, arguments)?;
    }
    Ok(())
}

pub(super) fn key_diff(cuda: &Cuda, layers: &[DeviceLayer<'_>], out: &mut Floats) -> Result<()> {
    check::segments(layers, out)?;
    let parts = Uniform::of(layers)?;
    let mut table = Table::default();
    let keys = Heads::keys(layers)?.into_table(&mut table);
    let sent = table.send(cuda)?;
    for Uniform { dtype, chunks, dim, segments, .. } in parts {
        let (first, count) = (segments.start, segments.len());
        let sums = grid(out, SUM_ROWS, count);
        let partials = sums.blocks.0 as usize * count * dim * size_of::<f64>();
        let anchors = partials + count * size_of::<u32>();
        let bytes = anchors + count * dim * size_of::<f32>();
        let memory = Memory::new(&cuda.driver, "sums of unit keys", bytes)?;
        memory.clear(partials, anchors - partials)?;

        let (rows, lengths) = (out.rows().add(first), out.lengths().add(first));
        let (heads, pages) = (sent.at(keys.rows).add(first), sent.at(keys.pages));
        let room = if dim <= 128 { 128 } else { 256 };
        let anchor = memory.at(anchors);
        let arguments = (lengths, heads, pages, chunks, memory.at(0), memory.at(partials), anchor);
        UNIT_KEYS.launch(&cuda.driver, &format!("{dtype}_{room}"), sums, arguments)?;
        let arguments = (rows, lengths, heads, pages, chunks, anchor);
        KEY_COSINE.launch(&cuda.driver, dtype, grid(out, SCORE_ROWS, count), arguments)?;
    }
    Ok(())
}

pub(super) fn positional(
    cuda: &Cuda,
    op: Positional,
    layers: &[DeviceLayer<'_>],
    out: &mut Floats,
) -> Result<()> {
    check::segments(layers, out)?;
    let mut table = Table::default();
    let positions = Positions::new(layers).into_table(&mut table);
    let keys = match op {
        Positional::Recency => Vec::new(),
        Positional::Random { seed, layer } => {
            let heads = layers.iter().flat_map(|layer| 0..layer.shape().kv_heads() as u64);
            heads.map(|head| mix(mix(seed) ^ (u64::from(layer) << 32 | head))).collect()
        }
    };
    let keys = table.push(&keys);
    let sent = table.send(cuda)?;
    let (starts, positions) = (sent.at(positions.starts), sent.at(positions.all));
    let (rows, lengths, grid) = (out.rows(), out.lengths(), grid(out, TILE, out.lens().len()));
    match op {
        Positional::Recency => {
            RECENCY.launch(&cuda.driver, "", grid, (rows, lengths, starts, positions))
        }
        Positional::Random { .. } => {
            let arguments = (rows, lengths, starts, positions, sent.at(keys));
            RANDOM.launch(&cuda.driver, "", grid, arguments)
        }
    }
}

fn grid(out: &Floats, slots: u32, segments: usize) -> Grid {
    Grid::new(out.longest().div_ceil(slots) as usize, segments, THREADS)
}

/// One step of SplitMix64; its twin is in `kernels/key_scores.cu`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![
        (&KEY_NORM).into(),
        (&KEY_COSINE).into(),
        (&UNIT_KEYS).into(),
        (&RECENCY).into(),
        (&RANDOM).into(),
    ]
}
