//! KV-cache budgets for LLM inference: how many cached tokens every head of every layer keeps, and which.
//!
//! ```text
//! observe -> score -> aggregate -> allocate -> select -> compact -> attend / append
//! (q, k, v)  [H, T] f32            slots/head  positions  ragged K, V   decode
//! ```
//!
//! Words: `L` layers, `Hq` query heads, `H` KV heads, `G = Hq/H`, `T` cached tokens, `W` observation window, `D` head dim.
//! A *slot* is one K and one V row of one KV head of one layer. A *position* is a token's logical index, what RoPE
//! saw; a *length* is how many slots a head holds. After the first eviction they differ. A *budget* counts
//! slots, in integers; a *plan* says which positions each head keeps.
//!
//! ```
//! use kvbudget::backend::cpu::{Cpu, HostSlice};
//! use kvbudget::cache::FlatCache;
//! use kvbudget::plan::Promise;
//! use kvbudget::{Budget, Dtype, Geometry, LayerShape, LayerView, Planner, Rows, preset};
//!
//! # fn main() -> kvbudget::Result<()> {
//! // Two layers of 4 query heads on 2 KV heads; 100 tokens; the queries of the last 32.
//! let shape = LayerShape::new(4, 2, 8)?;
//! let geometry = Geometry::uniform(2, shape, Dtype::F32)?;
//! let budget = Budget::keep(1, 5)?; // a fraction, never a float
//!
//! let mut config = preset("ada-snapkv")?;
//! config.set("sinks", "4")?;
//! let (cpu, policy) = (Cpu::new(), config.build()?);
//! let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[100u32])?;
//!
//! # let noise = |n: usize, s: usize| -> Vec<f32> { (0..n).map(|i| ((i * 37 + s) % 101) as f32 / 50.0 - 1.0).collect() };
//! # let (keys, values, queries) = (noise(2 * 100 * 8, 1), noise(2 * 100 * 8, 5), noise(4 * 32 * 8, 9));
//! // Borrowed tensors, [heads, tokens, dim] here; [tokens, heads, dim], ragged rows and pages work as well.
//! let k = Rows::heads_first(HostSlice::F32(&keys), 2, 100, 8)?;
//! let v = Rows::heads_first(HostSlice::F32(&values), 2, 100, 8)?;
//! let q = Rows::heads_first(HostSlice::F32(&queries), 4, 32, 8)?;
//! let layer = LayerView::new(shape, 100, k, v)?.with_queries(q)?;
//! for _ in 0..2 {
//!     planner.push(&[layer])?; // one view per sequence of the batch
//! }
//! let plan = planner.finish()?.remove(0);
//! plan.check(&geometry, &Promise::default())?; // shares no code with the planner
//! assert_eq!(plan.slots, 2 * 2 * 100 / 5); // exactly
//!
//! // Compaction frees memory: what is left, head after head, with room for 16 more tokens.
//! let cache = FlatCache::gather(&layer, &plan.layers[0], 16)?;
//! assert_eq!(cache.lens().iter().sum::<u32>(), 2 * 20);
//! # Ok(())
//! # }
//! ```
//!
//! * [`preset`] names the published combinations; [`PolicyConfig`] combines their parts freely; a [`score::Scorer`] of
//!   your own is one `impl`.
//! * [`Planner`] takes layers one by one, for one sequence or many, and may evict as they come ([`Planner::cascade`]).
//! * [`BlockPrefill`] reads a prompt block by block within the budget and one block, for engines that speak [`engine`]'s contract.
//! * [`cache`] holds what is left, flat or in pages; [`backend::Backend::attend`] attends over it; [`Trigger`] says when to compress again, [`RefreshPolicy`] when a
//!   diffusion decoder computes it again.
//! * [`backend`] is the seam for devices: the CPU, and with feature `cuda` NVIDIA GPUs.
//!
//! Features: `cuda` (the CUDA backend; builds without nvcc and without a GPU), `serde` (plans, reports and policies can be
//! written and read).

pub mod allocate;
pub mod backend;
mod blocks;
mod budget;
pub mod cache;
mod dtype;
pub mod engine;
mod error;
mod geometry;
mod ids;
mod layer_profile;
mod moments;
mod parameters;
pub mod plan;
mod planner;
mod policy;
mod preset;
pub mod profile;
mod ragged;
mod reference;
mod refresh;
mod rope;
pub mod score;
pub mod select;
mod spans;
mod trigger;
mod view;
#[cfg(feature = "serde")]
mod wire;

pub use blocks::BlockPrefill;
pub use budget::{Budget, Fraction};
pub use dtype::{Dtype, Element};
pub use engine::{Books, CacheManager, Keep};
pub use error::{Error, Result};
pub use geometry::{Geometry, LayerShape, MAX_LEN};
pub use ids::{KvHead, LayerId, Position};
pub use layer_profile::LayerProfile;
pub use moments::{ExpectedQueries, QueryMoments};
pub use plan::Plan;
pub use planner::{Planner, Sequence};
pub use policy::{Policy, PolicyConfig, TwoStage};
pub use preset::{INFORMED, PRESETS, preset, profiled};
pub use profile::Profile;
pub use ragged::Ragged;
pub use reference::{Reference, reference};
pub use refresh::{Refresh, RefreshPolicy};
pub use rope::{Pairs, Rope};
pub use spans::{Span, SpanKind, Spans};
pub use trigger::Trigger;
pub use view::{LayerView, Layout, Rows, Run, Storage};
