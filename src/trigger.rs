//! When a growing cache is compressed again: every so many tokens, above a mark, or whichever comes first.
//!
//! A recompression is a plan like any other, for a sequence that says which positions it holds
//! ([`Sequence::held`](crate::Sequence)). Positions stay logical: they are what RoPE saw, however often slots move.

use crate::error::{Error, Result};

/// Decides at each decoded token whether to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trigger {
    every: Option<u32>,
    above: Option<u64>,
}

impl Trigger {
    /// After every `tokens` tokens.
    pub fn every(tokens: u32) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::Zero { what: "tokens between compressions" });
        }
        Ok(Self { every: Some(tokens), above: None })
    }

    /// When the sequence holds more than `slots` slots of all layers and heads.
    pub fn above(slots: u64) -> Self {
        Self { every: None, above: Some(slots) }
    }

    /// Also when the sequence holds more than `slots` slots.
    pub fn or_above(self, slots: u64) -> Self {
        Self { above: Some(slots), ..self }
    }

    /// Whether to compress, `since` tokens after the last time, with `slots` slots held.
    pub fn due(&self, since: u32, slots: u64) -> bool {
        self.every.is_some_and(|n| since >= n) || self.above.is_some_and(|mark| slots > mark)
    }
}
