//! `ν[h, t] = 1/G · Σ_g ‖v[h, t] · W_o[h·G + g]‖₂`, as `√(v · (W_oᵀ W_o) · v)` with the Gram matrices of the query heads.
//!
//! In and out: as in [`value_norm`](super::value_norm). Source: this crate; as an approximation of CriticalKV's L1 norm
//! (docs/methods.md has its error).
//!
//! Cost: `2·Hq·D²·(hidden + len)` flops, of which the part of `hidden` is paid once per projection: `D/len + D/hidden` of the L1
//! norm's. Matrices are sums over blocks of channels, each an f32 product, in f64. A square below zero,
//! which only rounding makes, counts as zero; one that is no finite number makes the norm NaN.

use rayon::prelude::*;

use super::isa::{Arithmetic, Isa, Kernel};
use super::tile;
use super::{HostLayer, HostSlice};
use crate::error::Result;
use crate::ragged::Ragged;
use crate::view::Run;

/// Slots per tile, and channels of the projection per block.
const TILE: usize = 256;
const BLOCK: usize = 256;

/// What tells projections apart: sequences of a batch share theirs.
type Key = (usize, Vec<Run>, usize, usize);

fn key(layer: &HostLayer<'_>) -> Result<Key> {
    let weights = layer.o_proj("value norms")?;
    let address = match weights.storage() {
        HostSlice::F32(data) => data.as_ptr().addr(),
        HostSlice::F16(data) => data.as_ptr().addr(),
        HostSlice::BF16(data) => data.as_ptr().addr(),
    };
    let runs = weights.runs(0, 0, weights.len(0)).collect();
    Ok((address, runs, weights.dim(), layer.shape().head_dim()))
}

pub(super) fn run(isa: Isa, layers: &[HostLayer<'_>], out: &mut Ragged<f32>) -> Result<()> {
    let (mut known, mut matrices, mut of_layers) = (Vec::new(), Vec::new(), Vec::new());
    for layer in layers {
        let key = key(layer)?;
        let at = known.iter().position(|other| *other == key).unwrap_or(known.len());
        if at == known.len() {
            known.push(key);
            let size = layer.shape().query_heads() * layer.shape().head_dim().pow(2);
            matrices.push((layer, vec![0f32; size]));
        }
        of_layers.push(at);
    }
    let heads = matrices.iter_mut().flat_map(|(layer, matrices)| {
        let size = layer.shape().head_dim().pow(2);
        matrices.chunks_exact_mut(size).enumerate().map(|(head, matrix)| (*layer, head, matrix))
    });
    heads
        .collect::<Vec<_>>()
        .into_par_iter()
        .try_for_each_init(Scratch::default, |scratch, (layer, head, matrix)| {
            scratch.gram(layer, head, matrix)
        })?;

    let of_segments = layers.iter().zip(of_layers).flat_map(|(layer, at)| {
        let group = layer.shape().group() * layer.shape().head_dim().pow(2);
        matrices[at].1.chunks_exact(group).enumerate().map(move |(head, of)| (layer, head, of))
    });
    let mut tasks = Vec::new();
    for ((layer, head, matrices), row) in of_segments.zip(out.rows_mut()) {
        for (i, out) in row.chunks_mut(TILE).enumerate() {
            tasks.push((layer, head, matrices, i * TILE, out));
        }
    }
    tasks.into_par_iter().for_each_init(
        Scratch::default,
        |scratch, (layer, head, matrices, start, out)| {
            scratch.norms(isa, layer, head, matrices, start, out);
        },
    );
    Ok(())
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    products: Vec<f32>,
    sums: Vec<f64>,
}

impl Scratch {
    /// `Wᵀ W` of a query head.
    fn gram(&mut self, layer: &HostLayer<'_>, head: usize, matrix: &mut [f32]) -> Result<()> {
        let (weights, dim) = (layer.o_proj("value norms")?, layer.shape().head_dim());
        let hidden = weights.len(0);
        self.sums.clear();
        self.sums.resize(dim * dim, 0.0);
        self.products.resize(dim * dim, 0.0);
        for from in (0..hidden).step_by(BLOCK) {
            let rows = from..hidden.min(from + BLOCK);
            self.rows.resize(rows.len() * dim, 0.0);
            tile::widen_columns(weights, 0, rows, head * dim..(head + 1) * dim, &mut self.rows);
            tile::gram(dim, &self.rows, &mut self.products);
            self.sums.iter_mut().zip(&self.products).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        matrix.iter_mut().zip(&self.sums).for_each(|(x, &sum)| *x = sum as f32);
        Ok(())
    }

    fn norms(
        &mut self,
        isa: Isa,
        layer: &HostLayer<'_>,
        head: usize,
        matrices: &[f32],
        start: usize,
        out: &mut [f32],
    ) {
        let (dim, group) = (layer.shape().head_dim(), layer.shape().group());
        self.rows.resize(out.len() * dim, 0.0);
        self.products.resize(out.len() * dim, 0.0);
        tile::widen_rows(layer.v(), head, start..start + out.len(), &mut self.rows);
        let mut sums = [0f64; TILE];
        for matrix in matrices.chunks_exact(dim * dim) {
            // It is symmetric.
            tile::matmul_nt(dim, &self.rows, matrix, &mut self.products);
            let (rows, products) = (&self.rows, &self.products);
            isa.run(Forms { dim, rows, products, sums: &mut sums });
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / group as f64) as f32);
    }
}

/// Adds `√(row · product)` to each sum.
struct Forms<'a> {
    dim: usize,
    rows: &'a [f32],
    products: &'a [f32],
    sums: &'a mut [f64],
}

impl Kernel for Forms<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { dim, rows, products, sums } = self;
        let pairs = rows.chunks_exact(dim).zip(products.chunks_exact(dim));
        for (sum, (value, product)) in sums.iter_mut().zip(pairs) {
            let square = tile::dot(value, product);
            let norm = if square.is_finite() { square.max(0.0).sqrt() } else { f32::NAN };
            *sum += f64::from(norm);
        }
    }
}
