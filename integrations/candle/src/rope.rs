//! Rotary embeddings of tokens whose positions need not be consecutive: rows of different sequences lie back to
//! back, and logical positions go on counting when slots are evicted.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::attention::Span;

/// Cosines and sines `[context, D / 2]` of every position.
pub(crate) struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Angles are computed in f64, since f32 angles are off at far positions.
    pub(crate) fn new(
        head_dim: usize,
        base: f64,
        context: usize,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let half = head_dim / 2;
        let angle = |position: usize, pair: usize| {
            position as f64 * base.powf(-(pair as f64) / half as f64)
        };
        let table = |f: fn(f64) -> f64| {
            let rows =
                (0..context).flat_map(|t| (0..half).map(move |pair| f(angle(t, pair)) as f32));
            Tensor::from_vec(rows.collect(), (context, half), device)?.to_dtype(dtype)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// Cosines and sines `[N, 1, D / 2]` of the spans' tokens: candle's `rope` then takes `[N, heads, 1, D]`.
    ///
    /// Errors: another number of tokens than `new`, none, or positions beyond the context.
    pub(crate) fn at(&self, new: usize, spans: &[Span]) -> Result<(Tensor, Tensor)> {
        let context = self.cos.dim(0)?;
        let mut positions = Vec::with_capacity(new);
        for &Span { position, tokens } in spans {
            let end = u64::from(position) + u64::from(tokens);
            if end > context as u64 {
                bail!("{end} tokens exceed the model's context of {context}");
            }
            positions.extend(position..end as u32);
        }
        if new == 0 || positions.len() != new {
            bail!("expected the {} tokens of {} spans, got {new}", positions.len(), spans.len());
        }
        let positions = Tensor::new(positions, self.cos.device())?;
        let rows = |table: &Tensor| table.index_select(&positions, 0)?.unsqueeze(1);
        Ok((rows(&self.cos)?, rows(&self.sin)?))
    }
}
