//! The map of a plan: above, which share of its slots each head of each layer keeps; below, which positions
//! survive in each head. Dark is kept, light is freed.
//!
//! Layers run to the right and heads downwards, since models have more layers than KV heads.

use anyhow::{Result, ensure};
use kvbudget::{Plan, Position};

use super::figure::{Anchor, Color, FAINT, Figure, INK};
use crate::commands::bytes;

const LEFT: f64 = 74.0;
const WIDTH: f64 = 780.0;
const RIGHT: f64 = 96.0;
/// More heads than any model has: the picture's size, and its memory, grow with them.
const MAX_HEADS: usize = 4096;
const MAX_LAYERS: usize = 512;
/// ColorBrewer's YlGnBu: sequential in lightness, told apart with every kind of colour vision.
const PALETTE: [[u8; 3]; 9] = [
    [255, 255, 217],
    [237, 248, 177],
    [199, 233, 180],
    [127, 205, 187],
    [65, 182, 196],
    [29, 145, 192],
    [34, 94, 168],
    [37, 52, 148],
    [8, 29, 88],
];
const ABSENT: Color = plotters::style::RGBColor(240, 240, 240);

/// Draws a plan.
pub fn figure(plan: &Plan) -> Result<Figure> {
    let layers = plan.layers.len();
    let heads: usize = plan.layers.iter().map(|l| l.rows()).sum();
    ensure!(
        layers > 0 && heads > 0 && plan.tokens > 0,
        "the plan is empty: there is nothing to draw"
    );
    ensure!(
        layers <= MAX_LAYERS && heads <= MAX_HEADS,
        "the plan has {heads} heads in {layers} layers; at most {MAX_HEADS} in {MAX_LAYERS} can be drawn"
    );
    let tall = plan.layers.iter().map(|l| l.rows()).max().unwrap_or(0);
    let cell = (200.0 / tall as f64).clamp(4.0, 36.0);
    let row = (320.0 / heads as f64).clamp(2.0, 14.0);
    let gap = if row > 6.0 { 5.0 } else { 2.0 };

    let budgets_top = 104.0;
    let budgets_bottom = budgets_top + cell * tall as f64;
    let survivors_top = budgets_bottom + 84.0;
    let survivors_bottom = survivors_top + row * heads as f64 + gap * (layers - 1) as f64;
    let all_top = survivors_bottom + 12.0;
    let mut figure = Figure::new(LEFT + WIDTH + RIGHT, all_top + 16.0 + 52.0);

    let slots = plan.layers.iter().map(|l| l.total() as f64).sum::<f64>();
    let full = heads as f64 * f64::from(plan.tokens);
    let title = format!("{} at {}", plan.policy, plan.budget);
    figure.text((LEFT, 26.0), title, 20.0, Anchor::Left, INK);
    let facts = format!(
        "{slots} of {full} slots ({}) · {layers} layers, {heads} kv heads · {} tokens · {}",
        percent(slots / full),
        plan.tokens,
        bytes(plan.bytes)
    );
    figure.text((LEFT, 50.0), facts, 12.0, Anchor::Left, FAINT);

    budgets(&mut figure, plan, budgets_top, cell, tall);
    survivors(&mut figure, plan, survivors_top, row, gap);
    everyone(&mut figure, plan, all_top, heads);
    Ok(figure)
}

