//! Output error against budget, a curve per policy: which method to take at which memory.
//!
//! Both axes are logarithmic: budgets are chosen in doublings, and good methods differ by parts of a small error.
//! Labels stand at the ends of the curves, in their order, instead of in a legend; the policies that
//! the sample tells apart best keep a colour each, the same in every picture.

use super::figure::{Anchor, Color, FAINT, Figure, GRID, INK};
use crate::eval::{Results, Row};

const LEFT: f64 = 74.0;
const TOP: f64 = 104.0;
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 400.0;
const LABELS: f64 = 190.0;
const LABEL_GAP: f64 = 17.0;
/// Okabe and Ito's palette for all kinds of colour vision; then again with hollow marks.
const COLORS: [[u8; 3]; 7] = [
    [0, 114, 178],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [230, 159, 0],
    [86, 180, 233],
    [80, 80, 80],
];

struct Curve<'a> {
    policy: &'a str,
    /// Share kept and error, ascending in the share.
    points: Vec<(f64, f64)>,
    color: Color,
    hollow: bool,
}

/// Draws the mean output error of every policy against the share of slots kept.
pub fn figure(results: &Results) -> Figure {
    let curves = curves(results);
    let shares = || curves.iter().flat_map(|c| c.points.iter().map(|p| p.0));
    let errors = || curves.iter().flat_map(|c| c.points.iter().map(|p| p.1));
    let (low, high) = (shares().fold(1.0, f64::min).max(1e-4), shares().fold(0.0, f64::max));
    let worst = errors().fold(1e-6, f64::max);
    let least = errors().filter(|&e| e > worst * 1e-3).fold(worst, f64::min);
    let ticks = ticks(least, worst);
    let (bottom, top) = (ticks[0], ticks[ticks.len() - 1]);
    // Budgets are chosen in doublings.
    let span = (high / low).ln().max(1e-9);
    let x = |share: f64| LEFT + 14.0 + (WIDTH - 28.0) * (share.max(low) / low).ln() / span;
    let decades = (top / bottom).ln();
    let y = |error: f64| TOP + HEIGHT * (top / error.max(bottom)).ln() / decades;

    let mut figure = Figure::new(LEFT + WIDTH + LABELS, TOP + HEIGHT + 64.0);
    figure.text((LEFT, 26.0), "Output error against budget", 20.0, Anchor::Left, INK);
    let dump = &results.dump;
    let facts = format!(
        "{} · {} layers, {} kv heads, {} tokens · lower is better",
        dump.name, dump.layers, dump.kv_heads, dump.tokens
    );
    figure.text((LEFT, 50.0), facts, 12.0, Anchor::Left, FAINT);
    for &value in &ticks {
        figure.line(&[(LEFT, y(value)), (LEFT + WIDTH, y(value))], 1.0, GRID);
        figure.text((LEFT - 8.0, y(value)), format!("{value}"), 11.0, Anchor::Right, INK);
    }
    let mut kept: Vec<f64> = shares().collect();
    kept.sort_by(f64::total_cmp);
    kept.dedup_by(|a, b| x(*a) - x(*b) < 30.0);
    for share in kept {
        let text = format!("{:.3}", share * 100.0);
        let text = format!("{}%", text.trim_end_matches('0').trim_end_matches('.'));
        figure.line(&[(x(share), TOP + HEIGHT), (x(share), TOP + HEIGHT + 5.0)], 1.0, FAINT);
        figure.text((x(share), TOP + HEIGHT + 16.0), text, 11.0, Anchor::Middle, INK);
    }
    let below = (LEFT + WIDTH / 2.0, TOP + HEIGHT + 38.0);
    figure.text(below, "slots kept", 11.0, Anchor::Middle, FAINT);
    figure.text(
        (LEFT, TOP - 14.0),
        "mean relative L2 error, logarithmic",
        11.0,
        Anchor::Left,
        FAINT,
    );

    for curve in &curves {
        let points: Vec<_> = curve.points.iter().map(|&(s, e)| (x(s), y(e))).collect();
        figure.line(&points, 2.0, curve.color);
        points.iter().for_each(|&at| mark(&mut figure, at, curve));
    }
    let ends: Vec<f64> = curves.iter().map(|c| c.points.last().map_or(0.0, |p| y(p.1))).collect();
    for (curve, (end, label)) in curves.iter().zip(ends.iter().zip(spread(&ends))) {
        let at = LEFT + WIDTH + 24.0;
        figure.line(&[(x(high) + 6.0, *end), (at - 12.0, label)], 1.0, curve.color);
        mark(&mut figure, (at - 6.0, label), curve);
        figure.text((at + 4.0, label), curve.policy, 12.0, Anchor::Left, INK);
    }
    figure
}

/// One curve per policy, the largest error at the largest budget first.
fn curves(results: &Results) -> Vec<Curve<'_>> {
    let mut curves: Vec<Curve<'_>> = Vec::new();
    for row in &results.rows {
        let share = |row: &Row| row.slots as f64 / results.dump.full_slots as f64;
        let point = (share(row), row.output_error.mean);
        match curves.iter_mut().find(|c| c.policy == row.policy) {
            Some(curve) => curve.points.push(point),
            None => {
                let [r, g, b] = COLORS[curves.len() % COLORS.len()];
                curves.push(Curve {
                    policy: &row.policy,
                    points: vec![point],
                    color: plotters::style::RGBColor(r, g, b),
                    hollow: curves.len() / COLORS.len() % 2 == 1,
                });
            }
        }
    }
    curves.iter_mut().for_each(|c| c.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let last = |c: &Curve<'_>| c.points.last().map_or(0.0, |p| p.1);
    curves.sort_by(|a, b| last(b).total_cmp(&last(a)));
    curves
}

/// 1, 1.5, 2, 3, 5, 7 times powers of ten, from the last one not above `low` to the first one not below `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let from = low.log10().floor() as i32;
    let all = (from..).flat_map(|power| {
        // Divided rather than multiplied by an inexact negative power: 0.2 prints as 0.2.
        let scale = |m: f64| if power < 0 { m / 10f64.powi(-power) } else { m * 10f64.powi(power) };
        [1.0, 1.5, 2.0, 3.0, 5.0, 7.0].map(scale)
    });
    let mut ticks: Vec<f64> = Vec::new();
    for tick in all {
        if tick <= low {
            ticks.clear();
        }
        ticks.push(tick);
        if tick >= high && ticks.len() > 1 {
            return ticks;
        }
    }
    ticks
}

fn mark(figure: &mut Figure, at: (f64, f64), curve: &Curve<'_>) {
    figure.disc(at, 4.5, curve.color);
    if curve.hollow {
        figure.disc(at, 2.5, plotters::style::RGBColor(255, 255, 255));
    }
}

/// Heights of labels whose wishes ascend: at least a gap apart, none below the panel if there is room above.
fn spread(wishes: &[f64]) -> Vec<f64> {
    let mut places: Vec<f64> = Vec::with_capacity(wishes.len());
    for &wish in wishes {
        let free = places.last().map_or(f64::NEG_INFINITY, |last| last + LABEL_GAP);
        places.push(wish.max(free));
    }
    let mut limit = TOP + HEIGHT;
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - LABEL_GAP;
    }
    places
}
