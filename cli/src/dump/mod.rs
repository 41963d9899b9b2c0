//! Dumps: the keys, values and queries of a prefill in one safetensors file (`docs/dump-format.md`).
//!
//! A dump is read through `Read + Seek`, one layer at a time: never mapped, never loaded whole, so that
//! planning holds about one layer of a cache of any size, and a file that shrinks meanwhile is an error
//! rather than a fault. Everything is validated when the header is read, before a tensor is.

mod header;
mod tensor;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use kvbudget::backend::cpu::{HostLayer, HostSlice};
use kvbudget::{ExpectedQueries, Geometry, LayerShape, LayerView, Rows, Sequence};

pub use header::{Header, LayerTensors, TensorInfo};
pub use tensor::Tensor;

/// A dump: its validated header, and where its tensors are read from.
pub struct Dump<R> {
    source: R,
    header: Header,
}

/// The tensors of one layer, in memory.
pub struct Layer {
    shape: LayerShape,
    tokens: u32,
    /// Keys `[H, T, D]`.
    pub k: Tensor,
    /// Values `[H, T, D]`.
    pub v: Tensor,
    /// Queries `[Hq, W, D]` of the last `W` tokens.
    pub q: Tensor,
    /// Queries `[Hq, M, D]` of a probe.
    pub q_probe: Option<Tensor>,
    /// Output projection `[hidden, Hq·D]`.
    pub o_proj: Option<Tensor>,
    /// Norms `[T]` of hidden rows.
    pub hidden_norms: Option<Tensor>,
    /// Mean and covariance of the queries to come.
    pub expected: Option<ExpectedQueries>,
    /// The tokens that really followed, where they were asked for.
    pub next: Option<Next>,
}

/// Queries `[Hq, F, D]`, keys and values `[H, F, D]` of the `F` tokens after the context.
pub struct Next {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

impl Dump<File> {
    /// Opens a file and validates its header.
    pub fn open(path: &Path) -> Result<Self> {
        let named = || format!("{}", path.display());
        let file = File::open(path).with_context(named)?;
        Self::new(file).with_context(named)
    }
}

impl<R: Read + Seek> Dump<R> {
    /// Reads and validates the header.
    pub fn new(mut source: R) -> Result<Self> {
        let header = Header::read(&mut source)?;
        Ok(Self { source, header })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The cache's geometry.
    pub fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    /// The context as a sequence to plan for.
    pub fn sequence(&self) -> Sequence<'_> {
        Sequence { tokens: self.tokens(), held: None, spans: self.header.spans.as_ref() }
    }

    /// Tokens of the context.
    pub fn tokens(&self) -> u32 {
        self.header.tokens
    }

    /// Reads what planning needs of a layer; with `next`, also the tokens that followed.
    pub fn layer(&mut self, l: usize, next: bool) -> Result<Layer> {
        let info = self.header.layers[l].clone();
        let next = match (next, &info.next) {
            (true, Some([q, k, v])) => {
                Some(Next { q: self.tensor(q)?, k: self.tensor(k)?, v: self.tensor(v)? })
            }
            _ => None,
        };
        let mut optional = |info: &Option<TensorInfo>| -> Result<Option<Tensor>> {
            info.as_ref().map(|info| self.tensor(info)).transpose()
        };
        let (q_probe, o_proj) = (optional(&info.q_probe)?, optional(&info.o_proj)?);
        let hidden_norms = optional(&info.hidden_norms)?;
        let shape = self.header.geometry.layers()[l];
        let expected = match &info.expected {
            Some([mean, covariance]) => {
                let [mean, covariance] = [mean, covariance].map(|info| self.tensor(info));
                let (mean, covariance) = (mean?.to_f32(), covariance?.to_f32());
                Some(ExpectedQueries::new(shape, mean, covariance)?)
            }
            None => None,
        };
        Ok(Layer {
            shape,
            tokens: self.header.tokens,
            k: self.tensor(&info.k)?,
            v: self.tensor(&info.v)?,
            q: self.tensor(&info.q)?,
            q_probe,
            o_proj,
            hidden_norms,
            expected,
            next,
        })
    }

    /// Reads one tensor.
    pub fn tensor(&mut self, info: &TensorInfo) -> Result<Tensor> {
        let mut read = || {
            self.source.seek(SeekFrom::Start(info.start))?;
            Tensor::read(&mut self.source, info)
        };
        read().with_context(|| format!("reading tensor {:?}", info.name))
    }
}

impl Layer {
    /// The layer as the planner takes it.
    pub fn view(&self) -> kvbudget::Result<HostLayer<'_>> {
        let mut view = LayerView::new(self.shape, self.tokens, self.k.rows()?, self.v.rows()?)?
            .with_queries(self.q.rows()?)?;
        if let Some(probe) = &self.q_probe {
            view = view.with_probe(probe.rows()?)?;
        }
        if let Some(norms) = &self.hidden_norms {
            view = view.with_hidden_norms(Rows::heads_first(norms.slice(), 1, self.tokens, 1)?)?;
        }
        if let Some(expected) = &self.expected {
            view = view.with_expected(expected)?;
        }
        if let Some(o_proj) = &self.o_proj {
            let columns = (self.shape.query_heads() * self.shape.head_dim()) as u32;
            let hidden = o_proj.shape()[0];
            let o_proj = Rows::heads_first(o_proj.slice(), 1, hidden, columns)?;
            view = view.with_output_projection(o_proj)?;
        }
        Ok(view)
    }

    /// Heads and head dim.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }
}

impl Tensor {
    /// A `[heads, len, D]` tensor as rows.
    pub fn rows(&self) -> kvbudget::Result<Rows<'_, HostSlice<'_>>> {
        let [heads, len, dim] = *self.shape() else {
            return Err(kvbudget::Error::Shape {
                what: "dimensions of rows of heads",
                expected: 3,
                got: self.shape().len() as u64,
            });
        };
        Rows::heads_first(self.slice(), heads, len, dim)
    }
}
