//! What one sequence keeps: a ragged cache per layer, and what the next compression looks at of its queries: the last ones, their mean
//! and covariance.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{HostLayer, HostSlice};
use kvbudget::cache::FlatCache;
use kvbudget::score::Queries;
use kvbudget::{Books, Geometry, LayerView, Plan, Position, Ragged, Rope, Rows, Spans};

use crate::host::Lent;
use crate::moments::Moments;

/// Slots by which a head's room grows, at least; beyond that by a quarter of the longest head.
const GROWTH: u32 = 64;

/// The cache of one sequence. Lengths are physical and differ by head; positions are logical and go on
/// counting whatever has been evicted.
pub struct SequenceCache {
    geometry: Arc<Geometry>,
    layers: Vec<FlatCache>,
    /// Queries `[n, Hq, D]` of each layer's last tokens, oldest first.
    queries: Vec<VecDeque<Tensor>>,
    keep: Queries,
    moments: Option<Moments>,
    /// Tokens seen when it was compressed last.
    compressed_at: u32,
    spans: Spans,
}

/// A point to go back to: see [`SequenceCache::mark`].
pub struct Mark {
    tokens: u32,
    compressed_at: u32,
    queries: Vec<VecDeque<Tensor>>,
    moments: Option<Moments>,
}

impl SequenceCache {
    /// An empty one that keeps the queries named.
    pub fn new(geometry: Arc<Geometry>, keep: Queries) -> Result<Self> {
        let dtype = geometry.dtype();
        let layers = geometry.layers().iter().map(|&shape| {
            let none = match dtype {
                kvbudget::Dtype::F32 => HostSlice::F32(&[]),
                kvbudget::Dtype::F16 => HostSlice::F16(&[]),
                kvbudget::Dtype::BF16 => HostSlice::BF16(&[]),
            };
            let (heads, dim) = (shape.kv_heads() as u32, shape.head_dim() as u32);
            let rows = Rows::heads_first(none, heads, 0, dim)?;
            let view = LayerView::new(shape, 0, rows, rows)?;
            FlatCache::gather(&view, &Ragged::filled(vec![0; shape.kv_heads()], Position(0)), 0)
        });
        let layers = layers.collect::<kvbudget::Result<Vec<_>>>().map_err(Error::wrap)?;
        let queries = vec![VecDeque::new(); layers.len()];
        let (moments, spans) = (None, Spans::default());
        Ok(Self { geometry, layers, queries, keep, moments, compressed_at: 0, spans })
    }

    /// Gathers the mean and covariance of all its queries but the sinks', before RoPE: `Hq·D²` numbers of 8 bytes per layer.
    pub fn with_moments(mut self, rope: Arc<Rope>) -> Self {
        self.moments = Some(Moments::new(&self.geometry, rope));
        self
    }

    /// Layers, heads and dims.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    /// Keys, values and positions, layer by layer.
    pub fn layers(&self) -> &[FlatCache] {
        &self.layers
    }
    /// Tokens that every layer has seen: the position of the next one.
    pub fn tokens(&self) -> u32 {
        self.layers.iter().map(FlatCache::tokens).min().unwrap_or(0)
    }
    /// Slots held by all heads of all layers.
    pub fn slots(&self) -> u64 {
        self.layers.iter().flat_map(FlatCache::lens).map(|&n| u64::from(n)).sum()
    }
    /// Bytes of the keys and values held.
    pub fn bytes_used(&self) -> u64 {
        self.layers.iter().map(FlatCache::bytes_used).sum()
    }
    /// Bytes of the key and value buffers, room to grow included.
    pub fn bytes_reserved(&self) -> u64 {
        self.layers.iter().map(FlatCache::bytes_reserved).sum()
    }
    /// Tokens since the last compression.
    pub fn tokens_since_compression(&self) -> u32 {
        self.tokens().saturating_sub(self.compressed_at)
    }

