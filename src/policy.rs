//! A policy: how slots are scored, how the budget is shared out, what is protected, in which units.
//!
//! The parts are orthogonal and combine freely. [`PolicyConfig`] is plain data (print, compare, store, set by
//! name); [`Policy`] is what a planner runs, and takes scorers of your own. Published combinations have names:
//! [`preset`](crate::preset).

use crate::allocate::{AdaForm, Heads, Layers};
use crate::backend::Backend;
use crate::backend::ops::ValueNorm;
use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::ids::LayerId;
use crate::parameters::{Parameters, join, numbers, parameters};
use crate::reference::Reference;
use crate::score::{Needs, Scored, Scorer, ScorerConfig, segment_lens};
use crate::select::{Align, Protect};
use crate::spans::SpanKind;
use crate::view::LayerView;

/// CriticalKV's second stage, once every head's budget is known: the first part goes to the best by score,
/// the rest by `(score + epsilon) · ν` with the value norm `ν` (CriticalKV, arXiv 2502.03805).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct TwoStage {
    /// Fraction of each head's budget, less what is protected, that goes by score alone.
    pub first_stage: Fraction,
    /// Added to scores before they are multiplied, so that a zero score does not hide a large value.
    pub epsilon: f32,
    /// Norm of what a value writes.
    pub value_norm: ValueNorm,
}
parameters!(TwoStage {
    first_stage: "a fraction from 0 to 1",
    epsilon: "a number",
    value_norm: "l1, l2 or plain",
});

impl Default for TwoStage {
    fn default() -> Self {
        Self {
            first_stage: Fraction::new(1, 2).unwrap_or_default(),
            epsilon: 1e-4,
            value_norm: ValueNorm::L1,
        }
    }
}

/// A policy as plain data.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct PolicyConfig {
    /// What plans call it.
    pub name: String,
    /// Which slots matter.
    pub scorer: ScorerConfig,
    /// CriticalKV's second stage.
    #[cfg_attr(feature = "serde", serde(default))]
    pub two_stage: Option<TwoStage>,
    /// Budgets over layers.
    #[cfg_attr(feature = "serde", serde(default))]
    pub layers: Layers,
    /// Budgets over the heads of a layer.
    #[cfg_attr(feature = "serde", serde(default))]
    pub heads: Heads,
    /// What must stay.
    #[cfg_attr(feature = "serde", serde(default))]
    pub protect: Protect,
    /// Units that are kept or freed whole.
    #[cfg_attr(feature = "serde", serde(default))]
    pub align: Align,
    /// Rank NaN scores below everything instead of refusing them.
    #[cfg_attr(feature = "serde", serde(default))]
    pub allow_nan: bool,
    /// Reproduce a published code, flaws included.
    #[cfg_attr(feature = "serde", serde(default))]
    pub reference: Option<Reference>,
}

impl PolicyConfig {
    /// A scorer with equal budgets, nothing protected, single tokens.
    pub fn new(name: impl Into<String>, scorer: ScorerConfig) -> Self {
        Self {
            name: name.into(),
            scorer,
            two_stage: None,
            layers: Layers::default(),
            heads: Heads::default(),
            protect: Protect::default(),
            align: Align::default(),
            allow_nan: false,
            reference: None,
        }
    }

    /// The policy on a backend.
    pub fn build<B: Backend>(&self) -> Result<Policy<B>> {
        self.protect.validate()?;
        if self.align.unit == 0 {
            return Err(Error::Zero { what: "unit" });
        }
        if self.reference.is_some() && self.align != Align::default() {
            return Err(Error::Unsupported {
                what: "units or shared heads in reference mode",
                why: "the published codes select single tokens, head by head",
            });
        }
        Ok(Policy { config: self.clone(), scorer: self.scorer.build() })
    }

    /// Names and values of all parameters that [`set`](Self::set) reaches.
    pub fn parameters(&self) -> Vec<(&'static str, String)> {
        let mut all = self.scorer.list();
        if let Some(stage) = &self.two_stage {
            all.extend(stage.list());
        }
        all.extend(self.layers.list());
        all.extend(self.heads.list());
        all.extend(self.protect.list());
        all.extend(self.align.list());
        all.push(("allow_nan", self.allow_nan.to_string()));
        all
    }

