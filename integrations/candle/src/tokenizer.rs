//! The tokenizer that a GGUF file carries.
//!
//! candle builds it, but knows no SmolLM: it would put a space before the text and keep digits
//! together, which is not how the model was trained.

use anyhow::{Result, anyhow};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

pub fn from_gguf(content: &Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    let kind = content.metadata.get("tokenizer.ggml.pre");
    if let Some(kind) = kind
        && kind.to_string()? == "smollm"
    {
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
            Digits::new(true).into(),
            ByteLevel::new(false, true, true).into(),
        ])));
    }
    Ok(tokenizer)
}

/// The tokens of plain text: no chat template, and nothing added before or after.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode(text, false)
        .map_err(|error| anyhow!("cannot tokenize the text: {error}"))?;
    Ok(encoding.get_ids().to_vec())
}
