//! The second pass of context reconstruction, and the profile of a model that it measures.
//!
//! After prefill the model is told to repeat its context and shown the repetition; what these tokens attend to
//! is worth keeping (`kvbudget::score::Reconstruction`, KVzip). The pass runs behind the cache and leaves it as it
//! was. Done over a few calibration texts, the budgets that result are a profile ([`calibrate`]).

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::backend::cpu::Cpu;
use kvbudget::cache::FlatCache;
use kvbudget::score::Reconstruction;
use kvbudget::{Budget, Fraction, LayerId, LayerView, Plan, Profile, Ragged, preset};

use crate::attention::{AttentionHook, Span};
use crate::cache::BudgetCache;
use crate::sequence::SequenceCache;
use crate::step::Step;

/// A model's forward pass: token ids, their spans, the hook. Logits are of no interest here.
pub type Forward<'m> = dyn FnMut(&[u32], &[Span], &mut dyn AttentionHook) -> Result<()> + 'm;

/// Tokens repeated at once. More cost memory for activations, fewer an instruction each time.
const CHUNK: usize = 2048;
/// Tokens of the chunk before that tell the model where to go on.
const LEAD: usize = 8;
/// Tokens of a prompt run at once.
const PREFILL: usize = 512;

/// Scores `[H, T]` of each layer of a dense sequence, from a second pass in which the model repeats `context` after
/// `instruction` (tokens that end the user's turn and ask for the repetition).
///
/// Costs a prefill of `context` over a cache of `T` tokens.
///
/// Errors: nothing to repeat, a sequence that has been compressed, and those of `forward`.
pub fn reconstruct(
    sequence: &SequenceCache,
    instruction: &[u32],
    context: &[u32],
    forward: &mut Forward<'_>,
) -> Result<Vec<Ragged<f32>>> {
    if context.is_empty() {
        bail!("reconstruction: expected tokens to repeat, got none");
    }
    if !sequence.is_dense() {
        bail!("reconstruction: expected a full cache, got one that has been compressed");
    }
    let cpu = Cpu::new();
    let scores =
        Reconstruction::new(&cpu, sequence.geometry(), sequence.tokens()).map_err(Error::wrap)?;
    let mut repeating = Repeating { cpu, sequence, scores };
    for start in (0..context.len()).step_by(CHUNK) {
        let end = context.len().min(start + CHUNK);
        let ids = [instruction, &context[start.saturating_sub(LEAD)..end]].concat();
        let span = Span { position: sequence.tokens(), tokens: ids.len() as u32 };
        forward(&ids, &[span], &mut repeating)?;
    }
    Ok(repeating.scores.into_scores())
}

/// Attends behind a sequence, keeps nothing, and scores.
struct Repeating<'c> {
    cpu: Cpu,
    sequence: &'c SequenceCache,
    scores: Reconstruction<Cpu>,
}

impl AttentionHook for Repeating<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor> {
        let Some(cache) = self.sequence.layers().get(layer) else {
            bail!("expected a layer below {}, got {layer}", self.sequence.layers().len());
        };
        let [span] = spans else {
            bail!("reconstruction: expected one sequence, got {}", spans.len());
        };
        let shape = self.sequence.geometry().layers()[layer];
        let step = Step::new(shape, [q, k, v], spans)?;
        let loan = step.lend()?;
        let rows = 0..span.tokens as usize;
        // A copy of this layer with the new tokens behind it.
        let held: Ragged<_> = cache.positions().iter().cloned().collect();
        let view = cache.view(shape).map_err(Error::wrap)?;
        let mut behind = FlatCache::gather(&view, &held, span.tokens).map_err(Error::wrap)?;
        let (k, v) = (loan.k.tokens(rows.clone())?, loan.v.tokens(rows.clone())?);
        behind.append(&k, &v).map_err(Error::wrap)?;
        let q = loan.q.tokens(rows)?;
        let view = behind.attend_view(q).map_err(Error::wrap)?;
        LayerView::new(shape, behind.tokens(), view.k, view.v)
            .and_then(|view| view.with_queries(q))
            .and_then(|view| self.scores.observe(&self.cpu, LayerId(layer as u32), &view))
            .map_err(Error::wrap)?;
        step.attend(&self.cpu, &[view])
    }
}

/// What a profile is measured on.
pub struct Calibration {
    /// Tokens before every text: the template's system block and the start of the user's turn.
    pub prefix: Vec<u32>,
    /// Tokens that ask for the repetition.
    pub instruction: Vec<u32>,
    /// The texts.
    pub texts: Vec<Vec<u32>>,
    /// The budgets to measure.
    pub budgets: Vec<Fraction>,
}

/// Measures the profile of a model: every text is read, repeated, and planned at every budget by context
/// reconstruction; heads get the mean of their shares. Costs two prefills per text.
///
/// `done` is called after every text, with the plans made of it.
pub fn calibrate(
    model: &str,
    mut cache: BudgetCache,
    calibration: &Calibration,
    forward: &mut Forward<'_>,
    mut done: impl FnMut(&[Plan]),
) -> Result<Profile> {
    let policy = preset("reconstruct").and_then(|p| p.build()).map_err(Error::wrap)?;
    let budgets: Vec<Budget> = calibration.budgets.iter().map(|&keep| Budget::Keep(keep)).collect();
    let mut plans = Vec::new();
    for text in &calibration.texts {
        let sequence = cache.add_sequence()?;
        if sequence > 0 {
            bail!("expected a cache without sequences, got one with {sequence}");
        }
        let ids = [calibration.prefix.as_slice(), text].concat();
        for (i, chunk) in ids.chunks(PREFILL).enumerate() {
            let span = Span { position: (i * PREFILL) as u32, tokens: chunk.len() as u32 };
            forward(chunk, &[span], &mut cache)?;
        }
        let scores =
            reconstruct(&cache.sequences()[sequence], &calibration.instruction, text, forward)?;
        plans.extend(cache.plans(sequence, &policy, &budgets, Some(&scores))?);
        cache.remove_sequence(sequence)?;
        done(&plans[plans.len() - budgets.len()..]);
    }
    Profile::of_plans(model, &plans).map_err(Error::wrap)
}
