//! One layer of one forward pass: the new tokens, checked and lent to the core, and the attention over them.

use std::iter::repeat_n;
use std::ops::Range;

use candle_core::{Device, Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::Attend;
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{LayerShape, Ragged};

use crate::attention::Span;
use crate::host::{Lent, rows_contiguous};
use crate::prefill;

/// Queries, keys and values of one sequence, as the core attends over them.
pub(crate) type View<'a> = AttendView<'a, HostSlice<'a>>;

/// Queries, keys and values of the new tokens of one layer, `[N, heads, D]`.
pub(crate) struct Step {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: LayerShape,
}

/// The tensors of a [`Step`] on loan.
pub(crate) struct Loan<'s> {
    pub(crate) q: Lent<'s>,
    pub(crate) k: Lent<'s>,
    pub(crate) v: Lent<'s>,
}

impl Loan<'_> {
    /// The attention of new tokens to themselves alone.
    pub(crate) fn attend_view(&self, rows: &Range<usize>) -> Result<View<'_>> {
        let rows = || rows.clone();
        Ok(AttendView {
            q: self.q.tokens(rows())?,
            k: self.k.tokens(rows())?,
            v: self.v.tokens(rows())?,
        })
    }
}

impl Step {
    /// Errors: shapes other than `shape` and the spans say.
    pub(crate) fn new(shape: LayerShape, [q, k, v]: [&Tensor; 3], spans: &[Span]) -> Result<Self> {
        let tokens: usize = spans.iter().map(|s| s.tokens as usize).sum();
        if tokens == 0 {
            bail!("{} spans without tokens", spans.len());
        }
        let (query_heads, kv_heads) = (shape.query_heads(), shape.kv_heads());
        for (name, tensor, heads) in [("q", q, query_heads), ("k", k, kv_heads), ("v", v, kv_heads)]
        {
            let expected = [tokens, heads, shape.head_dim()];
            if tensor.dims() != expected {
                bail!("{name}: expected {expected:?}, got {:?}", tensor.dims());
            }
        }
        let (q, k, v) = (rows_contiguous(q)?, rows_contiguous(k)?, rows_contiguous(v)?);
        Ok(Self { q, k, v, shape })
    }

    pub(crate) fn lend(&self) -> Result<Loan<'_>> {
        let (q, k, v) = (Lent::new(&self.q)?, Lent::new(&self.k)?, Lent::new(&self.v)?);
        Ok(Loan { q, k, v })
    }

    pub(crate) fn shape(&self) -> LayerShape {
        self.shape
    }

    /// Queries of some tokens.
    pub(crate) fn queries(&self, rows: &Range<usize>) -> Result<Tensor> {
        self.q.narrow(0, rows.start, rows.len())
    }

    /// Attention of each view's queries, view after view, as `[N, Hq, D]` of the queries' dtype.
    pub(crate) fn attend(&self, cpu: &Cpu, views: &[View<'_>]) -> Result<Tensor> {
        attend(self.shape, cpu, views)?.to_dtype(self.q.dtype())
    }
}

/// Attention of each view's queries, view after view, as `[N, Hq, D]` in f32.
pub(crate) fn attend(shape: LayerShape, cpu: &Cpu, views: &[View<'_>]) -> Result<Tensor> {
    let scale = (shape.head_dim() as f32).powf(-0.5);
    let many = |view: &View<'_>| view.q.len(0) >= prefill::MANY;
    let mut parts = Vec::new();
    for views in views.chunk_by(|a, b| !many(a) && !many(b)) {
        match views {
            [prompt] if many(prompt) => {
                parts.push(prefill::attend(prompt, scale, &Device::Cpu)?);
            }
            few => attend_few(shape, cpu, few, scale, &mut parts)?,
        }
    }
    Tensor::cat(&parts, 0)
}

/// The core's attention over all views at once: a part `[M, Hq, D]` for each.
fn attend_few(
    shape: LayerShape,
    cpu: &Cpu,
    views: &[View<'_>],
    scale: f32,
    parts: &mut Vec<Tensor>,
) -> Result<()> {
    let (heads, dim) = (shape.query_heads(), shape.head_dim());
    let counts = || views.iter().map(|view| view.q.len(0));
    let mut out = Ragged::filled(counts().flat_map(|m| repeat_n(m * dim, heads)), 0.0f32);
    cpu.attend(&Attend { scale }, views, &mut out, None).map_err(Error::wrap)?;
    let mut rest = out.data();
    for m in counts() {
        let (part, later) = rest.split_at(heads * m * dim);
        rest = later;
        // Heads come first there.
        let part = Tensor::from_slice(part, (heads, m, dim), &Device::Cpu)?;
        parts.push(part.transpose(0, 1)?);
    }
    Ok(())
}

/// The rows that each span's tokens have in the tensors of a forward pass.
pub(crate) fn rows_of(spans: &[Span]) -> impl Iterator<Item = Range<usize>> {
    spans.iter().scan(0, |first, span| {
        let rows = *first..*first + span.tokens as usize;
        *first = rows.end;
        Some(rows)
    })
}
