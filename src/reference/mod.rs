//! Published codes, bug for bug, so that users and golden vectors can compare.
//!
//! A reference mode computes its scores with the same backend operations and then does what the published
//! code does with them, in its own integer and floating-point arithmetic: truncated budgets, windows padded with
//! a large score, sums that miss the budget. Each file lists what it reproduces; what is undefined in the
//! original (ties) follows the crate's order. Nothing here is used outside reference mode.

mod adakv;
mod defensivekv;
mod kvpress;

use crate::allocate::{AdaForm, Heads, Layers};
use crate::backend::Backend;
use crate::backend::ops::{NormScale, Pooling, Reduce, ValueNorm};
use crate::budget::{Budget, Fraction};
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::ids::LayerId;
use crate::parameters::named;
use crate::policy::PolicyConfig;
use crate::preset::preset;
use crate::ragged::Ragged;
use crate::score::{ScorerConfig, SnapKv, segment_lens};
use crate::select::Protect;
use crate::view::LayerView;

/// Which published code to reproduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Reference {
    /// NVIDIA kvpress 0.5.5 (PyPI).
    Kvpress,
    /// FFY0/AdaKV, `snapkv_utils.py` with GQA support.
    AdaKv,
    /// FFY0/DefensiveKV, the two `efficient_*defensivekv_press.py`.
    DefensiveKv,
}
named!(Reference { Kvpress => "kvpress", AdaKv => "adakv", DefensiveKv => "defensivekv" });

impl Reference {
    /// Names of the presets that this code has.
    pub fn presets(self) -> &'static [&'static str] {
        match self {
            Self::Kvpress => &[
                "streaming",
                "snapkv",
                "pyramidkv",
                "ada-snapkv",
                "criticalkv",
                "ada-criticalkv",
                "tova",
                "knorm",
                "keydiff",
                "lagkv",
            ],
            Self::AdaKv => &["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramidkv"],
            Self::DefensiveKv => &["defensivekv", "layer-defensivekv"],
        }
    }
}

/// A preset as a published code has it, with that code's defaults.
pub fn reference(reference: Reference, name: &str) -> Result<PolicyConfig> {
    if !reference.presets().contains(&name) {
        return Err(Error::UnknownName {
            what: "policy of this reference",
            got: name.to_owned(),
            known: reference.presets().join(", "),
        });
    }
    let mut config = preset(name)?;
    // Windows and sinks are part of the published scores, not ranges; StreamingLLM's sinks keep their name.
    let sinks = config.protect.sinks;
    config.protect = Protect { sinks, ..Protect::default() };
    config.reference = Some(reference);
    match &mut config.scorer {
        ScorerConfig::SnapKv(scorer) if reference == Reference::Kvpress => {
            *scorer = SnapKv { window: 64, kernel: 5, pooling: Pooling::Avg, group: Reduce::Mean };
        }
        ScorerConfig::Defensive(scorer) => scorer.norm_scale = NormScale::Heads,
        _ => {}
    }
    Ok(config)
}

pub(crate) struct Scored<F> {
    pub scores: F,
    pub weighted: Option<F>,
}

/// Scores of one layer, and value norms where the selection needs them.
pub(crate) fn score<B: Backend>(
    backend: &B,
    reference: Reference,
    config: &PolicyConfig,
    budget: Budget,
    layer: LayerId,
    layers: &[LayerView<'_, B::Storage<'_>>],
) -> Result<Scored<B::Floats>> {
    if layers.iter().any(|l| l.positions().is_some()) {
        return Err(Error::Unsupported {
            what: "a compressed cache in reference mode",
            why: "the published codes compress a dense prefill once",
        });
    }
    if reference == Reference::DefensiveKv {
        let mut rows = Ragged::default();
        for layer in layers {
            let scores = defensivekv::score(backend, config, budget, layer)?;
            scores.iter().for_each(|row| rows.push(row.iter().copied()));
        }
        return Ok(Scored { scores: backend.upload(rows)?, weighted: None });
    }
    if let Some(window) = window(config)
        && let Some(short) = layers.iter().find(|l| l.tokens() <= window)
    {
        return Err(Error::TooFewQueries {
            method: "a window method in reference mode (tokens must exceed the window)",
            needed: u64::from(window) + 1,
            got: u64::from(short.tokens()),
        });
    }
    let scores = config.scorer.build().score(backend, layer, layers)?.scores;
    let mut weighted = None;
    if config.two_stage.is_some() {
        let mut norms = backend.zeros(&segment_lens(layers))?;
        backend.value_norm(ValueNorm::L1, layers, &mut norms)?;
        weighted = Some(norms);
    }
    Ok(Scored { scores, weighted })
}

