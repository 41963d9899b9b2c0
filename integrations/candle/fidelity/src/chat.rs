//! The chat template of SmolLM2, cut where a context ends, where its question ends, and where the answer starts.

/// What precedes the context, together with it.
pub fn context(text: &str) -> String {
    format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n{text}"
    )
}

pub fn question(text: &str) -> String {
    format!("\n\n{text}")
}

/// The turn of the assistant and the start of its answer.
pub fn answer(prefix: &str) -> String {
    format!("<|im_end|>\n<|im_start|>assistant\n{prefix}")
}

/// Asks for the context again (the wording is KVzip's).
pub fn repeat() -> String {
    format!("\n\nRepeat the previous context exactly.{}", answer(""))
}

/// What ends an answer.
pub const END: &str = "<|im_end|>";
