//! Mean and covariance of a sequence's queries, gathered as they come: what the core's ExpectedAttention asks for.
//!
//! The hook sees queries after RoPE; the core turns them back. The first tokens are left out: their queries are outliers.

use std::sync::Arc;

use candle_core::{Error, Result, Tensor};
use kvbudget::score::Expected;
use kvbudget::{ExpectedQueries, Geometry, QueryMoments, Rope};

use crate::host::Lent;

/// One set of moments per layer. Copies share what neither has added to.
#[derive(Clone)]
pub(crate) struct Moments {
    rope: Arc<Rope>,
    layers: Vec<Arc<QueryMoments>>,
}

impl Moments {
    pub(crate) fn new(geometry: &Geometry, rope: Arc<Rope>) -> Self {
        let of_layer = |&shape| Arc::new(QueryMoments::new(shape));
        Self { rope, layers: geometry.layers().iter().map(of_layer).collect() }
    }

    /// Adds the queries `[n, Hq, D]` of the tokens from position `first` on.
    pub(crate) fn push(&mut self, layer: usize, first: u32, q: &Tensor) -> Result<()> {
        push(Arc::make_mut(&mut self.layers[layer]), &self.rope, first, q)
    }

    /// What is to be expected of the queries behind `tokens` tokens.
    pub(crate) fn expected(&self, layer: usize, tokens: u32) -> Result<ExpectedQueries> {
        let positions = tokens..tokens.saturating_add(QueryMoments::FUTURE);
        self.layers[layer].expected(&self.rope, positions).map_err(Error::wrap)
    }
}

/// Adds the queries `[n, Hq, D]` of the tokens from position `first` on, but those of sinks.
pub(crate) fn push(moments: &mut QueryMoments, rope: &Rope, first: u32, q: &Tensor) -> Result<()> {
    let new = q.dim(0)?;
    let skipped = Expected::default().sinks.saturating_sub(first).min(new as u32);
    let lent = Lent::new(q)?;
    let rows = lent.tokens(skipped as usize..new)?;
    moments.push_rotated(&rows, rope, first + skipped).map_err(Error::wrap)
}
