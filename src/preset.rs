//! The published combinations, by name.
//!
//! Each is the parts of [`PolicyConfig`] with the defaults of its source; every parameter can be set. Window
//! methods use W = 32 and, like SnapKV's and Ada-KV's experiments, max pooling over 7; DefensiveKV
//! averages over 5, as its code does.

use crate::allocate::{AdaForm, Boundary, Heads, Layers, Preference, Sensitivity};
use crate::backend::ops::Reduce;
use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::policy::{PolicyConfig, TwoStage};
use crate::profile::Profile;
use crate::score::{
    AnDPro, Cake, Defensive, Expected, GuiKv, H2o, KNorm, KeyDiff, LagKv, Probe, Random, Reach,
    Reconstruct, ScorerConfig, SnapKv, Streaming, Tova,
};
use crate::select::{Align, Protect};
use crate::spans::SpanKind;

/// Names of the presets that need nothing but what a prefill leaves behind. Beside them there are `reconstruct`, which
/// needs a second pass ([`Reconstruction`](crate::score::Reconstruction)), [`profiled`], which needs a profile, and [`INFORMED`].
pub const PRESETS: &[&str] = &[
    "streaming",
    "snapkv",
    "pyramidkv",
    "ada-snapkv",
    "ada-pyramidkv",
    "criticalkv",
    "ada-criticalkv",
    "defensivekv",
    "layer-defensivekv",
    "andpro",
    "cake",
    "tova",
    "knorm",
    "keydiff",
    "lagkv",
    "h2o",
    "reach",
    "random",
];

/// Names of the presets that the engine tells more: `epicache` and `maskkv` look with a probe's queries
/// ([`LayerView::with_probe`](crate::LayerView::with_probe)), and their layers are equal until something is known of them
/// ([`LayerProfile`](crate::LayerProfile)); `maskkv` and `guikv` ask what stretches are ([`Spans`](crate::Spans)), `guikv` for the norms of
/// hidden rows; `expected-attention` for statistics of the queries ([`QueryMoments`](crate::QueryMoments)).
pub const INFORMED: &[&str] = &["epicache", "maskkv", "guikv", "expected-attention"];

