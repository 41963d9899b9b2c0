//! Other denoisers on the path of the dense model: they are told its tokens, so every step compares like with like.

use candle_core::{Result, Tensor};
use kvbudget::{Budget, RefreshPolicy, preset};
use kvbudget_candle::diffusion::{Denoiser, Options};
use kvbudget_candle::qwen3::Qwen3;

use crate::model::MASK;

/// Logits of the masks in each step of the dense model, and the row and token that it then wrote.
pub struct Dense {
    prompt: Vec<u32>,
    steps: Vec<(Tensor, (u32, u32))>,
}

/// How a denoiser did.
pub struct Followed {
    /// `‖logits - dense‖ / ‖dense‖` of the steps that did not refresh the prompt.
    pub errors: Vec<f64>,
    /// Rows of prompt and response that went through a layer, the mean over all steps and layers.
    pub rows: f64,
}

impl Followed {
    pub fn mean_error(&self) -> f64 {
        self.errors.iter().sum::<f64>() / self.errors.len() as f64
    }
}

/// What denoises densely: all is kept, and all is computed again in every step.
pub fn dense_options() -> kvbudget::Result<Options> {
    let (budget, refresh) = (Budget::keep(1, 1)?, RefreshPolicy::new(1, 1)?);
    Ok(Options { policy: preset("maskkv")?, budget, refresh, mask: MASK })
}

impl Dense {
    pub fn run(model: &Qwen3, prompt: &[u32], masks: usize) -> Result<Self> {
        let options = dense_options().map_err(candle_core::Error::wrap)?;
        let mut denoiser = Denoiser::new(model, options, prompt, masks)?;
        let mut steps = Vec::new();
        for _ in 0..masks {
            let step = denoiser.step()?;
            let written = denoiser.surest(&step, 1)?[0];
            denoiser.write(written.0, written.1)?;
            steps.push((step.logits, written));
        }
        Ok(Self { prompt: prompt.to_vec(), steps })
    }

    pub fn follow(&self, model: &Qwen3, options: Options) -> Result<Followed> {
        let mut denoiser = Denoiser::new(model, options, &self.prompt, self.steps.len())?;
        let (mut errors, mut rows) = (Vec::new(), 0.0);
        for (dense, written) in &self.steps {
            let step = denoiser.step()?;
            let prompt = if step.refresh.prompt { self.prompt.len() } else { 0 };
            let response: usize = step.computed.iter().map(Vec::len).sum();
            rows += prompt as f64 + response as f64 / step.computed.len() as f64;
            if !step.refresh.prompt {
                errors.push(norm(&(&step.logits - dense)?)? / norm(dense)?);
            }
            denoiser.write(written.0, written.1)?;
        }
        Ok(Followed { errors, rows: rows / self.steps.len() as f64 })
    }
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt().into())
}
