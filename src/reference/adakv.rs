//! FFY0/AdaKV: capacities per head with the window beside them, budgets rounded head by head so that they miss
//! their sum, and the pyramid in integer steps that over-spends, or inverts on short prompts.
//!
//! A capacity `C` includes the window of `w`; `b = C - w` slots are contested, `n = T - w` evictable.

use super::{alpha, best, beta, ranked, window};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::policy::PolicyConfig;
use crate::ragged::Ragged;

pub(super) fn select(
    config: &PolicyConfig,
    budget: Budget,
    tokens: u32,
    (layer, layers): (usize, usize),
    scores: &Ragged<f32>,
) -> Result<Ragged<u32>> {
    let capacity = match budget {
        Budget::TokensPerHead(n) => n as i64,
        Budget::Keep(keep) => keep.of(tokens.into()) as i64,
        _ => {
            return Err(Error::Budget {
                got: budget.to_string(),
                expected: "this reference takes tokens per head (256/head) or a fraction",
            });
        }
    };
    let window = i64::from(window(config).unwrap_or(0));
    let past = i64::from(tokens) - window;
    let mut evictable = capacity - window;
    if evictable < 0 {
        return Err(Error::Budget {
            got: budget.to_string(),
            expected: "this reference fails below its window",
        });
    }
    if let Some(beta) = beta(config) {
        evictable = pyramid(evictable, past, beta as i64, layer as i64, layers as i64);
    }
    if evictable > past {
        return Ok(scores.iter().map(|row| (0..row.len() as u32).collect()).collect());
    }
    let past_scores: Ragged<f32> = scores.iter().map(|row| row[..past as usize].to_vec()).collect();
    let counts = match alpha(config) {
        None => vec![evictable as usize; scores.rows()],
        Some(alpha) => blended(&past_scores, evictable, alpha.as_f64()),
    };
    let kept = best(&past_scores, &counts);
    let with_window = |row: &[u32]| {
        let window = past as u32..tokens;
        row.iter().copied().chain(window).collect()
    };
    Ok(kept.iter().map(with_window).collect())
}

/// Slots of a layer, without its window: floor division, whatever its sign.
fn pyramid(mean: i64, past: i64, beta: i64, layer: i64, layers: i64) -> i64 {
    let mut min = mean / beta.max(1);
    let mut max = 2 * mean - min;
    if max >= past {
        max = past;
        min = 2 * mean - max;
    }
    let step = if layers > 1 { (max - min).div_euclid(layers - 1) } else { 0 };
    max - layer * step
}

/// `rint((1 - α)·f + ⌊α·b⌋)` per head in single precision, `f` being what each wins of `H·b` slots.
fn blended(scores: &Ragged<f32>, mean: i64, alpha: f64) -> Vec<usize> {
    let heads = scores.rows();
    let mut won = vec![0usize; heads];
    for (h, _) in ranked(scores, |_, _| false).into_iter().take(heads * mean as usize) {
        won[h] += 1;
    }
    let floor = (mean as f64 * alpha).trunc() as f32;
    let rest = (1.0 - alpha) as f32;
    won.into_iter().map(|f| (f as f32 * rest + floor).round_ties_even() as usize).collect()
}
