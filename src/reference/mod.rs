//! Published codes, bug for bug.

use crate::parameters::named;

/// Which published code to reproduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Reference {
    /// NVIDIA kvpress 0.5.5.
    Kvpress,
    /// FFY0/AdaKV.
    AdaKv,
    /// FFY0/DefensiveKV.
    DefensiveKv,
}
named!(Reference { Kvpress => "kvpress", AdaKv => "adakv", DefensiveKv => "defensivekv" });

use crate::backend::Backend;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::policy::PolicyConfig;
use crate::ragged::Ragged;
use crate::score::ScoreContext;
use crate::view::LayerView;

pub(crate) struct Scored<F> {
    pub scores: F,
    pub weighted: Option<F>,
}

pub(crate) fn score<B: Backend>(
    _: &B,
    _: Reference,
    _: &PolicyConfig,
    _: &ScoreContext<'_>,
    _: &[LayerView<'_, B::Storage<'_>>],
) -> Result<Scored<B::Floats>> {
    Err(Error::Unsupported { what: "reference", why: "being written" })
}

pub(crate) fn select(
    _: Reference,
    _: &PolicyConfig,
    _: &Geometry,
    _: Budget,
    _: u32,
    _: &[Ragged<f32>],
    _: &[Option<Ragged<f32>>],
) -> Result<Vec<Ragged<u32>>> {
    Err(Error::Unsupported { what: "reference", why: "being written" })
}
