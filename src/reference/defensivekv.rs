//! FFY0/DefensiveKV: worst-case scores with a first set found by a threshold that mixes absolute and
//! normalised masses and takes the mass of the `w` slots *before* the window for the window's own.
//!
//! Window slots get the layer's largest score instead of protection, so the variant over all layers can
//! empty whole layers. `N = trunc(T · (1 - r) · H)`, or `· H · L` over all layers.

use super::{best, ranked, ratio};
use crate::allocate::Layers;
use crate::backend::Backend;
use crate::backend::ops::{NormScale, Reduce, ValueNorm, WindowAttention};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::policy::PolicyConfig;
use crate::ragged::Ragged;
use crate::score::{Defensive, ScorerConfig, segment_lens};
use crate::view::LayerView;

pub(super) fn score<B: Backend>(
    backend: &B,
    config: &PolicyConfig,
    budget: Budget,
    layer: &LayerView<'_, B::Storage<'_>>,
) -> Result<Ragged<f32>> {
    let ScorerConfig::Defensive(scorer) = &config.scorer else {
        return Err(Error::Unsupported {
            what: "another scorer in reference mode defensivekv",
            why: "the reference has one",
        });
    };
    let (tokens, window) = (layer.tokens() as usize, scorer.window as usize);
    if tokens <= window {
        let (needed, got) = (window as u64 + 1, tokens as u64);
        return Err(Error::TooFewQueries { method: "reference defensivekv", needed, got });
    }
    let (worst, mean, norms) = observe(backend, scorer, layer)?;
    let past = tokens - window;
    let before_window = past.saturating_sub(window);
    let lost: f32 = mean.iter().map(|row| row[before_window..past].iter().sum::<f32>()).sum();
    let beta = lost / mean.rows() as f32;
    let bound = (past as f64 * (1.0 - ratio(budget)?) - window as f64).trunc() as i64;

    let risk: Ragged<f32> = worst
        .iter()
        .zip(norms.iter())
        .map(|(row, norms)| {
            let row = &row[..past];
            let prior = row.iter().sum::<f32>() / past as f32;
            row.iter().zip(norms).map(|(&x, &norm)| x.max(prior) * norm).collect()
        })
        .collect();
    let max = risk.data().iter().copied().fold(f32::MIN, f32::max);
    let rows = risk.iter().zip(mean.iter()).map(|(risk, mean)| {
        let mean = &mean[..past];
        let first = first_set(mean, scorer.threshold - beta, bound);
        let mut row = risk.to_vec();
        let order: Ragged<f32> = [mean.to_vec()].into_iter().collect();
        for (_, t) in ranked(&order, |_, _| false).into_iter().take(first) {
            row[t as usize] = max;
        }
        row.resize(tokens, max);
        row
    });
    Ok(rows.collect())
}

/// Worst case over window and group, mean, and value norms by position over heads, each `[H, T]`.
fn observe<B: Backend>(
    backend: &B,
    scorer: &Defensive,
    layer: &LayerView<'_, B::Storage<'_>>,
) -> Result<(Ragged<f32>, Ragged<f32>, Ragged<f32>)> {
    let layers = std::slice::from_ref(layer);
    let op = WindowAttention {
        row_pool: Some(scorer.kernel),
        ..WindowAttention::plain(scorer.window, Reduce::Max)
    };
    let lens = segment_lens(layers);
    let (mut worst, mut mean, mut norms) =
        (backend.zeros(&lens)?, backend.zeros(&lens)?, backend.zeros(&lens)?);
    backend.window_attention(&op, layers, &mut worst, Some(&mut mean))?;
    backend.value_norm(ValueNorm::L1, layers, &mut norms)?;
    backend.scale_norms(NormScale::Heads, layers, &mut norms)?;
    Ok((backend.to_host(&worst)?, backend.to_host(&mean)?, backend.to_host(&norms)?))
}

/// Index of the first slot at which the sorted, normalised mass reaches the threshold (0 if none does), cut
/// to `bound`; a negative bound counts from the end, as slices do.
fn first_set(mean: &[f32], threshold: f32, bound: i64) -> usize {
    let mut sorted = mean.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let sum: f32 = mean.iter().sum();
    let mut mass = 0.0;
    let reached = sorted.iter().position(|&p| {
        mass += p / sum;
        mass >= threshold
    });
    match (reached.unwrap_or(0) as i64).min(bound) {
        first if first >= 0 => first as usize,
        from_end => (mean.len() as i64 + from_end).max(0) as usize,
    }
}

pub(super) fn select(
    config: &PolicyConfig,
    budget: Budget,
    tokens: u32,
    scores: &[Ragged<f32>],
) -> Result<Vec<Ragged<u32>>> {
    let share = tokens as f64 * (1.0 - ratio(budget)?);
    let global = matches!(config.layers, Layers::Global);
    if !global {
        return Ok(scores
            .iter()
            .map(|rows| best_of(rows, (share * rows.rows() as f64).trunc() as usize))
            .collect());
    }
    // Every layer has as many heads, or the published code fails to stack them.
    let heads = scores.first().map_or(0, Ragged::rows);
    if scores.iter().any(|rows| rows.rows() != heads) {
        return Err(Error::Unsupported {
            what: "layers with different heads in reference mode",
            why: "the published code stacks their scores",
        });
    }
    let total = (share * heads as f64 * scores.len() as f64).trunc() as usize;
    let all: Ragged<f32> =
        scores.iter().flat_map(|rows| rows.iter().map(<[f32]>::to_vec)).collect();
    let kept = best_of(&all, total);
    let layers = (0..scores.len())
        .map(|l| (l * heads..(l + 1) * heads).map(|s| kept.row(s).to_vec()).collect());
    Ok(layers.collect())
}

/// The `total` best entries of all rows, by row.
fn best_of(rows: &Ragged<f32>, total: usize) -> Ragged<u32> {
    let mut counts = vec![0; rows.rows()];
    for (h, _) in ranked(rows, |_, _| false).into_iter().take(total) {
        counts[h] += 1;
    }
    best(rows, &counts)
}
