//! kvpress 0.5.5: budgets truncated in double precision, windows padded with `max + 1` and competing inside
//! the budget, the pyramid that falls back to equal layers, Ada-KV by masks.
//!
//! `n_kept = max(1, trunc(T · (1 - r)))`, left to right; `r = 0` returns the cache untouched.

use super::{alpha, best, beta, ranked, ratio, window};
use crate::budget::Budget;
use crate::error::Result;
use crate::policy::{PolicyConfig, TwoStage};
use crate::ragged::Ragged;
use crate::score::ScorerConfig;

pub(super) fn select(
    config: &PolicyConfig,
    budget: Budget,
    tokens: u32,
    (layer, layers): (usize, usize),
    scores: &Ragged<f32>,
    norms: &Option<Ragged<f32>>,
) -> Result<Ragged<u32>> {
    let removed = ratio(budget)?;
    let (len, heads) = (tokens as usize, scores.rows());
    if removed == 0.0 {
        return Ok((0..heads).map(|_| (0..tokens).collect()).collect());
    }
    let share = tokens as f64 * (1.0 - removed);
    let kept = (share.trunc() as usize).max(1);
    let scores = padded(config, tokens, share.trunc() as usize, scores);
    if let Some(beta) = beta(config) {
        let window = f64::from(window(config).unwrap_or(0));
        let n = pyramid(tokens as f64, share, window, beta as f64, layer, layers).min(len);
        return Ok(best(&scores, &vec![n; heads]));
    }
    let mut counts = vec![kept; heads];
    let mut safe = 0;
    if let Some(alpha) = alpha(config) {
        safe = (kept as f64 * alpha.as_f64()).trunc() as usize;
        safe = safe.max(usize::from(alpha.num() > 0));
        counts = contest(&scores, safe, kept * heads);
    }
    Ok(match (&config.two_stage, norms) {
        (Some(stage), Some(norms)) => {
            let first: Vec<usize> = if alpha(config).is_some() {
                // Budgets times the share in single precision, as tensors have it.
                let share = stage.first_stage.as_f64() as f32;
                counts.iter().map(|&n| ((n as f32 * share).trunc() as usize).max(safe)).collect()
            } else {
                let share = (1.0 - removed) * tokens as f64 * stage.first_stage.as_f64();
                let floor = usize::from(stage.first_stage.num() > 0);
                vec![(share.trunc() as usize).max(floor); heads]
            };
            two_stage(stage, &scores, norms, &first, &counts)
        }
        _ => best(&scores, &counts),
    })
}

/// The window's scores as published; StreamingLLM has no other scores.
fn padded(config: &PolicyConfig, tokens: u32, kept: usize, scores: &Ragged<f32>) -> Ragged<f32> {
    let len = tokens as usize;
    if let ScorerConfig::Streaming(_) = config.scorer {
        let sinks = config.protect.sinks as usize;
        let hole = sinks..(sinks + len - kept.min(len));
        let row = |_| (0..len).map(|t| f32::from(u8::from(!hole.contains(&t)))).collect();
        return (0..scores.rows()).map(row).collect();
    }
    let Some(window) = window(config) else { return scores.clone() };
    let past = len.saturating_sub(window as usize);
    let max = scores.iter().flat_map(|row| &row[..past]).copied().fold(f32::MIN, f32::max);
    let pad = |row: &[f32]| {
        let mut row = row.to_vec();
        row[past..].fill(max + 1.0);
        row
    };
    scores.iter().map(pad).collect()
}

/// Rows kept by a layer of `PyramidKVPress`, window included.
fn pyramid(tokens: f64, share: f64, window: f64, beta: f64, layer: usize, layers: usize) -> usize {
    // `(w + a) - w` need not be `a`.
    let evictable = (window + share) - window;
    let mut min = evictable / beta;
    let mut max = evictable * 2.0 - min;
    if max >= tokens - window {
        max = tokens - window;
        min = evictable * 2.0 - max;
    }
    if !(tokens >= max && max >= min && min >= window) {
        return (share.round_ties_even() as usize).max(1);
    }
    let step = if layers > 1 { (max - min) / (layers - 1) as f64 } else { 0.0 };
    (max - layer as f64 * step).round_ties_even() as usize
}

/// Heads of the `total` best entries, the `safe` best of each head first.
fn contest(scores: &Ragged<f32>, safe: usize, total: usize) -> Vec<usize> {
    let pinned = best(scores, &vec![safe; scores.rows()]);
    let mut counts = vec![0; scores.rows()];
    let order = ranked(scores, |h, t| pinned.row(h).binary_search(&t).is_ok());
    for (h, _) in order.into_iter().take(total) {
        counts[h] += 1;
    }
    counts
}

/// The best `first[h]` by score, then by `(score + ε) · ν` up to `counts[h]`.
fn two_stage(
    stage: &TwoStage,
    scores: &Ragged<f32>,
    norms: &Ragged<f32>,
    first: &[usize],
    counts: &[usize],
) -> Ragged<u32> {
    let pinned = best(scores, first);
    let second = scores
        .iter()
        .zip(norms.iter())
        .enumerate()
        .map(|(h, (row, norms))| {
            let weigh = |(t, (&s, &norm)): (usize, (&f32, &f32))| {
                let pin = pinned.row(h).binary_search(&(t as u32)).is_ok();
                if pin { f32::MAX } else { (s + stage.epsilon) * norm }
            };
            row.iter().zip(norms).enumerate().map(weigh).collect()
        })
        .collect();
    best(&second, counts)
}