/// Share of its slots that each head keeps.
fn budgets(figure: &mut Figure, plan: &Plan, top: f64, cell: f64, tall: usize) {
    let share = |kept: &[Position]| kept.len() as f64 / f64::from(plan.tokens);
    let shares = plan.layers.iter().flat_map(|heads| heads.iter().map(share));
    let most = shares.fold(0.0, f64::max).max(1e-9);
    let scale = (most * 20.0).ceil() / 20.0;
    let width = WIDTH / plan.layers.len() as f64;
    figure.text(
        (LEFT, top - 18.0),
        "Share of its slots that each head keeps",
        13.0,
        Anchor::Left,
        INK,
    );
    for (l, heads) in plan.layers.iter().enumerate() {
        for h in 0..tall {
            let at = (LEFT + l as f64 * width, top + h as f64 * cell);
            let fill = match h < heads.rows() {
                true => color(share(heads.row(h)) / scale),
                false => ABSENT,
            };
            figure.rect(at, width - seam(width), cell - seam(cell), fill);
            if h < heads.rows() && width >= 38.0 && cell >= 14.0 {
                let middle = (at.0 + width / 2.0, at.1 + cell / 2.0);
                let text = percent(share(heads.row(h)));
                figure.text(middle, text, 11.0, Anchor::Middle, on(fill));
            }
        }
    }
    let bottom = top + cell * tall as f64;
    for l in labelled(plan.layers.len(), WIDTH, 26.0) {
        let x = LEFT + (l as f64 + 0.5) * width;
        figure.text((x, bottom + 12.0), l.to_string(), 11.0, Anchor::Middle, INK);
    }
    figure.text((LEFT + WIDTH / 2.0, bottom + 30.0), "layer", 11.0, Anchor::Middle, FAINT);
    for h in labelled(tall, cell * tall as f64, 14.0) {
        let y = top + (h as f64 + 0.5) * cell;
        figure.text((LEFT - 8.0, y), h.to_string(), 11.0, Anchor::Right, INK);
    }
    figure.text((LEFT - 30.0, (top + bottom) / 2.0), "head", 11.0, Anchor::Right, FAINT);
    colour_bar(figure, top, bottom.max(top + 60.0), scale);
}

/// Which positions each head keeps: a row per head, layer after layer.
fn survivors(figure: &mut Figure, plan: &Plan, top: f64, row: f64, gap: f64) {
    let title = "Positions that survive: a row per head, heads of a layer together";
    figure.text((LEFT, top - 18.0), title, 13.0, Anchor::Left, INK);
    let heads: usize = plan.layers.iter().map(|l| l.rows()).sum();
    let bins = bins(plan, heads);
    let mut y = top;
    let mut last_label = f64::NEG_INFINITY;
    for (l, heads) in plan.layers.iter().enumerate() {
        let height = row * heads.rows() as f64;
        let middle = y + height / 2.0;
        if middle - last_label >= 13.0 {
            let text = if l == 0 { "layer 0".to_owned() } else { l.to_string() };
            figure.text((LEFT - 8.0, middle), text, 11.0, Anchor::Right, INK);
            last_label = middle;
        }
        for kept in heads.iter() {
            strip(figure, plan, &[kept], bins, y, row - seam(row));
            y += row;
        }
        y += gap;
    }
    colour_bar(figure, top, (top + 120.0).min((y - gap).max(top + 60.0)), 1.0);
}

/// All heads in one row, and the axis of positions.
fn everyone(figure: &mut Figure, plan: &Plan, top: f64, heads: usize) {
    let height = 16.0;
    let kept: Vec<&[Position]> = plan.layers.iter().flat_map(|heads| heads.iter()).collect();
    strip(figure, plan, &kept, bins(plan, heads), top, height);
    figure.text((LEFT - 8.0, top + height / 2.0), "all", 11.0, Anchor::Right, INK);
    let bottom = top + height;
    let step = nice_step(f64::from(plan.tokens), 8.0);
    let mut at = 0.0;
    while at <= f64::from(plan.tokens) {
        let x = LEFT + WIDTH * at / f64::from(plan.tokens);
        figure.line(&[(x, bottom + 1.0), (x, bottom + 5.0)], 1.0, FAINT);
        figure.text((x, bottom + 14.0), format!("{at}"), 11.0, Anchor::Middle, INK);
        at += step;
    }
    figure.text((LEFT + WIDTH / 2.0, bottom + 32.0), "position", 11.0, Anchor::Middle, FAINT);
}

/// White between neighbours that have room for it.
fn seam(size: f64) -> f64 {
    if size >= 6.0 { 1.0 } else { 0.0 }
}

/// Bins of positions in a row: single tokens where they have room, fewer where there are many rows.
fn bins(plan: &Plan, heads: usize) -> usize {
    (plan.tokens as usize).min(if heads > 64 { 260 } else { 780 })
}

