//! Retrieval: is the answer still found in what the cache keeps?
//!
//! The context is read once. Question-agnostic variants are copied from its cache; then the question is read
//! behind it, and the question-aware ones are copied. Every token of an answer comes from a compressed
//! cache: the end of the prompt is read after the compression in both modes.

use std::time::Instant;

use anyhow::Result;

use super::batch::Batch;
use super::dense::{Compressed, Dense};
use super::{BATCH, Bench};
use crate::chat;
use crate::record::{Measured, Mode, Order, Outcome, Record, Seconds};
use crate::tasks::Sample;
use crate::variant::Variant;

/// Tokens of an answer: a space, five digits, and what a hesitant model puts before them.
const ANSWER: usize = 12;
/// Tokens of a name.
const NAME: usize = 5;

impl Bench {
    pub(super) fn retrieval(&self, order: &Order) -> Result<Vec<Record>> {
        let item = order.item;
        let haystack = &self.haystacks[(item.seed % 2) as usize];
        let sample = item.task.sample(item.seed, item.length, haystack)?;
        let question = self.encode(&chat::question(&sample.question))?;
        let answer = self.encode(&chat::answer(&sample.prefix))?;

        let mut seconds = Seconds::default();
        let mut dense = Dense::new(self, order.runs.iter().flat_map(|(_, variants)| variants))?;
        dense.read(&self.encode(&chat::context(&sample.context))?, &mut seconds)?;
        let mut runs: Vec<_> = order.runs.iter().collect();
        // The question is read in between.
        runs.sort_by_key(|(mode, _)| *mode);
        let mut records = Vec::new();
        for (mode, variants) in runs {
            let prompt = match mode {
                Mode::Agnostic => [question.as_slice(), &answer].concat(),
                Mode::Aware => {
                    dense.read(&question, &mut seconds)?;
                    answer.clone()
                }
            };
            let mut outcomes = Vec::new();
            for group in variants.chunks(BATCH) {
                outcomes.extend(self.answers(&dense, group, &sample, &prompt, &mut seconds)?);
            }
            let tokens = dense.tokens();
            let seconds = std::mem::take(&mut seconds);
            records.push(Record { item, mode: *mode, tokens, outcomes, seconds });
        }
        Ok(records)
    }

    /// One batch of variants.
    fn answers(
        &self,
        dense: &Dense<'_>,
        variants: &[Variant],
        sample: &Sample,
        prompt: &[u32],
        seconds: &mut Seconds,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let mut sequences = Vec::new();
        for (variant, plan) in variants.iter().zip(dense.plans(variants, seconds)?) {
            let Compressed { variant, slots, sequence } =
                dense.gather(variant, &plan, prompt.len() + NAME + 8 + ANSWER, seconds)?;
            outcomes.push((variant, slots));
            sequences.push(sequence);
        }
        let mut batch = Batch::new(self, sequences)?;
        let start = Instant::now();
        let mut prompts = vec![prompt.to_vec(); variants.len()];
        let mut named = vec![String::new(); variants.len()];
        if let Some(lead) = &sample.lead {
            let names = batch.answer(prompts, NAME, |ids| self.is_named(ids))?;
            prompts = Vec::new();
            for (named, ids) in named.iter_mut().zip(names) {
                let name = self.decode(&ids)?;
                let lead = lead.replace("{}", word(&name));
                prompts.push(self.encode(&lead)?);
                *named = format!("{}{lead}", head(&name));
            }
        }
        let answers = batch.answer(prompts, ANSWER, |ids| self.is_done(ids))?;
        seconds.answer += start.elapsed().as_secs_f64();
        let outcome = |((variant, slots), (named, ids)): ((Variant, u64), (String, Vec<u32>))| {
            let text = named + &self.decode(&ids)?;
            let correct = sample.is_answered_by(&text);
            Ok(Outcome { variant, slots, measured: Measured::Answer { correct, text } })
        };
        outcomes.into_iter().zip(named.into_iter().zip(answers)).map(outcome).collect()
    }

    /// A name ends with its word.
    fn is_named(&self, ids: &[u32]) -> Result<bool> {
        let name = self.decode(ids)?;
        Ok(head(&name).len() < name.len())
    }

    /// An answer ends with its turn, or after its first number.
    fn is_done(&self, ids: &[u32]) -> Result<bool> {
        if ids.last().copied() == self.end {
            return Ok(true);
        }
        let text = self.decode(ids)?;
        let digits = text.trim_start_matches(|c: char| !c.is_ascii_digit());
        Ok(digits.contains(|c: char| !c.is_ascii_digit()))
    }
}

/// The text up to the end of its first word.
fn head(text: &str) -> &str {
    let start = text.len() - text.trim_start().len();
    let end = text[start..].find(|c: char| !c.is_alphanumeric());
    end.map_or(text, |end| &text[..start + end])
}

/// The first word.
fn word(text: &str) -> &str {
    head(text).trim_start()
}

#[cfg(test)]
mod tests {
    use super::{head, word};

    #[test]
    fn a_name_is_a_word() {
        assert_eq!((head(" Paris. It"), word(" Paris. It")), (" Paris", "Paris"));
        assert_eq!((head(" Par"), word(" Par")), (" Par", "Par"));
        assert_eq!((head(" <|im_end|>"), word("")), (" ", ""));
    }
}
