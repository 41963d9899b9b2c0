//! What is left of keys outside subspaces, and the keys that subspaces are made of.
//!
//! In: k `[H, len, D]`, orthonormal bases `[rank, D]` f32; out `[H, len]` f32. Source: GUI-KV (arXiv 2510.00536).
//!
//! The residual is formed, `k - Bᵀ(B k)`, and not taken from `‖k‖² - ‖B k‖²`: what matters is which keys have least left,
//! and there the difference cancels, to an error of `√ε ‖k‖` (3e-4 in f32, and the bases are f32) where the residual has
//! one of `ε ‖k‖`.
//!
//! Cost: one read of K and `4·rank·D` flops per slot, two products over tiles of a fixed size.

use std::ops::Range;

use rayon::prelude::*;

use super::HostLayer;
use super::tile;
use crate::backend::check;
use crate::backend::ops::Residuals;
use crate::error::Result;
use crate::ragged::Ragged;

/// Slots per task: widened, with what they become, they stay in L2.
const TILE: usize = 64;

pub(super) fn keys(slots: &[Range<u32>], layers: &[HostLayer<'_>]) -> Result<Ragged<f32>> {
    check::keys(slots, layers)?;
    let segments: Vec<_> = tile::segments(layers).zip(slots).collect();
    let read = segments.into_par_iter().map(|((layer, head), slots)| {
        let mut keys = vec![0.0; slots.len() * layer.k().dim()];
        let slots = slots.start as usize..slots.end as usize;
        tile::widen_rows(layer.k(), head, slots, &mut keys);
        keys
    });
    Ok(read.collect::<Vec<_>>().into_iter().collect())
}

pub(super) fn norms(
    op: &Residuals<'_>,
    layers: &[HostLayer<'_>],
    out: &mut Ragged<f32>,
) -> Result<()> {
    check::residual_norms(op, layers, out)?;
    let columns: Vec<Vec<f32>> = tile::segments(layers)
        .zip(op.bases.iter())
        .map(|((layer, _), basis)| transposed(basis, layer.k().dim()))
        .collect();
    let mut tasks = Vec::new();
    for (s, ((layer, head), row)) in tile::segments(layers).zip(out.rows_mut()).enumerate() {
        row.fill(f32::NEG_INFINITY);
        let (mut rest, mut at) = (row, 0);
        for range in op.slots.row(s) {
            let (start, end) = (range.start as usize, range.end as usize);
            let (measured, after) = rest[start - at..].split_at_mut(end - start);
            (rest, at) = (after, end);
            let tiles = measured.chunks_mut(TILE).enumerate();
            tasks.extend(tiles.map(|(i, out)| (s, layer, head, start + i * TILE, out)));
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (s, layer, head, at, out)| {
        let dim = layer.k().dim();
        scratch.keys.resize(out.len() * dim, 0.0);
        tile::widen_rows(layer.k(), head, at..at + out.len(), &mut scratch.keys);
        scratch.project(dim, op.bases.row(s), &columns[s]);
        let rows = scratch.keys.chunks_exact(dim).zip(scratch.inside.chunks_exact(dim));
        for ((key, inside), out) in rows.zip(out) {
            let left = key.iter().zip(inside).map(|(k, inside)| f64::from(k - inside));
            *out = -left.map(|x| x * x).sum::<f64>().sqrt() as f32;
        }
    });
    Ok(())
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    coefficients: Vec<f32>,
    /// What of the keys lies in the subspace.
    inside: Vec<f32>,
}

impl Scratch {
    fn project(&mut self, dim: usize, basis: &[f32], columns: &[f32]) {
        let Self { keys, coefficients, inside } = self;
        let (rows, rank) = (keys.len() / dim, basis.len() / dim);
        inside.clear();
        inside.resize(keys.len(), 0.0);
        if rank > 0 {
            coefficients.resize(rows * rank, 0.0);
            tile::matmul_nt(dim, keys, basis, coefficients);
            tile::matmul_nt(rank, coefficients, columns, inside);
        }
    }
}

/// `[D, rank]` of `[rank, D]`.
fn transposed(basis: &[f32], dim: usize) -> Vec<f32> {
    (0..dim).flat_map(|d| basis.iter().skip(d).step_by(dim).copied()).collect()
}