/// What every head of every layer keeps, from the scores `[layer][H, T]` of one sequence.
pub(crate) fn select(
    reference: Reference,
    config: &PolicyConfig,
    geometry: &Geometry,
    budget: Budget,
    tokens: u32,
    scores: &[Ragged<f32>],
    norms: &[Option<Ragged<f32>>],
) -> Result<Vec<Ragged<u32>>> {
    let layers = geometry.layers().len();
    match reference {
        Reference::Kvpress => (0..layers)
            .map(|l| kvpress::select(config, budget, tokens, (l, layers), &scores[l], &norms[l]))
            .collect(),
        Reference::AdaKv => (0..layers)
            .map(|l| adakv::select(config, budget, tokens, (l, layers), &scores[l]))
            .collect(),
        Reference::DefensiveKv => defensivekv::select(config, budget, tokens, scores),
    }
}

/// The observation window of a scorer that has one.
fn window(config: &PolicyConfig) -> Option<u32> {
    match &config.scorer {
        ScorerConfig::SnapKv(scorer) => Some(scorer.window),
        ScorerConfig::Tova(_) => Some(1),
        ScorerConfig::Defensive(scorer) => Some(scorer.window),
        _ => None,
    }
}

/// Safeguard of an Ada policy, if it is one.
fn alpha(config: &PolicyConfig) -> Option<Fraction> {
    match config.heads {
        Heads::Ada { alpha, form: AdaForm::Floor | AdaForm::Blend } => Some(alpha),
        _ => None,
    }
}

/// Steepness of a pyramid policy, if it is one.
fn beta(config: &PolicyConfig) -> Option<u64> {
    match config.layers {
        Layers::Pyramid { beta } => Some(beta),
        _ => None,
    }
}

/// The fraction removed, as the double that users of these codes pass.
fn ratio(budget: Budget) -> Result<f64> {
    match budget {
        Budget::Keep(keep) => Ok((keep.den() - keep.num()) as f64 / keep.den() as f64),
        _ => Err(Error::Budget {
            got: budget.to_string(),
            expected: "this reference takes a fraction",
        }),
    }
}

/// Entries `(head, slot)` from best to worst: pinned first, then score, then head and slot.
fn ranked(scores: &Ragged<f32>, pinned: impl Fn(usize, u32) -> bool) -> Vec<(usize, u32)> {
    let rows = scores.iter().enumerate();
    let mut all: Vec<(usize, u32)> =
        rows.flat_map(|(h, row)| (0..row.len() as u32).map(move |t| (h, t))).collect();
    let score = |&(h, t): &(usize, u32)| (pinned(h, t), scores.row(h)[t as usize]);
    all.sort_by(|a, b| {
        let ((pin_a, a), (pin_b, b)) = (score(a), score(b));
        pin_b.cmp(&pin_a).then(b.total_cmp(&a))
    });
    all
}

/// The `counts[h]` best slots of each head, ascending.
fn best(scores: &Ragged<f32>, counts: &[usize]) -> Ragged<u32> {
    let mut rows = vec![Vec::new(); scores.rows()];
    for (h, t) in ranked(scores, |_, _| false) {
        if rows[h].len() < counts[h] {
            rows[h].push(t);
        }
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.into_iter().collect()
}