    /// A compressed copy: what the plan keeps, with room for `slack` more slots per head. The source stays.
    ///
    /// Errors: a plan for another geometry, or positions that are not held.
    pub fn gather(&self, plan: &Plan, slack: u32) -> kvbudget::Result<Self> {
        if plan.layers.len() != self.layers.len() {
            return Err(kvbudget::Error::Shape {
                what: "layers of the plan",
                expected: self.layers.len() as u64,
                got: plan.layers.len() as u64,
            });
        }
        let kept = self.layers.iter().zip(self.geometry.layers()).zip(&plan.layers);
        let layers = kept
            .map(|((cache, shape), kept)| FlatCache::gather(&cache.view(*shape)?, kept, slack))
            .collect::<kvbudget::Result<Vec<_>>>()?;
        let (geometry, queries) = (self.geometry.clone(), self.queries.clone());
        let (keep, moments, spans) = (self.keep, self.moments.clone(), self.spans.clone());
        let compressed_at = self.tokens();
        Ok(Self { geometry, layers, queries, keep, moments, compressed_at, spans })
    }

    /// Says what stretches of it are, for policies that protect some. They may name tokens that are still to come.
    pub fn set_spans(&mut self, spans: Spans) {
        self.spans = spans;
    }

    /// What stretches of it are.
    pub fn spans(&self) -> &Spans {
        &self.spans
    }

    /// What it holds, in positions.
    pub fn books(&self) -> Books {
        let held = self.held().map(|layers| layers.iter().map(|heads| heads.to_vec()).collect());
        Books { tokens: self.tokens(), held, spans: self.spans.clone() }
    }

    /// Remembers this point: a question and its answer may go in and be [rolled back](Self::roll_back).
    pub fn mark(&self) -> Mark {
        let (tokens, compressed_at) = (self.tokens(), self.compressed_at);
        let (queries, moments) = (self.queries.clone(), self.moments.clone());
        Mark { tokens, compressed_at, queries, moments }
    }

    /// Goes back to a mark of this sequence: tokens that came after it leave no trace but room.
    ///
    /// Errors: compressed since, when what was evicted cannot come back.
    pub fn roll_back(&mut self, mark: &Mark) -> Result<()> {
        if mark.compressed_at != self.compressed_at || mark.tokens > self.tokens() {
            bail!("expected a mark of this sequence that nothing was evicted since");
        }
        for layer in 0..self.layers.len() {
            self.truncate(layer, mark.tokens).map_err(Error::wrap)?;
        }
        self.queries.clone_from(&mark.queries);
        self.moments.clone_from(&mark.moments);
        Ok(())
    }

    /// Lends a layer with all that a scorer may ask for. A dense sequence is lent without positions.
    ///
    /// Errors: no such layer, an output projection of another shape, and those of `look`.
    pub fn with_view<R>(
        &self,
        layer: usize,
        o_proj: Option<&Tensor>,
        look: impl FnOnce(&HostLayer<'_>) -> kvbudget::Result<R>,
    ) -> Result<R> {
        if layer >= self.layers.len() {
            bail!("expected a layer below {}, got {layer}", self.layers.len());
        }
        let view = self.view(layer, self.is_dense()).map_err(Error::wrap)?;
        self.observed(layer, view, o_proj, look)
    }

    /// Keys, values and, unless the whole sequence is dense, positions of a layer.
    pub(crate) fn view(&self, layer: usize, dense: bool) -> kvbudget::Result<HostLayer<'_>> {
        let shape = self.geometry.layers()[layer];
        let view = self.layers[layer].view(shape)?;
        if dense { LayerView::new(shape, view.tokens(), *view.k(), *view.v()) } else { Ok(view) }
    }