    /// Sets a parameter by name. The error for an unknown name lists the known ones.
    ///
    /// `window` also sets `recent`, since the window's own tokens are not scored but protected; set `recent` after
    /// it to part the two.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        if key == "allow_nan" {
            self.allow_nan = value.parse().map_err(|_| Error::Parameter {
                name: "allow_nan",
                expected: "true or false",
                got: value.to_owned(),
            })?;
            return Ok(());
        }
        let stage = self.two_stage.as_mut().map(|s| s as &mut dyn Parameters);
        let parts: [&mut dyn Parameters; 5] = [
            &mut self.scorer,
            &mut self.layers,
            &mut self.heads,
            &mut self.protect,
            &mut self.align,
        ];
        let mut found = false;
        for part in parts.into_iter().chain(stage) {
            found |= part.set(key, value)?;
        }
        if found {
            if key == "window" && self.reference.is_none() {
                self.protect.set("recent", value)?;
            }
            return Ok(());
        }
        let known: Vec<&str> = self.parameters().iter().map(|(name, _)| *name).collect();
        Err(Error::UnknownName { what: "parameter", got: key.to_owned(), known: known.join(", ") })
    }
}

/// A policy ready to run on a backend.
pub struct Policy<B: Backend> {
    pub(crate) config: PolicyConfig,
    pub(crate) scorer: Box<dyn Scorer<B>>,
}

impl<B: Backend> Policy<B> {
    /// A scorer of your own in place of the configured one.
    pub fn with_scorer(config: PolicyConfig, scorer: Box<dyn Scorer<B>>) -> Result<Self> {
        if config.reference.is_some() {
            return Err(Error::Unsupported {
                what: "a scorer of your own in reference mode",
                why: "reference modes reproduce published scores",
            });
        }
        Ok(Self { scorer, ..config.build()? })
    }

    /// What planning needs of one layer of many sequences: the same at every budget.
    ///
    /// Errors: those of the scorer, views that lack what the policy [`needs`](Self::needs), reference mode.
    pub fn score(
        &self,
        backend: &B,
        layer: LayerId,
        layers: &[LayerView<'_, B::Storage<'_>>],
    ) -> Result<Scored<B::Floats>> {
        if self.config.reference.is_some() {
            return Err(Error::Unsupported {
                what: "scores without a budget in reference mode",
                why: "the published codes score for one budget",
            });
        }
        self.weighted(backend, layers, self.scorer.score(backend, layer, layers)?)
    }

    /// Adds what the second stage asks for.
    pub(crate) fn weighted(
        &self,
        backend: &B,
        layers: &[LayerView<'_, B::Storage<'_>>],
        mut scored: Scored<B::Floats>,
    ) -> Result<Scored<B::Floats>> {
        scored.weighted = match (&self.config.two_stage, scored.weighted) {
            (None, _) => None,
            (Some(_), Some(weighted)) => Some(weighted),
            (Some(stage), None) => {
                let mut norms = backend.zeros(&segment_lens(layers))?;
                backend.value_norm(stage.value_norm, layers, &mut norms)?;
                backend.weigh(stage.epsilon, &scored.scores, &mut norms)?;
                Some(norms)
            }
        };
        Ok(scored)
    }

    /// What views must carry for this policy.
    pub fn needs(&self) -> Needs {
        let (needs, stage) = (self.scorer.needs(), self.config.two_stage.as_ref());
        Needs {
            o_proj: needs.o_proj || stage.is_some_and(|stage| stage.value_norm.projects()),
            spans: needs.spans || !self.config.protect.spans.is_empty(),
            ..needs
        }
    }

    /// Whether layers may be evicted before all are scored: see [`Planner::cascade`](crate::Planner::cascade).
    pub fn cascades(&self) -> bool {
        let PolicyConfig { layers, heads, two_stage, reference, .. } = &self.config;
        // Where budgets of layers shrink as more are seen, heads must keep fewer of the same slots.
        let shrinks = matches!(layers, Layers::Preference(_));
        two_stage.is_none() && reference.is_none() && (!shrinks || heads.nest())
    }

    /// The policy as data.
    pub fn config(&self) -> &PolicyConfig {
        &self.config
    }
}

