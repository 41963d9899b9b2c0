//! Embeddings of text: what segments are clustered by and questions matched with.

use anyhow::{Result, ensure};
use tokenizers::Tokenizer;

use crate::llama::Llama;
use crate::tokenizer;

/// Turns text into a unit vector.
pub trait Embedder {
    /// The embedding of a segment.
    fn embed(&self, text: &str) -> Result<Vec<f32>>;

    /// The embedding of a question: of another kind where the encoder is asymmetric.
    fn embed_query(&self, text: &str) -> Result<Vec<f32>> {
        self.embed(text)
    }
}

/// The mean of the model's own input embeddings, normalised: at hand with any model, and by EpiCache's ablation worse than a sentence
/// encoder. That is an [`Embedder`] of the caller's.
pub struct TokenMean<'m> {
    pub model: &'m Llama,
    pub tokenizer: &'m Tokenizer,
}

impl Embedder for TokenMean<'_> {
    fn embed(&self, text: &str) -> Result<Vec<f32>> {
        let ids = tokenizer::encode(self.tokenizer, text)?;
        ensure!(!ids.is_empty(), "a text without tokens has no embedding");
        let mean = self.model.embed(&ids)?.mean(0)?.to_vec1::<f32>()?;
        let norm = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
        Ok(mean.into_iter().map(|x| x / norm.max(f32::MIN_POSITIVE)).collect())
    }
}
