//! A figure: rectangles, lines and texts in logical pixels, drawn by plotters' SVG or bitmap backend.
//!
//! Text needs a font that is there on every machine, so a subset of DejaVu Sans is embedded. It is wide: what
//! fits in it also fits in whatever font an SVG viewer puts in its place.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontStyle, register_font};

static FONT: &[u8] = include_bytes!("../../assets/DejaVuSans-ascii.ttf");
const FAMILY: &str = "sans-serif";
/// Pixels of a PNG per logical pixel: sharp on screens of today.
const PNG_SCALE: f64 = 2.0;
/// The bitmap backend centres a box above the letters; by this share of the size it is too high.
const PNG_TEXT_DROP: f64 = 0.14;

/// Shapes on a white ground, later ones over earlier ones.
pub struct Figure {
    width: u32,
    height: u32,
    shapes: Vec<Shape>,
}

/// Where a text's point lies on the text.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Left,
    Middle,
    Right,
}

pub(super) type Color = RGBColor;
pub(super) const INK: Color = RGBColor(32, 32, 32);
pub(super) const FAINT: Color = RGBColor(110, 110, 110);
pub(super) const GRID: Color = RGBColor(225, 225, 225);

enum Shape {
    Rect { x: f64, y: f64, width: f64, height: f64, fill: Color },
    Line { points: Vec<(f64, f64)>, width: f64, color: Color },
    Disc { x: f64, y: f64, radius: f64, fill: Color },
    Text { x: f64, y: f64, text: String, size: f64, anchor: Anchor, color: Color },
}

impl Figure {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self { width: width.ceil() as u32, height: height.ceil() as u32, shapes: Vec::new() }
    }

    pub(super) fn rect(&mut self, (x, y): (f64, f64), width: f64, height: f64, fill: Color) {
        self.shapes.push(Shape::Rect { x, y, width, height, fill });
    }

    pub(super) fn line(&mut self, points: &[(f64, f64)], width: f64, color: Color) {
        self.shapes.push(Shape::Line { points: points.to_vec(), width, color });
    }

    pub(super) fn disc(&mut self, (x, y): (f64, f64), radius: f64, fill: Color) {
        self.shapes.push(Shape::Disc { x, y, radius, fill });
    }

    /// Text whose vertical middle is at `y`.
    pub(super) fn text(
        &mut self,
        (x, y): (f64, f64),
        text: impl Into<String>,
        size: f64,
        anchor: Anchor,
        color: Color,
    ) {
        self.shapes.push(Shape::Text { x, y, text: text.into(), size, anchor, color });
    }

    /// Writes the figure as the suffix says.
    pub fn save(&self, path: &Path) -> Result<()> {
        register_font(FAMILY, FontStyle::Normal, FONT)
            .map_err(|_| anyhow!("the embedded font is broken"))?;
        let drawn = match path.extension().and_then(OsStr::to_str) {
            Some("svg") => {
                let size = (self.width, self.height);
                self.draw(&SVGBackend::new(path, size).into_drawing_area(), 1.0, 0.0)
            }
            Some("png") => {
                let pixels = |n: u32| (f64::from(n) * PNG_SCALE) as u32;
                let size = (pixels(self.width), pixels(self.height));
                let area = BitMapBackend::new(path, size).into_drawing_area();
                self.draw(&area, PNG_SCALE, PNG_TEXT_DROP)
            }
            _ => bail!("{}: expected a name that ends in .svg or .png", path.display()),
        };
        drawn.map_err(|e| e.context(format!("writing {}", path.display())))
    }

    /// Draws at `scale` pixels per logical pixel, texts lower by `drop` of their size.
    fn draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
        scale: f64,
        drop: f64,
    ) -> Result<()> {
        let fail = |e: DrawingAreaErrorKind<B::ErrorType>| anyhow!("{e}");
        let at = |x: f64, y: f64| ((x * scale).round() as i32, (y * scale).round() as i32);
        area.fill(&WHITE).map_err(fail)?;
        for shape in &self.shapes {
            match shape {
                Shape::Rect { x, y, width, height, fill } => {
                    let (left, top) = at(*x, *y);
                    let (right, bottom) = at(x + width, y + height);
                    // However thin, a pixel is left of it.
                    let corners = [(left, top), (right.max(left + 1), bottom.max(top + 1))];
                    area.draw(&Rectangle::new(corners, fill.filled())).map_err(fail)?;
                }
                Shape::Line { points, width, color } => {
                    let points: Vec<_> = points.iter().map(|&(x, y)| at(x, y)).collect();
                    let style = color.stroke_width((width * scale).round().max(1.0) as u32);
                    area.draw(&PathElement::new(points, style)).map_err(fail)?;
                }
                Shape::Disc { x, y, radius, fill } => {
                    let radius = (radius * scale).round() as i32;
                    area.draw(&Circle::new(at(*x, *y), radius, fill.filled())).map_err(fail)?;
                }
                Shape::Text { x, y, text, size, anchor, color } => {
                    let horizontal = match anchor {
                        Anchor::Left => HPos::Left,
                        Anchor::Middle => HPos::Center,
                        Anchor::Right => HPos::Right,
                    };
                    let style = TextStyle::from((FAMILY, size * scale).into_font())
                        .color(color)
                        .pos(Pos::new(horizontal, VPos::Center));
                    area.draw(&Text::new(text.as_str(), at(*x, y + drop * size), style))
                        .map_err(fail)?;
                }
            }
        }
        area.present().map_err(fail)
    }
}
