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
    model: &'m Llama,
    tokenizer: &'m Tokenizer,
    centre: Vec<f32>,
}

impl<'m> TokenMean<'m> {
    /// As EpiCache has it.
    pub fn new(model: &'m Llama, tokenizer: &'m Tokenizer) -> Self {
        let centre = vec![0.0; model.config().hidden];
        Self { model, tokenizer, centre }
    }

    /// Less what all `texts` have in common, their mean: most of a mean of embeddings is words that any text has. A choice of this
    /// crate.
    pub fn centred(mut self, texts: &[String]) -> Result<Self> {
        let mut centre = vec![0.0; self.centre.len()];
        for text in texts {
            let mean = self.mean(text)?;
            centre.iter_mut().zip(mean).for_each(|(c, x)| *c += x / texts.len() as f32);
        }
        self.centre = centre;
        Ok(self)
    }

    fn mean(&self, text: &str) -> Result<Vec<f32>> {
        let ids = tokenizer::encode(self.tokenizer, text)?;
        ensure!(!ids.is_empty(), "a text without tokens has no embedding");
        Ok(self.model.embed(&ids)?.mean(0)?.to_vec1()?)
    }
}

impl Embedder for TokenMean<'_> {
    fn embed(&self, text: &str) -> Result<Vec<f32>> {
        let mean = self.mean(text)?;
        let apart: Vec<f32> = mean.iter().zip(&self.centre).map(|(x, c)| x - c).collect();
        let norm = apart.iter().map(|x| x * x).sum::<f32>().sqrt();
        Ok(apart.into_iter().map(|x| x / norm.max(f32::MIN_POSITIVE)).collect())
    }
}