    /// Adds the kept queries, what is expected of later ones, and the output projection to a view of a layer.
    pub(crate) fn observed<R>(
        &self,
        layer: usize,
        view: HostLayer<'_>,
        o_proj: Option<&Tensor>,
        look: impl FnOnce(&HostLayer<'_>) -> kvbudget::Result<R>,
    ) -> Result<R> {
        let pieces: Vec<&Tensor> = self.queries[layer].iter().collect();
        let queries = match (pieces.is_empty(), self.keep) {
            (false, _) => Some(Tensor::cat(&pieces, 0)?),
            (true, Queries::None) => None,
            // An empty sequence has the queries of all its tokens.
            (true, _) => {
                let shape = view.shape();
                let dims = (0, shape.query_heads(), shape.head_dim());
                Some(Tensor::zeros(dims, DType::F32, &Device::Cpu)?)
            }
        };
        let queries = queries.as_ref().map(Lent::new).transpose()?;
        let expected =
            self.moments.as_ref().map(|m| m.expected(layer, view.tokens())).transpose()?;
        let o_proj = o_proj.map(Lent::new).transpose()?;
        // From here on the view lives no longer than these loans.
        let mut view = view;
        if let Some(queries) = &queries {
            let rows = queries.all_tokens()?;
            view = view.with_queries(rows).map_err(Error::wrap)?;
        }
        if let Some(expected) = &expected {
            view = view.with_expected(expected).map_err(Error::wrap)?;
        }
        if let Some(o_proj) = &o_proj {
            view = view.with_output_projection(o_proj.matrix()?).map_err(Error::wrap)?;
        }
        look(&view).map_err(Error::wrap)
    }

    /// Positions that the heads hold, by layer; none for a dense sequence, where slot = position.
    pub(crate) fn held(&self) -> Option<Vec<&[Vec<Position>]>> {
        let held = || self.layers.iter().map(FlatCache::positions).collect();
        (!self.is_dense()).then(held)
    }

    /// Whether nothing has been evicted.
    pub fn is_dense(&self) -> bool {
        self.layers.iter().all(|cache| cache.lens().iter().all(|&n| n == cache.tokens()))
    }

    /// Makes room for `new` more slots in every head of a layer. If that took new buffers, returns the bytes of
    /// the old ones, which stood beside them for a moment.
    pub(crate) fn reserve(&mut self, layer: usize, new: u32) -> kvbudget::Result<Option<u64>> {
        let cache = &mut self.layers[layer];
        let full = |(&len, &capacity): (&u32, &u32)| capacity - len < new;
        if !cache.lens().iter().zip(cache.capacity()).any(full) {
            return Ok(None);
        }
        let replaced = cache.bytes_reserved();
        // An empty cache gets exactly what its prompt needs: it may be compressed before it grows.
        let longest = cache.lens().iter().copied().max().unwrap_or(0);
        let growth = if longest == 0 { 0 } else { GROWTH.max(longest / 4) };
        cache.repack(new.max(growth))?;
        Ok(Some(replaced))
    }

    /// Appends new tokens to a layer that has room for them.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        k: &Rows<'_, HostSlice<'_>>,
        v: &Rows<'_, HostSlice<'_>>,
    ) -> kvbudget::Result<()> {
        self.layers[layer].append(k, v)
    }

    /// Takes the tokens from `tokens` on out of a layer again.
    pub(crate) fn truncate(&mut self, layer: usize, tokens: u32) -> kvbudget::Result<()> {
        self.layers[layer].truncate(tokens)
    }

    /// Remembers the queries `[n, Hq, D]` of new tokens, as far as they are wanted: before their keys are appended.
    pub(crate) fn remember(&mut self, layer: usize, q: &Tensor) -> Result<()> {
        if let Some(moments) = &mut self.moments {
            moments.push(layer, self.layers[layer].tokens(), q)?;
        }
        let kept = &mut self.queries[layer];
        let new = q.dim(0)?;
        let wanted = match self.keep {
            Queries::None => return Ok(()),
            Queries::Last(n) => n as usize,
            Queries::All => usize::MAX,
        };
        // A copy: a view would keep the memory of the whole batch or prompt alive.
        let last = new.min(wanted);
        kept.push_back(q.narrow(0, new - last, last)?.copy()?);
        let mut held: usize = kept.iter().map(|q| q.dims()[0]).sum();
        while let Some(oldest) = kept.front().map(|q| q.dims()[0])
            && held - oldest >= wanted
        {
            kept.pop_front();
            held -= oldest;
        }
        Ok(())
    }

    /// Puts a cache that was filled elsewhere in the place of a layer's.
    pub(crate) fn put(&mut self, layer: usize, cache: FlatCache) {
        self.layers[layer] = cache;
    }

    /// Evicts all of a layer but `kept` and gives the memory back. Returns the bytes of the old buffers, as
    /// [`reserve`](Self::reserve) does.
    pub(crate) fn evict(&mut self, layer: usize, kept: &Ragged<Position>) -> kvbudget::Result<u64> {
        let cache = &mut self.layers[layer];
        cache.compact(kept)?;
        let replaced = cache.bytes_reserved();
        cache.repack(0)?;
        Ok(replaced)
    }

    /// Notes that it has just been compressed.
    pub(crate) fn compressed(&mut self) {
        self.compressed_at = self.tokens();
    }
}