/// A published combination with its defaults.
pub fn preset(name: &str) -> Result<PolicyConfig> {
    let window = SnapKv::default().window;
    let recent = |n| Protect { recent: n, ..Protect::default() };
    let snapkv = || PolicyConfig {
        protect: recent(window),
        ..PolicyConfig::new(name, ScorerConfig::SnapKv(SnapKv::default()))
    };
    let plain = |scorer| PolicyConfig::new(name, scorer);
    let pyramid = Layers::Pyramid { beta: 20 };
    let ada = || ada(1, 5);
    Ok(match name {
        "streaming" => PolicyConfig {
            protect: Protect { sinks: 4, ..recent(1) },
            ..plain(ScorerConfig::Streaming(Streaming {}))
        },
        "snapkv" => snapkv(),
        "pyramidkv" => PolicyConfig { layers: pyramid, ..snapkv() },
        "ada-snapkv" => PolicyConfig { heads: ada(), ..snapkv() },
        "ada-pyramidkv" => PolicyConfig { layers: pyramid, heads: ada(), ..snapkv() },
        "criticalkv" => PolicyConfig { two_stage: Some(TwoStage::default()), ..snapkv() },
        "ada-criticalkv" => {
            PolicyConfig { two_stage: Some(TwoStage::default()), heads: ada(), ..snapkv() }
        }
        "defensivekv" | "layer-defensivekv" => {
            let scorer = Defensive::default();
            PolicyConfig {
                protect: recent(scorer.window),
                // The first set of slots takes the place of a safeguard.
                heads: self::ada(0, 1),
                layers: if name == "defensivekv" { Layers::Uniform } else { Layers::Global },
                ..plain(ScorerConfig::Defensive(scorer))
            }
        }
        "andpro" => {
            let scorer = AnDPro::default();
            PolicyConfig {
                protect: Protect { sinks: scorer.sinks, ..recent(scorer.window) },
                heads: self::ada(0, 1),
                align: Align { unit: 4, ..Align::default() },
                ..plain(ScorerConfig::AnDPro(scorer))
            }
        }
        "cake" => {
            let scorer = Cake::default();
            PolicyConfig {
                protect: recent(scorer.window),
                layers: Layers::Preference(Preference::default()),
                ..plain(ScorerConfig::Cake(scorer))
            }
        }
        "tova" => PolicyConfig { protect: recent(1), ..plain(ScorerConfig::Tova(Tova {})) },
        "knorm" => plain(ScorerConfig::KNorm(KNorm {})),
        "keydiff" => plain(ScorerConfig::KeyDiff(KeyDiff {})),
        "lagkv" => PolicyConfig {
            // The published scores tie for sinks and the whole last partition; here the newest of it come first.
            protect: Protect { sinks: 4, ..recent(window) },
            ..plain(ScorerConfig::LagKv(LagKv::default()))
        },
        "h2o" => PolicyConfig {
            protect: Protect { recent_share: Fraction::new(1, 2)?, ..recent(1) },
            ..plain(ScorerConfig::H2o(H2o {}))
        },
        "guikv" => {
            let scorer = GuiKv::default();
            let protect = recent(scorer.window);
            PolicyConfig { protect, ..plain(ScorerConfig::GuiKv(scorer)) }
        }
        "expected-attention" => {
            let scorer = Expected::default();
            let protect = Protect { sinks: scorer.sinks, ..Protect::default() };
            PolicyConfig { protect, ..plain(ScorerConfig::Expected(scorer)) }
        }
        "reach" => PolicyConfig::default(),
        "reconstruct" => PolicyConfig {
            protect: Protect { sinks: 4, ..recent(1) },
            heads: self::ada(0, 1),
            layers: Layers::Global,
            ..plain(ScorerConfig::Reconstruct(Reconstruct {}))
        },
        "epicache" => PolicyConfig {
            protect: Protect { spans: vec![SpanKind::System], ..Protect::default() },
            heads: self::ada(0, 1),
            layers: Layers::Sensitivity(Sensitivity::default()),
            ..plain(ScorerConfig::Probe(Probe::default()))
        },
        "maskkv" => PolicyConfig {
            // Only the prompt is evictable.
            protect: Protect {
                spans: vec![SpanKind::Mask, SpanKind::Decoded],
                ..Protect::default()
            },
            heads: Heads::Preference { alpha: Fraction::new(1, 10)? },
            layers: Layers::Boundary(Boundary::default()),
            ..plain(ScorerConfig::Probe(Probe { rows: Reduce::Mean, group: Reduce::Mean }))
        },
        "random" => plain(ScorerConfig::Random(Random::default())),
        _ => {
            return Err(Error::UnknownName {
                what: "policy",
                got: name.to_owned(),
                known: format!("{}, {}, reconstruct", PRESETS.join(", "), INFORMED.join(", ")),
            });
        }
    })
}

/// `reach` with shares as measured in the place of the contest by score.
pub fn profiled(profile: Profile) -> PolicyConfig {
    let name = "profiled".to_owned();
    PolicyConfig { name, heads: Heads::Profile { profile }, ..PolicyConfig::default() }
}

/// What to use where nothing is known of the model: `reach`. Where its profile is known, [`profiled`].
impl Default for PolicyConfig {
    fn default() -> Self {
        PolicyConfig {
            protect: Protect { sinks: 4, recent: 8, ..Protect::default() },
            heads: ada(0, 1),
            layers: Layers::Global,
            ..PolicyConfig::new("reach", ScorerConfig::Reach(Reach::default()))
        }
    }
}

fn ada(num: u64, den: u64) -> Heads {
    Heads::Ada { alpha: Fraction::new(num, den).unwrap_or_default(), form: AdaForm::Floor }
}
