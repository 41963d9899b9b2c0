//! Denoising with an evicted prompt: MaskKV (arXiv 2510.09309) and any other policy on a diffusion language model.
//!
//! The model is a [`Qwen3`]'s layers without the causal mask. Its sequence is a prompt and a response that starts as masks; every
//! step runs the model and says what the masks may be, and the caller [writes](Denoiser::write) the surest.
//!
//! Between steps a layer holds keys and values of the prompt slots that the policy keeps and of the whole response, and what
//! attention and MLP added to the response's rows, so that rows that hardly moved need not be run again ([`RefreshPolicy`]). Of
//! the prompt it holds nothing else. The response's keys and values stand twice, in the cache and beside it: it is short.

mod bidirectional;
mod importance;
mod passes;

use candle_core::{D, Error, Result, Tensor, bail};
use candle_nn::ops::log_softmax;
use kvbudget::backend::cpu::Cpu;
use kvbudget::cache::FlatCache;
use kvbudget::{Budget, Plan, Policy, PolicyConfig, Refresh, RefreshPolicy, Span, SpanKind, Spans};

use crate::qwen3::Qwen3;
pub use importance::importance;
use passes::Layer;

/// How a sequence is denoised.
#[derive(Clone)]
pub struct Options {
    /// What stays of the prompt. It must protect mask and decoded spans.
    pub policy: PolicyConfig,
    /// Counts the response's slots as well.
    pub budget: Budget,
    /// When what is computed again.
    pub refresh: RefreshPolicy,
    /// The token that stands for one to be decoded.
    pub mask: u32,
}

/// One sequence that is being denoised. After an error in a step it is to be dropped.
pub struct Denoiser<'m> {
    model: &'m Qwen3,
    cpu: Cpu,
    policy: Policy<Cpu>,
    options: Options,
    prompt: Vec<u32>,
    response: Vec<u32>,
    layers: Vec<Layer>,
    plan: Option<Plan>,
    steps: u32,
}

/// What a step has found.
pub struct Step {
    /// What it computed again.
    pub refresh: Refresh,
    /// Rows of the response that it ran through each layer.
    pub computed: Vec<Vec<u32>>,
    /// Rows of the response that are masked.
    pub masks: Vec<u32>,
    /// Logits `[masks, vocabulary]` of these alone: nobody asks for others.
    pub logits: Tensor,
}

impl<'m> Denoiser<'m> {
    /// A response of `masks` masks behind `prompt`. Nothing runs yet.
    ///
    /// Errors: no prompt or no masks, a budget without room for the response, and those of the policy.
    pub fn new(model: &'m Qwen3, options: Options, prompt: &[u32], masks: usize) -> Result<Self> {
        if prompt.is_empty() || masks == 0 {
            bail!("expected a prompt and masks, got {} and {masks} tokens", prompt.len());
        }
        let tokens = (prompt.len() + masks) as u64;
        let slots = options.budget.resolve(model.geometry(), tokens);
        let response = model.geometry().slots(masks as u64);
        if slots < response {
            bail!("a budget of {slots} slots has no room for the {response} of the response");
        }
        let policy = options.policy.build().map_err(Error::wrap)?;
        let (prompt, response) = (prompt.to_vec(), vec![options.mask; masks]);
        let (cpu, layers) = (Cpu::new(), Vec::new());
        Ok(Self { model, cpu, policy, options, prompt, response, layers, plan: None, steps: 0 })
    }

    /// The response so far.
    pub fn response(&self) -> &[u32] {
        &self.response
    }

    /// What the last selection keeps.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// Keys and values of each layer.
    pub fn caches(&self) -> impl Iterator<Item = &FlatCache> {
        self.layers.iter().map(|layer| &layer.cache)
    }

    /// Runs the model over what the refresh policy has due.
    ///
    /// Errors: nothing is masked, or the policy has evicted some of the response.
    pub fn step(&mut self) -> Result<Step> {
        let masked = |row: &u32| self.response[*row as usize] == self.options.mask;
        let masks: Vec<u32> = (0..self.response.len() as u32).filter(masked).collect();
        if masks.is_empty() {
            bail!("nothing of the response is masked");
        }
        let refresh = self.options.refresh.at(self.steps);
        let (x, computed) = match refresh.prompt {
            true => self.run_all(&masks, refresh.select)?,
            false => self.run_response(refresh.response)?,
        };
        self.steps += 1;
        let x = x.index_select(&Tensor::new(masks.as_slice(), x.device())?, 0)?;
        let logits = self.model.logits(&self.model.finish(&x)?)?;
        Ok(Step { refresh, computed, masks, logits })
    }

    /// The `count` rows that a step is surest of, surest first, and their tokens.
    pub fn surest(&self, step: &Step, count: usize) -> Result<Vec<(u32, u32)>> {
        let logs = log_softmax(&step.logits, D::Minus1)?.to_vec2::<f32>()?;
        let best = |logs: &Vec<f32>| {
            let tokens = (0u32..).zip(logs).filter(|(token, _)| *token != self.options.mask);
            tokens.max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, log)| (token, *log))
        };
        let rows = step.masks.iter().zip(&logs);
        let mut rows: Vec<_> = rows.filter_map(|(&row, logs)| Some((row, best(logs)?))).collect();
        rows.sort_by(|(_, a), (_, b)| b.1.total_cmp(&a.1));
        Ok(rows.into_iter().take(count).map(|(row, (token, _))| (row, token)).collect())
    }

    /// Decodes a mask.
    ///
    /// Errors: a row that is not masked, or the mask in its place.
    pub fn write(&mut self, row: u32, token: u32) -> Result<()> {
        let mask = self.options.mask;
        match self.response.get_mut(row as usize) {
            Some(at) if *at == mask && token != mask => *at = token,
            _ => bail!("expected a masked row and a token that is no mask, got {row} and {token}"),
        }
        Ok(())
    }

    /// What the stretches of the sequence are now.
    fn spans(&self) -> Result<Spans> {
        let mut position = self.prompt.len();
        let mut spans = vec![Span { kind: SpanKind::Prompt, positions: 0..position as u32 }];
        let masked = |token: &u32| *token == self.options.mask;
        for run in self.response.chunk_by(|a, b| masked(a) == masked(b)) {
            let kind = if masked(&run[0]) { SpanKind::Mask } else { SpanKind::Decoded };
            let positions = position as u32..(position + run.len()) as u32;
            spans.push(Span { kind, positions });
            position += run.len();
        }
        Spans::new(spans).map_err(Error::wrap)
    }
}
