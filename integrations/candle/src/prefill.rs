//! Attention of many new tokens by matrix products, head by head: each head has its own length, and its last
//! rows are the new tokens themselves. The core's `attend` is made for a few queries and reads keys
//! and values once for eight of them; a prompt has hundreds.

use candle_core::{Device, Result, Tensor};
use kvbudget::backend::AttendView;
use kvbudget::backend::cpu::HostSlice;
use kvbudget::{Element, Rows};

use crate::elementwise::CausalSoftmax;

/// New tokens from which matrix products win.
pub(crate) const MANY: usize = 64;
/// Queries that attend at once: bounds the score matrix, and skips most of what the future hides.
const QUERIES: usize = 256;

/// `[M, Hq, D]` for the queries of `view`.
pub(crate) fn attend(
    view: &AttendView<'_, HostSlice<'_>>,
    scale: f32,
    device: &Device,
) -> Result<Tensor> {
    let (new, dim) = (view.q.len(0), view.q.dim());
    let group = view.q.heads() / view.k.heads();
    let mut outputs = Vec::with_capacity(view.k.heads());
    for head in 0..view.k.heads() {
        let len = view.k.len(head);
        let k = Tensor::from_vec(widened(&view.k, head), (len, dim), device)?;
        let v = Tensor::from_vec(widened(&view.v, head), (len, dim), device)?;
        let mut q = Vec::with_capacity(group * new * dim);
        for query_head in head * group..(head + 1) * group {
            q.extend(widened(&view.q, query_head).iter().map(|x| x * scale));
        }
        let q = Tensor::from_vec(q, (group, new, dim), device)?;
        let mut parts = Vec::new();
        for start in (0..new).step_by(QUERIES) {
            let count = QUERIES.min(new - start);
            let seen = len - (new - start - count);
            // The heads of a group share their keys, so they go into one product.
            let q = q.narrow(1, start, count)?.reshape((group * count, dim))?;
            let weights = q.matmul(&k.narrow(0, 0, seen)?.t()?)?;
            weights.inplace_op1(&CausalSoftmax { queries: count })?;
            let part = weights.matmul(&v.narrow(0, 0, seen)?)?;
            parts.push(part.reshape((group, count, dim))?);
        }
        outputs.push(Tensor::cat(&parts, 1)?);
    }
    Tensor::cat(&outputs, 0)?.transpose(0, 1)?.contiguous()
}

/// All rows of a head in f32.
fn widened(rows: &Rows<'_, HostSlice<'_>>, head: usize) -> Vec<f32> {
    fn of<T: Element>(data: &[T], rows: &Rows<'_, HostSlice<'_>>, head: usize) -> Vec<f32> {
        let (len, dim) = (rows.len(head), rows.dim());
        let mut out = vec![0.0; len * dim];
        for (row, out) in out.chunks_exact_mut(dim).enumerate() {
            T::widen(&data[rows.start(head, row)..][..dim], out);
        }
        out
    }
    match rows.storage() {
        HostSlice::F32(data) => of(data, rows, head),
        HostSlice::F16(data) => of(data, rows, head),
        HostSlice::BF16(data) => of(data, rows, head),
    }
}
