//! KV-cache budgets for LLM inference.

pub mod backend;
mod budget;
mod dtype;
mod error;
mod geometry;
mod ids;
pub mod plan;
mod ragged;
mod view;

pub use budget::{Budget, Fraction};
pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use geometry::{Geometry, LayerShape, MAX_LEN};
pub use ids::{KvHead, LayerId, Position};
pub use plan::Plan;
pub use ragged::Ragged;
pub use view::{LayerView, Layout, Rows, Run, Storage};
