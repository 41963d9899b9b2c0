//! A small llama on candle whose attention is a hook, and a capture tool built on it.
//!
//! The model files of candle keep their keys, values and queries private, so a method that looks
//! at them needs its own forward pass. This one is as small as it can be and calls an
//! [`AttentionHook`] once per layer, after RoPE.

pub mod attention;
pub mod capture;
pub mod dump;
pub mod llama;
pub mod tokenizer;

pub use attention::{AttentionHook, DenseAttention};
pub use capture::{CaptureAttention, CaptureOptions, capture};
pub use dump::Dump;
pub use llama::{Config, Llama};
