//! The published combinations, by name.
//!
//! Each is the parts of [`PolicyConfig`] with the defaults of its source; every parameter can be set. Window
//! methods use W = 32 and, like SnapKV's and Ada-KV's experiments, max pooling over 7; DefensiveKV
//! averages over 5, as its code does.

use crate::allocate::{AdaForm, Heads, Layers};
use crate::budget::Fraction;
use crate::error::{Error, Result};
use crate::policy::{PolicyConfig, TwoStage};
use crate::profile::Profile;
use crate::score::{
    Defensive, GuiKv, H2o, KNorm, KeyDiff, LagKv, Random, Reach, Reconstruct, ScorerConfig, SnapKv,
    Streaming, Tova,
};
use crate::select::Protect;

/// Names of the presets that need nothing but what a prefill leaves behind. Beside them there are `reconstruct`, which
/// needs a second pass ([`Reconstruction`](crate::score::Reconstruction)), `guikv`, which needs to be told where frames
/// are ([`Spans`](crate::Spans)) and the norms of hidden rows, and [`profiled`], which needs a profile.
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
    "tova",
    "knorm",
    "keydiff",
    "lagkv",
    "h2o",
    "reach",
    "random",
];

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
        "reach" => PolicyConfig::default(),
        "reconstruct" => PolicyConfig {
            protect: Protect { sinks: 4, ..recent(1) },
            heads: self::ada(0, 1),
            layers: Layers::Global,
            ..plain(ScorerConfig::Reconstruct(Reconstruct {}))
        },
        "random" => plain(ScorerConfig::Random(Random::default())),
        _ => {
            return Err(Error::UnknownName {
                what: "policy",
                got: name.to_owned(),
                known: format!("{}, guikv, reconstruct", PRESETS.join(", ")),
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
