//! Layers whose attention goes both ways, and the few operations on rows that caching them takes.

use candle_core::{DType, Error, Result, Tensor};
use kvbudget::backend::AttendView;
use kvbudget::backend::cpu::{Cpu, HostLayer};
use kvbudget::{LayerShape, LayerView};

use crate::host::{Lent, rows_contiguous};
use crate::qwen3::{Layer, Turns};
use crate::step;

/// One layer, run over rows that see each other and nothing else.
pub(super) struct Pass {
    /// `[N, Hq, D]`
    pub(super) q: Tensor,
    /// `[N, H, D]`
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    /// What attention and then the MLP add to the rows, `[N, hidden]`.
    pub(super) attention: Tensor,
    pub(super) mlp: Tensor,
}

impl Pass {
    pub(super) fn run(
        layer: &Layer,
        shape: LayerShape,
        cpu: &Cpu,
        x: &Tensor,
        turns: &Turns,
    ) -> Result<Self> {
        let normed = layer.normed(x)?;
        let ((q, k), v) = (layer.queries_and_keys(&normed, turns)?, layer.values(&normed)?);
        let attended = lend(shape, &k, &v, |view| attend(cpu, &view, &q))?;
        let attention = layer.attention(&attended)?;
        let mlp = layer.mlp(&(x + &attention)?)?;
        Ok(Self { q, k, v, attention, mlp })
    }
}

/// Lends keys and values `[N, H, D]` of all tokens of a sequence.
pub(super) fn lend<R>(
    shape: LayerShape,
    k: &Tensor,
    v: &Tensor,
    look: impl FnOnce(HostLayer<'_>) -> Result<R>,
) -> Result<R> {
    let (lent_k, lent_v) = (Lent::new(k)?, Lent::new(v)?);
    let (rows_k, rows_v) = (lent_k.all_tokens()?, lent_v.all_tokens()?);
    look(LayerView::new(shape, k.dim(0)? as u32, rows_k, rows_v).map_err(Error::wrap)?)
}

/// Attention `[N, Hq, D]` of queries that each see every slot: the core's attention is causal among the queries of a sequence, so
/// each is a sequence of its own here.
pub(super) fn attend(cpu: &Cpu, layer: &HostLayer<'_>, q: &Tensor) -> Result<Tensor> {
    let q = rows_contiguous(q)?;
    let lent = Lent::new(&q)?;
    let view = |row| Ok(AttendView { q: lent.tokens(row..row + 1)?, k: *layer.k(), v: *layer.v() });
    let views = (0..q.dim(0)?).map(view).collect::<Result<Vec<_>>>()?;
    step::attend(layer.shape(), cpu, &views)?.to_dtype(q.dtype())
}

/// Cosine of each row of `a` with that of `b`; NaN for rows of nothing.
pub(super) fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    let flat = |x: &Tensor| x.flatten_from(1)?.to_dtype(DType::F64);
    let (a, b) = (flat(a)?, flat(b)?);
    let dots = |a: &Tensor, b: &Tensor| (a * b)?.sum(1);
    (dots(&a, &b)? / (dots(&a, &a)? * dots(&b, &b)?)?.sqrt()?)?.to_vec1()
}

/// `old` with the rows `new` in the places `rows`.
pub(super) fn replaced(old: &Tensor, new: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let len = old.dim(0)? as u32;
    let mut places: Vec<u32> = (0..len).collect();
    for (place, &row) in (len..).zip(rows) {
        places[row as usize] = place;
    }
    Tensor::cat(&[old, new], 0)?.index_select(&Tensor::new(places, old.device())?, 0)
}
