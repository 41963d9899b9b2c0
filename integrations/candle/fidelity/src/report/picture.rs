//! Pictures: quality against budget, a curve per policy with its interval.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::{Report, Row};
use crate::variant::FULL;

/// The command line's: plotters needs one, and it is there on every machine.
static FONT: &[u8] = include_bytes!("../../../../../cli/assets/DejaVuSans-ascii.ttf");
const FAMILY: &str = "sans-serif";
const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 560.0;
/// Pixels of a PNG per logical pixel.
const PNG_SCALE: f64 = 2.0;
/// Okabe and Ito's palette for all kinds of colour vision; then again with hollow marks.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(80, 80, 80),
];

/// One chart.
pub struct Chart<'r> {
    title: String,
    axis: &'static str,
    rows: &'r [Row],
    /// Of values, to what the axis says.
    scale: f64,
}

/// Names and charts: answers by length and mode, loss and error by length.
pub fn pictures(report: &Report) -> Vec<(String, Chart<'_>)> {
    let mut all = Vec::new();
    for block in report.retrieval.iter().filter(|r| r.task.is_none() && !r.rows.is_empty()) {
        let (length, mode) = (block.length, block.mode.name());
        let title = format!("Answers found, {length} tokens, question-{mode}");
        let chart = Chart { title, axis: "answers found, %", rows: &block.rows, scale: 100.0 };
        all.push((format!("answers-{length}-{mode}"), chart));
    }
    for block in &report.continuation {
        let length = block.length;
        let title = format!("Loss above the full cache, {length} tokens");
        let chart = Chart { title, axis: "nats per token", rows: &block.loss, scale: 1.0 };
        all.push((format!("loss-{length}"), chart));
        let title = format!("Attention error, {length} tokens");
        let chart = Chart { title, axis: "relative L2 error", rows: &block.error, scale: 1.0 };
        all.push((format!("error-{length}"), chart));
    }
    all
}

/// Writes a chart as the suffix says.
pub fn save(chart: &Chart<'_>, path: &Path) -> Result<()> {
    register_font(FAMILY, FontStyle::Normal, FONT)
        .map_err(|_| anyhow!("the embedded font is broken"))?;
    let drawn = match path.extension().and_then(OsStr::to_str) {
        Some("svg") => {
            let size = (WIDTH as u32, HEIGHT as u32);
            draw(chart, &SVGBackend::new(path, size).into_drawing_area(), 1.0)
        }
        Some("png") => {
            let size = ((WIDTH * PNG_SCALE) as u32, (HEIGHT * PNG_SCALE) as u32);
            draw(chart, &BitMapBackend::new(path, size).into_drawing_area(), PNG_SCALE)
        }
        _ => bail!("{}: expected a name that ends in .svg or .png", path.display()),
    };
    drawn.map_err(|e| e.context(format!("writing {}", path.display())))
}

fn draw<B: DrawingBackend>(
    chart: &Chart<'_>,
    area: &DrawingArea<B, Shift>,
    scale: f64,
) -> Result<()> {
    let fail = |e: DrawingAreaErrorKind<B::ErrorType>| anyhow!("{e}");
    let size = |n: f64| (n * scale).round() as u32;
    let font = |n: f64| (FAMILY, n * scale).into_font();
    let points: Vec<&Row> = chart.rows.iter().filter(|r| r.kept > 0.0).collect();
    let ends = |value: fn(&Row) -> f64| points.iter().map(move |r| value(r));
    let low = ends(|r| r.kept).fold(1.0, f64::min) * 0.9;
    let top = ends(|r| r.estimate.high).fold(0.0, f64::max).max(1e-9) * chart.scale * 1.04;
    let bottom = ends(|r| r.estimate.low).fold(0.0, f64::min) * chart.scale;

    area.fill(&WHITE).map_err(fail)?;
    let mut context = ChartBuilder::on(area)
        .caption(&chart.title, font(18.0))
        .margin(size(12.0))
        .margin_right(size(180.0))
        .x_label_area_size(size(40.0))
        .y_label_area_size(size(56.0))
        // Budgets are chosen in doublings.
        .build_cartesian_2d((low..1.05).log_scale(), bottom..top)
        .map_err(fail)?;
    context
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .x_label_formatter(&|_| String::new())
        .light_line_style(WHITE)
        .x_desc("slots kept")
        .y_desc(chart.axis)
        .label_style(font(11.0))
        .draw()
        .map_err(fail)?;

    let at = |kept: f64, value: f64| context.plotting_area().map_coordinate(&(kept, value));
    let mut budgets: Vec<f64> = points.iter().map(|r| r.kept).collect();
    budgets.sort_by(f64::total_cmp);
    budgets.dedup_by(|a, b| at(*a, bottom).0 - at(*b, bottom).0 < (30.0 * scale) as i32);
    let centred = font(11.0).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
    for share in budgets {
        let (x, y) = at(share, bottom);
        let text = format!("{:.0}%", share * 100.0);
        area.draw(&Text::new(text, (x, y + size(8.0) as i32), centred.clone())).map_err(fail)?;
    }

    let mut policies: Vec<&str> = points.iter().map(|r| r.variant.policy.as_str()).collect();
    policies.dedup();
    for (index, policy) in policies.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let hollow = index / COLORS.len() % 2 == 1;
        let mut curve: Vec<&&Row> = points.iter().filter(|r| r.variant.policy == *policy).collect();
        curve.sort_by(|a, b| a.kept.total_cmp(&b.kept));
        // Beside each other, where intervals would hide each other.
        let aside = 1.0 + 0.006 * (index as f64 - policies.len() as f64 / 2.0);
        let value = |v: f64| v * chart.scale;
        // The full cache is a level to compare with, wherever there is anything beside it.
        if *policy == FULL
            && let Some(full) = curve.first()
        {
            let level = [(low, value(full.estimate.mean)), (full.kept, value(full.estimate.mean))];
            let level = LineSeries::new(level, color.mix(0.4).stroke_width(size(1.0)));
            context.draw_series(level).map_err(fail)?;
        }
        let line = curve.iter().map(|r| (r.kept * aside, value(r.estimate.mean)));
        context.draw_series(LineSeries::new(line, color.stroke_width(size(2.0)))).map_err(fail)?;
        let bars = curve.iter().map(|r| {
            let (x, e) = (r.kept * aside, r.estimate);
            let ends = [(x, value(e.low)), (x, value(e.high))];
            PathElement::new(ends.to_vec(), color.mix(0.35).stroke_width(size(1.0)))
        });
        context.draw_series(bars).map_err(fail)?;
        let radius = size(4.0);
        for (fill, radius) in [(color, radius), (if hollow { WHITE } else { color }, radius / 2)] {
            let marks = curve.iter().map(|r| {
                Circle::new((r.kept * aside, value(r.estimate.mean)), radius, fill.filled())
            });
            context.draw_series(marks).map_err(fail)?;
        }
        // The key, right of the panel.
        let at = ((WIDTH - 168.0) * scale, (60.0 + 20.0 * index as f64) * scale);
        let at = (at.0 as i32, at.1 as i32);
        area.draw(&Circle::new(at, radius, color.filled())).map_err(fail)?;
        if hollow {
            area.draw(&Circle::new(at, radius / 2, WHITE.filled())).map_err(fail)?;
        }
        let text = (at.0 + size(10.0) as i32, at.1 - size(6.0) as i32);
        area.draw(&Text::new(*policy, text, font(12.0))).map_err(fail)?;
    }
    area.present().map_err(fail)
}