impl Parameters for Layers {
    fn list(&self) -> Vec<(&'static str, String)> {
        let mut all = Vec::new();
        let mut weights = String::new();
        match self {
            Layers::Pyramid { beta } => all = vec![("beta", beta.to_string())],
            Layers::Boundary(boundary) => all = boundary.list(),
            Layers::Sensitivity(sensitivity) => all = sensitivity.list(),
            Layers::Preference(preference) => all = preference.list(),
            Layers::Weights { layers } => weights = join(layers),
            Layers::Uniform | Layers::Global => {}
        }
        all.push(("layer_weights", weights));
        all
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        match (key, self) {
            ("beta", Layers::Pyramid { beta }) => {
                *beta = value.parse().map_err(|_| Error::Parameter {
                    name: "beta",
                    expected: "a positive integer",
                    got: value.to_owned(),
                })?;
            }
            // Any allocation over layers may be replaced by explicit weights; none are none.
            ("layer_weights", _) if value.is_empty() => {}
            ("layer_weights", layers) => {
                *layers = Layers::Weights { layers: numbers("layer_weights", value)? };
            }
            (_, Layers::Boundary(boundary)) => return boundary.set(key, value),
            (_, Layers::Sensitivity(sensitivity)) => return sensitivity.set(key, value),
            (_, Layers::Preference(preference)) => return preference.set(key, value),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl Parameters for Heads {
    fn list(&self) -> Vec<(&'static str, String)> {
        let mut all = Vec::new();
        let mut weights = String::new();
        match self {
            Heads::Ada { alpha, form } => {
                all = vec![("alpha", alpha.to_string()), ("form", form.to_string())];
            }
            Heads::Weights { heads } => {
                weights = heads.iter().map(|row| join(row)).collect::<Vec<_>>().join(";");
            }
            Heads::Profile { profile } => {
                all = vec![("profile", profile.model().to_owned())];
            }
            Heads::Preference { alpha } => all = vec![("alpha", alpha.to_string())],
            Heads::Uniform => {}
        }
        all.push(("head_weights", weights));
        all
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        match (key, self) {
            ("alpha", Heads::Ada { alpha, .. } | Heads::Preference { alpha }) => {
                *alpha = value.parse().map_err(|_| Error::Parameter {
                    name: "alpha",
                    expected: "a fraction from 0 to 1",
                    got: value.to_owned(),
                })?;
            }
            ("form", Heads::Ada { form, .. }) => *form = value.parse::<AdaForm>()?,
            ("head_weights", _) if value.is_empty() => {}
            ("head_weights", heads) => {
                let rows = value.split(';').map(|row| numbers("head_weights", row));
                *heads = Heads::Weights { heads: rows.collect::<Result<_>>()? };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl Parameters for Protect {
    fn list(&self) -> Vec<(&'static str, String)> {
        let ranges: Vec<String> =
            self.ranges.iter().map(|r| format!("{}..{}", r.start, r.end)).collect();
        vec![
            ("sinks", self.sinks.to_string()),
            ("recent", self.recent.to_string()),
            ("recent_share", self.recent_share.to_string()),
            ("ranges", ranges.join(",")),
            (
                "protect_spans",
                self.spans.iter().map(SpanKind::to_string).collect::<Vec<_>>().join(","),
            ),
        ]
    }
    fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        let bad = |name, expected| Error::Parameter { name, expected, got: value.to_owned() };
        match key {
            "sinks" => self.sinks = value.parse().map_err(|_| bad("sinks", "an integer"))?,
            "recent" => self.recent = value.parse().map_err(|_| bad("recent", "an integer"))?,
            "recent_share" => {
                self.recent_share =
                    value.parse().map_err(|_| bad("recent_share", "a fraction from 0 to 1"))?;
            }
            "ranges" => {
                let range = |text: &str| {
                    let (start, end) = text.split_once("..")?;
                    Some(start.trim().parse().ok()?..end.trim().parse().ok()?)
                };
                self.ranges = value
                    .split(',')
                    .filter(|text| !text.trim().is_empty())
                    .map(range)
                    .collect::<Option<_>>()
                    .ok_or_else(|| bad("ranges", "position ranges such as 0..20,64..80"))?;
                self.validate()?;
            }
            "protect_spans" => {
                let kinds = value.split(',').filter(|text| !text.trim().is_empty());
                self.spans = kinds.map(|text| text.trim().parse()).collect::<Result<_>>()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

parameters!(Align { unit: "a positive integer", share_heads: "true or false" });
