//! The retrieval tasks, in the style of RULER (arXiv 2404.06654): something to find, in text that does not
//! matter, and a question that names it. A sample follows from task, seed and length alone.

mod haystack;
mod needle;
mod passkey;
mod tracking;

pub use haystack::Haystack;

use anyhow::{Result, bail};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::record::Mode;

/// What is asked of the model.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    clap::ValueEnum,
    Serialize,
    Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// A number in text that repeats itself.
    Passkey,
    /// One fact in prose.
    Needle,
    /// Two facts in prose, one of them asked for.
    Keys2,
    /// Four facts in prose, one of them asked for.
    Keys4,
    /// A variable that got its value from another one.
    Tracking,
    /// The true next tokens of prose: no question, their loss is measured.
    Continuation,
}

impl Task {
    /// Tasks with an answer that is right or wrong.
    pub const RETRIEVAL: [Self; 5] =
        [Self::Passkey, Self::Needle, Self::Keys2, Self::Keys4, Self::Tracking];

    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::Needle => "needle",
            Self::Keys2 => "keys2",
            Self::Keys4 => "keys4",
            Self::Tracking => "tracking",
            Self::Continuation => "continuation",
        }
    }

    /// Those of `modes` that differ: a continuation has no question to be aware of.
    pub fn modes(self, modes: &[Mode]) -> &[Mode] {
        match self {
            Self::Continuation => &[Mode::Agnostic],
            _ => modes,
        }
    }

    /// The sample of a seed, with a context of about `length` tokens.
    pub fn sample(self, seed: u64, length: usize, haystack: &Haystack) -> Result<Sample> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Another stream for each task and length: their needles must not lie at the same depths.
        rng.set_stream((self as u64) << 32 | length as u64);
        match self {
            Self::Passkey => passkey::sample(&mut rng, length, haystack),
            Self::Needle => needle::sample(&mut rng, 1, length, haystack),
            Self::Keys2 => needle::sample(&mut rng, 2, length, haystack),
            Self::Keys4 => needle::sample(&mut rng, 4, length, haystack),
            Self::Tracking => tracking::sample(&mut rng, length, haystack),
            Self::Continuation => bail!("continuation asks nothing"),
        }
    }
}

/// A context, a question about it, and what an answer must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub context: String,
    pub question: String,
    /// The start of the answer, given to the model so that it answers in one form.
    pub prefix: String,
    /// What leads on to the number once the model has named something, with `{}` for the name. A small model does
    /// not get there by itself; what it names is its own doing.
    pub lead: Option<String>,
    /// The number that must be given.
    pub answer: String,
}

impl Sample {
    /// Whether the answer is among the numbers of what was generated.
    pub fn is_answered_by(&self, generated: &str) -> bool {
        generated.split(|c: char| !c.is_ascii_digit()).any(|number| number == self.answer)
    }
}

/// `count` different numbers of five digits.
fn numbers(rng: &mut ChaCha8Rng, count: usize) -> Vec<String> {
    let mut numbers = Vec::new();
    while numbers.len() < count {
        let number = rng.random_range(10_000..100_000).to_string();
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn haystack() -> Haystack {
        // Words stand in for tokens.
        Haystack::new(0, |text| Ok(text.split_whitespace().count())).unwrap()
    }

    #[test]
    fn samples_repeat_and_differ() {
        let haystack = haystack();
        for task in Task::RETRIEVAL {
            let sample = |seed, length| task.sample(seed, length, &haystack).unwrap();
            assert_eq!(sample(3, 300), sample(3, 300), "{task:?}");
            assert_ne!(sample(3, 300), sample(4, 300), "{task:?}");
            assert_ne!(sample(3, 300).answer, sample(3, 400).answer, "{task:?}");
        }
    }

    #[test]
    fn the_answer_is_in_the_context_and_the_length_is_met() {
        let haystack = haystack();
        for task in Task::RETRIEVAL {
            for seed in 0..50 {
                let sample = task.sample(seed, 400, &haystack).unwrap();
                assert!(sample.is_answered_by(&sample.context), "{task:?} {seed}");
                assert!(!sample.is_answered_by(&sample.question), "{task:?} {seed}");
                assert!(!sample.is_answered_by(&sample.prefix), "{task:?} {seed}");
                let words = sample.context.split_whitespace().count();
                assert!((320..=400).contains(&words), "{task:?} {seed}: {words}");
            }
        }
    }

    #[test]
    fn an_answer_is_a_whole_number() {
        let sample = Sample {
            context: String::new(),
            question: String::new(),
            prefix: String::new(),
            lead: None,
            answer: "12345".to_owned(),
        };
        assert!(sample.is_answered_by(" 12345."));
        assert!(sample.is_answered_by("not 999 but 12345"));
        assert!(!sample.is_answered_by(" 123456"));
        assert!(!sample.is_answered_by(" 1234"));
    }
}
