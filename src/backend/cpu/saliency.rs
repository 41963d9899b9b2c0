//! How tokens of a stretch stand out by the norms of their hidden rows, added to the scores of their slots.
//!
//! In: norms `[1, tokens, 1]` f32; rows `[H, len]` f32, in place. Source: GUI-KV (arXiv 2510.00536), spatial saliency.
//! A norm that is not finite makes the whole stretch NaN.
//!
//! Cost: four passes over the stretch's norms and one over its slots. Sums are f64 in the order of the tokens.

use super::HostLayer;
use super::tile;
use crate::backend::check;
use crate::backend::ops::Saliency;
use crate::error::Result;
use crate::ragged::Ragged;

/// Added to the deviation, so that equal norms share alike.
const EPS: f64 = 1e-8;

pub(super) fn run(
    op: &Saliency<'_>,
    layers: &[HostLayer<'_>],
    rows: &mut Ragged<f32>,
) -> Result<()> {
    check::saliency(op, layers, rows)?;
    let mut first = 0;
    for (layer, stretch) in layers.iter().zip(op.stretches) {
        let segments = first..first + layer.shape().kv_heads();
        first = segments.end;
        if stretch.is_empty() {
            continue;
        }
        let mut norms = vec![0.0; stretch.len()];
        let tokens = stretch.start as usize..stretch.end as usize;
        tile::widen_rows(layer.hidden_norms("saliency")?, 0, tokens, &mut norms);
        let shares = shares(&norms, f64::from(op.temperature));
        for (head, s) in segments.enumerate() {
            let slots = [stretch.start, stretch.end].map(|p| layer.slots_before(head, p));
            for (slot, x) in (slots[0]..).zip(&mut rows.row_mut(s)[slots[0]..slots[1]]) {
                let position = layer.positions().map_or(slot, |p| p[head][slot].index());
                let share = shares[position - stretch.start as usize];
                *x += (f64::from(op.weight) * share) as f32;
            }
        }
    }
    Ok(())
}

/// `softmax(z / temperature)` of the norms' z-scores.
fn shares(norms: &[f32], temperature: f64) -> Vec<f64> {
    let mean = norms.iter().map(|&r| f64::from(r)).sum::<f64>() / norms.len() as f64;
    let squares: f64 = norms.iter().map(|&r| (f64::from(r) - mean).powi(2)).sum();
    let deviation = (squares / (norms.len() - 1).max(1) as f64).sqrt() + EPS;
    let most = norms.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Relative to the largest, which the mean then has no part in.
    let weigh = |&r: &f32| ((f64::from(r) - f64::from(most)) / deviation / temperature).exp();
    let weights: Vec<f64> = norms.iter().map(weigh).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}
