//! KV-cache budgets for LLM inference.

pub mod allocate;
pub mod backend;
mod budget;
pub mod cache;
mod dtype;
mod error;
mod geometry;
mod ids;
mod parameters;
pub mod plan;
mod planner;
mod policy;
mod preset;
mod ragged;
mod reference;
pub mod score;
pub mod select;
mod trigger;
mod view;

pub use budget::{Budget, Fraction};
pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use geometry::{Geometry, LayerShape, MAX_LEN};
pub use ids::{KvHead, LayerId, Position};
pub use plan::Plan;
pub use planner::{Planner, Sequence};
pub use policy::{Policy, PolicyConfig, TwoStage};
pub use preset::{PRESETS, preset};
pub use ragged::Ragged;
pub use reference::{Reference, reference};
pub use trigger::Trigger;
pub use view::{LayerView, Layout, Rows, Run, Storage};
