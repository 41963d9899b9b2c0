//! Value norms of one KV head: `mean_g ‖v · W_o[g]‖₁`, with `W_o[g]` the columns of query head `g` of its group.

use super::{Float, Matrix, dot, num, sum};

/// `v` is `[T][D]`, `o_proj` is `[hidden][Hq·D]`, `query_heads` are the heads of the group.
pub fn value_norm<F: Float>(
    v: &Matrix<F>,
    o_proj: &Matrix<F>,
    query_heads: std::ops::Range<usize>,
) -> Vec<F> {
    let mut norms = Vec::new();
    for value in v {
        let d = value.len();
        let of_head = |g: usize| sum(o_proj.iter().map(|w| dot(value, &w[g * d..][..d]).abs()));
        norms.push(sum(query_heads.clone().map(of_head)) / num(query_heads.len()));
    }
    norms
}
