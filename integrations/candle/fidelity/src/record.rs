//! What is measured and what came of it: a line of JSON per sample and mode.

use serde::{Deserialize, Serialize};

use crate::tasks::Task;
use crate::variant::Variant;

/// A context, shared by all variants and modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Item {
    pub task: Task,
    pub length: usize,
    pub seed: u64,
}

/// Whether the question is part of what is compressed.
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
pub enum Mode {
    /// The context is compressed before the question is seen.
    Agnostic,
    /// The question ends what is compressed.
    Aware,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Agnostic => "agnostic",
            Self::Aware => "aware",
        }
    }
}

/// What is left to do for an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub item: Item,
    pub runs: Vec<(Mode, Vec<Variant>)>,
}

/// The outcomes of one item in one mode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub item: Item,
    pub mode: Mode,
    /// Tokens that were compressed.
    pub tokens: u32,
    pub outcomes: Vec<Outcome>,
    pub seconds: Seconds,
}

/// The outcome of one variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    #[serde(flatten)]
    pub variant: Variant,
    /// Slots kept, of all layers and heads.
    pub slots: u64,
    #[serde(flatten)]
    pub measured: Measured,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    /// What was generated, and whether it has the answer.
    Answer { correct: bool, text: String },
    /// Loss in nats per token, and by layer the relative L2 error of the attention output.
    Continuation { loss: f64, errors: Vec<f64> },
}

/// Where the time of a record went. What modes share counts for the first of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    pub prefill: f64,
    pub plan: f64,
    pub gather: f64,
    /// Reading the question and writing the answer.
    pub answer: f64,
    /// Reading the true continuation.
    pub read: f64,
    /// Attention over the compressed caches with the dense run's queries.
    pub error: f64,
}

impl Seconds {
    pub fn total(&self) -> f64 {
        self.prefill + self.plan + self.gather + self.answer + self.read + self.error
    }
}
