//! How much each layer's attention changes the rows that enter it: the measurement behind MaskKV's budgets of layers (arXiv
//! 2510.09309, §3.3), `1 - mean cos(x, x + attention(x))` over all rows of prompts with their masks.
//!
//! That the residual is part of what leaves a layer the paper does not say; its cosines, of 0.8 to 1, do.

use candle_core::{Result, bail};
use kvbudget::LayerProfile;
use kvbudget::backend::cpu::Cpu;

use super::bidirectional::{Pass, cosines};
use crate::attention::Span;
use crate::qwen3::Qwen3;

/// Measures a model on sequences of a prompt and masks.
///
/// Costs a pass over each.
///
/// Errors: no sequence, an empty one, or one longer than the model's context.
pub fn importance(name: &str, model: &Qwen3, sequences: &[Vec<u32>]) -> Result<LayerProfile> {
    if sequences.is_empty() {
        bail!("expected sequences to measure importance on, got none");
    }
    let cpu = Cpu::new();
    let shapes = model.geometry().layers();
    let mut sums = vec![0.0; shapes.len()];
    for ids in sequences {
        let turns = model.turns(ids.len(), &[Span::new(0, ids.len() as u32)])?;
        let mut x = model.embed(ids)?;
        for ((layer, &shape), sum) in model.layers().iter().zip(shapes).zip(&mut sums) {
            let pass = Pass::run(layer, shape, &cpu, &x, &turns)?;
            let after = (&x + &pass.attention)?;
            let alike = cosines(&x, &after)?;
            *sum += 1.0 - alike.iter().sum::<f64>() / alike.len() as f64;
            x = (after + &pass.mlp)?;
        }
    }
    // Rounding may leave a layer that changes nothing just below 0.
    let importance = sums.iter().map(|sum| (sum / sequences.len() as f64).max(0.0)).collect();
    Ok(LayerProfile { model: name.to_owned(), similarity: None, importance: Some(importance) })
}
