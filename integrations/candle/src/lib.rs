//! KV-cache budgets for candle models: [`BudgetCache`] is the cache an engine adopts, [`AttentionHook`] the one
//! place where a model must let it in.
//!
//! The model files of candle keep their attention private, so a small llama is part of this crate: it calls
//! the hook once per layer, after RoPE, and can read the keys, values and queries out as well ([`mod@capture`]).

pub mod attention;
mod batch;
pub mod blocks;
pub mod cache;
pub mod capture;
pub mod compressing;
#[cfg(feature = "cuda")]
pub mod device;
pub mod diffusion;
pub mod dump;
mod elementwise;
pub mod episodes;
pub mod host;
pub mod llama;
mod moments;
mod prefill;
pub mod profiles;
pub mod qwen3;
pub mod reconstruct;
mod rope;
pub mod sensitivity;
pub mod sequence;
mod step;
pub mod tokenizer;

pub use attention::{AttentionHook, DenseAttention, Span};
pub use cache::BudgetCache;
pub use capture::{CaptureAttention, CaptureOptions, capture};
pub use compressing::Compressing;
pub use dump::Dump;
pub use llama::{Config, Llama};
pub use qwen3::Qwen3;
pub use sequence::SequenceCache;
