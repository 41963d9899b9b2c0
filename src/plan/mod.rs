//! A plan: which positions each head of each layer keeps. Plain data, no handle, no pointer, no device.
//!
//! Planners make it, [`check`] judges it without sharing their code, caches apply it, and it crosses
//! wires as versioned JSON (feature `serde`).

pub mod check;
#[cfg(feature = "serde")]
mod wire;

pub use check::{CheckError, Promise};

use crate::budget::Budget;
use crate::geometry::Geometry;
use crate::ids::{KvHead, LayerId, Position};
use crate::ragged::Ragged;

/// What every head of every layer of one sequence keeps, and how it came to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Name of the policy.
    pub policy: String,
    /// The budget as it was asked for.
    pub budget: Budget,
    /// Tokens the sequence has seen.
    pub tokens: u32,
    /// Slots kept, of all layers and heads.
    pub slots: u64,
    /// Bytes of keys and values kept.
    pub bytes: u64,
    /// What happened on the way.
    pub report: Report,
    /// Kept positions of each layer's heads, ascending.
    pub layers: Vec<Ragged<Position>>,
}

/// What a planner has to say beside the plan.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Report {
    /// Slots the budget resolved to.
    pub budget_slots: u64,
    /// Slots held before.
    pub available_slots: u64,
    /// Protected slots given up because the budget was smaller than what is protected. The rule: the last
    /// token, then sinks in order, then recent tokens from the newest, then named ranges from their ends.
    pub protection_cut: u64,
    /// Slots of the budget left unused because pages or chunks are kept or freed whole.
    pub alignment_waste: u64,
    /// NaN scores, ranked below everything.
    pub nan_scores: u64,
    /// The most slots held at once while planning, when layers were evicted as they came.
    pub peak_slots: u64,
}

impl Plan {
    /// Positions that a head keeps, ascending.
    pub fn kept(&self, layer: LayerId, head: KvHead) -> &[Position] {
        self.layers[layer.index()].row(head.index())
    }

    /// Slots kept by each head of a layer: its share of the budget.
    pub fn head_budgets(&self, layer: LayerId) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.layers[layer.index()].lens()
    }

    /// Counts slots and bytes and puts a plan together.
    pub(crate) fn assemble(
        policy: String,
        budget: Budget,
        tokens: u32,
        geometry: &Geometry,
        report: Report,
        layers: Vec<Ragged<Position>>,
    ) -> Self {
        let slots = layers.iter().map(|l| l.total() as u64).sum();
        let bytes = (0u32..)
            .zip(&layers)
            .map(|(l, heads)| heads.total() as u64 * geometry.slot_bytes(LayerId(l)))
            .sum();
        Self { policy, budget, tokens, slots, bytes, report, layers }
    }
}
