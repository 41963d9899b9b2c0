//! Variable tracking: a variable has a number, another one is the first one; what is the number of the other?
//!
//! The model names the first variable, then gives the number of what it has named: both facts must be found.

use anyhow::Result;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::needle::NAMES;
use super::{Haystack, Sample, numbers};

pub(super) fn sample(rng: &mut ChaCha8Rng, length: usize, haystack: &Haystack) -> Result<Sample> {
    let names: Vec<&str> = NAMES.choose_multiple(rng, 2).copied().collect();
    let answer = numbers(rng, 1).remove(0);
    let (first, last) = (names[0], names[1]);
    let facts = [
        format!("The special magic number for VAR {first} is {answer}."),
        format!("VAR {last} is VAR {first}."),
    ];
    Ok(Sample {
        context: haystack.hide(rng, &facts, length)?,
        question: format!(
            "Which variable is VAR {last}, and what is the special magic number for that variable?"
        ),
        prefix: format!("VAR {last} is VAR"),
        lead: Some(". The special magic number for VAR {} is".to_owned()),
        answer,
    })
}