/// One row of bins, dark by the share of their positions that is kept. Equal neighbours are one rectangle.
fn strip(
    figure: &mut Figure,
    plan: &Plan,
    heads: &[&[Position]],
    bins: usize,
    y: f64,
    height: f64,
) {
    const LEVELS: f64 = 24.0;
    let tokens = plan.tokens as usize;
    let bin_of = |p: usize| p * bins / tokens;
    let mut sizes = vec![0u64; bins];
    let first = |bin: usize| (bin * tokens).div_ceil(bins);
    for (bin, size) in sizes.iter_mut().enumerate() {
        *size = (first(bin + 1) - first(bin)) as u64 * heads.len() as u64;
    }
    let mut kept = vec![0u64; bins];
    for position in heads.iter().copied().flatten() {
        kept[bin_of(position.index())] += 1;
    }
    let level = |bin: usize| (kept[bin] as f64 / sizes[bin] as f64 * LEVELS).ceil();
    let x = |bin: usize| LEFT + WIDTH * bin as f64 / bins as f64;
    figure.rect((LEFT, y), WIDTH, height, color(0.0));
    let mut start = 0;
    for end in 1..=bins {
        if end < bins && level(end) == level(start) {
            continue;
        }
        if level(start) > 0.0 {
            let fill = color(level(start) / LEVELS);
            figure.rect((x(start), y), x(end) - x(start), height, fill);
        }
        start = end;
    }
}

/// The key to colours, right of a panel: 0 at the bottom, `scale` at the top.
fn colour_bar(figure: &mut Figure, top: f64, bottom: f64, scale: f64) {
    let x = LEFT + WIDTH + 18.0;
    let steps = 40;
    for i in 0..steps {
        let (start, middle) = (f64::from(i), f64::from(i) + 0.5);
        let y = top + (bottom - top) * start / f64::from(steps);
        // Down to the end, under the next: no seams, however the picture is scaled.
        figure.rect((x, y), 14.0, bottom - y, color(1.0 - middle / f64::from(steps)));
    }
    for (value, y) in [(0.0, bottom - 1.0), (0.5, (top + bottom) / 2.0), (1.0, top)] {
        figure.line(&[(x + 14.0, y), (x + 18.0, y)], 1.0, FAINT);
        figure.text((x + 22.0, y), percent(value * scale), 11.0, Anchor::Left, INK);
    }
}

/// Every n-th index, so that labels have `room` pixels each.
fn labelled(count: usize, length: f64, room: f64) -> impl Iterator<Item = usize> {
    let most = (length / room).floor().max(1.0);
    let step = nice_step(count as f64, most).max(1.0) as usize;
    (0..count).step_by(step)
}

/// The smallest of 1, 2, 5, 10, 20 … that cuts `length` into at most `most` steps.
fn nice_step(length: f64, most: f64) -> f64 {
    let mut step = 1.0;
    loop {
        for nice in [1.0, 2.0, 5.0] {
            if length / (step * nice) <= most {
                return step * nice;
            }
        }
        step *= 10.0;
    }
}

fn percent(share: f64) -> String {
    let value = share * 100.0;
    let whole = value.round();
    if (value - whole).abs() < 0.05 || value >= 10.0 {
        format!("{whole:.0}%")
    } else {
        format!("{value:.1}%")
    }
}

/// Light at 0, dark at 1.
fn color(value: f64) -> Color {
    let at = value.clamp(0.0, 1.0) * (PALETTE.len() - 1) as f64;
    let low = (at as usize).min(PALETTE.len() - 2);
    let part = at - low as f64;
    let mix = |i: usize| {
        let (a, b) = (f64::from(PALETTE[low][i]), f64::from(PALETTE[low + 1][i]));
        (a + (b - a) * part).round() as u8
    };
    plotters::style::RGBColor(mix(0), mix(1), mix(2))
}

/// Ink that can be read on a fill.
fn on(fill: Color) -> Color {
    let luma = 0.299 * f64::from(fill.0) + 0.587 * f64::from(fill.1) + 0.114 * f64::from(fill.2);
    if luma > 140.0 { INK } else { plotters::style::RGBColor(255, 255, 255) }
}
