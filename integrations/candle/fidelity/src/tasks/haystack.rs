//! Text in which facts are hidden: prose, one half of a book cut into sentences, or a few sentences repeated.
//!
//! Even seeds read the first half of the book, odd ones the second: what is tuned on even seeds is
//! tested on text not seen.

use anyhow::{Result, bail};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::prose;

type Count = dyn Fn(&str) -> Result<usize>;

/// A half of the book, and the measure of lengths.
pub struct Haystack {
    sentences: Vec<Sentence>,
    count: Box<Count>,
}

#[derive(Clone)]
struct Sentence {
    text: String,
    tokens: usize,
}

impl Haystack {
    /// The half of the book that belongs to `seed`, with tokens as `count` counts them.
    pub fn new(seed: u64, count: impl Fn(&str) -> Result<usize> + 'static) -> Result<Self> {
        let mut haystack = Self { sentences: Vec::new(), count: Box::new(count) };
        // Verse, rows of stars and headings are no sentences.
        let is_prose = |text: &&str| !text.starts_with(' ') && !text.starts_with("CHAPTER");
        for paragraph in prose::half(seed).split("\n\n").filter(is_prose) {
            for text in paragraph.split_inclusive(ENDS) {
                let sentence = haystack.sentence(text)?;
                haystack.sentences.push(sentence);
            }
        }
        Ok(haystack)
    }

    /// Consecutive sentences of the book with `facts` between them: at most `length` tokens in all.
    pub fn hide(&self, rng: &mut ChaCha8Rng, facts: &[String], length: usize) -> Result<String> {
        let start = rng.random_range(0..self.sentences.len());
        self.bury(rng, facts, length, self.sentences.iter().cycle().skip(start))
    }

    /// The same with `noise`, again and again, for the book.
    pub fn hide_in(
        &self,
        rng: &mut ChaCha8Rng,
        facts: &[String],
        length: usize,
        noise: &[&str],
    ) -> Result<String> {
        let noise = noise.iter().map(|text| self.sentence(text)).collect::<Result<Vec<_>>>()?;
        self.bury(rng, facts, length, noise.iter().cycle())
    }

    /// Facts keep their order; the depth of each is uniform.
    fn bury<'a>(
        &self,
        rng: &mut ChaCha8Rng,
        facts: &[String],
        length: usize,
        around: impl Iterator<Item = &'a Sentence>,
    ) -> Result<String> {
        let mut left = length;
        for fact in facts {
            let tokens = self.sentence(fact)?.tokens;
            let Some(rest) = left.checked_sub(tokens) else {
                bail!("{} facts do not fit into {length} tokens", facts.len());
            };
            left = rest;
        }
        let mut texts: Vec<&str> = Vec::new();
        for sentence in around {
            let Some(rest) = left.checked_sub(sentence.tokens) else { break };
            left = rest;
            texts.push(&sentence.text);
        }
        let mut depths: Vec<usize> =
            facts.iter().map(|_| rng.random_range(0..=texts.len())).collect();
        depths.sort_unstable();
        // From the last to the first, so that the depths before it stay true.
        for (fact, &depth) in facts.iter().zip(&depths).rev() {
            texts.insert(depth, fact);
        }
        Ok(texts.join(" "))
    }

    fn sentence(&self, text: &str) -> Result<Sentence> {
        let text = text.trim().to_owned();
        // With the space that joins it to its neighbour: it belongs to the first token.
        let tokens = (self.count)(&format!(" {text}"))?;
        Ok(Sentence { text, tokens })
    }
}

/// Ends of sentences, with what closes a quotation after them.
const ENDS: fn(char) -> bool = |c| matches!(c, '.' | '!' | '?');
