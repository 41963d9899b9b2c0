//! Needles: facts of the form "key has number" in prose, and a question for one of the keys.

use anyhow::Result;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::{Haystack, Sample, numbers};

/// Names that the book does not use.
pub(super) const NAMES: [&str; 12] = [
    "Paris", "London", "Tokyo", "Berlin", "Madrid", "Cairo", "Moscow", "Chicago", "Sydney", "Rome",
    "Toronto", "Dublin",
];

pub(super) fn sample(
    rng: &mut ChaCha8Rng,
    needles: usize,
    length: usize,
    haystack: &Haystack,
) -> Result<Sample> {
    let keys: Vec<&str> = NAMES.choose_multiple(rng, needles).copied().collect();
    let numbers = numbers(rng, needles);
    let facts: Vec<String> = keys
        .iter()
        .zip(&numbers)
        .map(|(key, number)| format!("The special magic number for {key} is {number}."))
        .collect();
    let asked = rng.random_range(0..needles);
    let key = keys[asked];
    Ok(Sample {
        context: haystack.hide(rng, &facts, length)?,
        question: format!("What is the special magic number for {key} mentioned in the text?"),
        prefix: format!("The special magic number for {key} is"),
        lead: None,
        answer: numbers[asked].clone(),
    })
}
