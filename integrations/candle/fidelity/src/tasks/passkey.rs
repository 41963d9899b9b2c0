//! Passkey: a number in a few sentences that repeat, the easiest haystack there is.

use anyhow::Result;
use rand_chacha::ChaCha8Rng;

use super::{Haystack, Sample, numbers};

const NOISE: [&str; 5] = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
];

pub(super) fn sample(rng: &mut ChaCha8Rng, length: usize, haystack: &Haystack) -> Result<Sample> {
    let answer = numbers(rng, 1).remove(0);
    let fact = format!("The pass key is {answer}. Remember it. {answer} is the pass key.");
    Ok(Sample {
        context: haystack.hide_in(rng, &[fact], length, &NOISE)?,
        question: "What is the pass key? Answer with the number.".to_owned(),
        prefix: "The pass key is the number".to_owned(),
        lead: None,
        answer,
    })
}
