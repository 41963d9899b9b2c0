//! Measuring: one dense prefill per context, shared by all variants; then the variants as one batch of compressed copies.

mod batch;
mod continuation;
mod dense;
mod retrieval;

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_core::quantized::gguf_file::Content;
use kvbudget::Geometry;
use kvbudget_candle::{Llama, tokenizer};
use tokenizers::Tokenizer;

use crate::record::{Order, Record};
use crate::tasks::{Haystack, Task};
use crate::{chat, prose};

/// Sequences run at once: enough to use the processor well, few enough for caches and logits to fit.
const BATCH: usize = 24;
/// Tokens of a context run at once.
const CHUNK: usize = 512;

/// The model and what it reads.
pub struct Bench {
    name: String,
    model: Llama,
    geometry: Geometry,
    o_proj: Vec<Tensor>,
    tokenizer: Tokenizer,
    /// What ends an answer.
    end: Option<u32>,
    /// What precedes a context.
    template: Vec<u32>,
    /// What asks for a repetition of it.
    instruction: Vec<u32>,
    /// For even and odd seeds.
    haystacks: [Haystack; 2],
    books: [Vec<u32>; 2],
}

impl Bench {
    pub fn load(path: &Path) -> Result<Self> {
        let named = || path.display().to_string();
        let mut file = File::open(path).with_context(named)?;
        let content = Content::read(&mut file).with_context(named)?;
        let tokenizer = tokenizer::from_gguf(&content)?;
        let model = Llama::load(&content, &mut file).with_context(named)?;
        let name = content.metadata.get("general.name").and_then(|name| name.to_string().ok());
        let haystack = |seed| {
            let tokenizer = tokenizer.clone();
            Haystack::new(seed, move |text| Ok(tokenizer::encode(&tokenizer, text)?.len()))
        };
        let book = |seed| tokenizer::encode(&tokenizer, prose::half(seed));
        Ok(Self {
            name: name.cloned().unwrap_or_default(),
            geometry: model.geometry()?,
            o_proj: model.output_projections(),
            end: tokenizer.token_to_id(chat::END),
            template: tokenizer::encode(&tokenizer, &chat::context(""))?,
            instruction: tokenizer::encode(&tokenizer, &chat::repeat())?,
            haystacks: [haystack(0)?, haystack(1)?],
            books: [book(0)?, book(1)?],
            tokenizer,
            model,
        })
    }

    /// The model, for measurements of its speed.
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// Heads and head dims of the model.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Output projections by layer.
    pub fn output_projections(&self) -> &[Tensor] {
        &self.o_proj
    }

    /// The book from its start.
    pub fn book(&self) -> &[u32] {
        &self.books[0]
    }

    /// Runs an order; one record per mode.
    pub fn measure(&self, order: &Order) -> Result<Vec<Record>> {
        let item = order.item;
        let records = match item.task {
            Task::Continuation => self.continuation(order),
            _ => self.retrieval(order),
        };
        records.with_context(|| {
            format!("{}, length {}, seed {}", item.task.name(), item.length, item.seed)
        })
    }

    /// The model's name in its metadata.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens that precede a context.
    pub fn template(&self) -> &[u32] {
        &self.template
    }

    /// Tokens that ask for a repetition.
    pub fn instruction(&self) -> &[u32] {
        &self.instruction
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        tokenizer::encode(&self.tokenizer, text)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(anyhow::Error::msg)
    }
}
