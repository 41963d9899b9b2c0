//! Spans: what stretches of a sequence are. The engine knows (it built the prompt), the methods ask.
//!
//! A frame is one screenshot among several, a mask what a diffusion model has still to write. Named by position, so that they hold
//! through evictions. Text form: `system:0..20,frame:20..276`.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::parameters::named;

/// What a stretch of a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum SpanKind {
    /// Instructions before everything else.
    System,
    /// What was asked.
    Prompt,
    /// Tokens that a diffusion model has not decoded yet.
    Mask,
    /// Tokens that it has.
    Decoded,
    /// One image of several, in order of time.
    Frame,
}
named!(SpanKind {
    System => "system",
    Prompt => "prompt",
    Mask => "mask",
    Decoded => "decoded",
    Frame => "frame",
});

/// A stretch of positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// What it is.
    pub kind: SpanKind,
    /// Where.
    pub positions: Range<u32>,
}

/// Spans of one sequence: ascending, none empty, none overlapping another. Positions in none are nothing in particular.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spans(Vec<Span>);

const EXPECTED: &str = "spans that ascend and do not overlap, such as system:0..20,frame:20..276";

impl Spans {
    /// Errors: spans that are empty or reversed, or begin before the one before them ends.
    pub fn new(spans: Vec<Span>) -> Result<Self> {
        let mut end = 0;
        for span in &spans {
            if span.positions.start < end || span.positions.is_empty() {
                let got = span.to_string();
                return Err(Error::Parameter { name: "spans", expected: EXPECTED, got });
            }
            end = span.positions.end;
        }
        Ok(Self(spans))
    }

    /// Those of a kind, in order.
    pub fn of(&self, kind: SpanKind) -> impl DoubleEndedIterator<Item = Range<u32>> + '_ {
        self.0.iter().filter(move |span| span.kind == kind).map(|span| span.positions.clone())
    }

    /// All.
    pub fn iter(&self) -> std::slice::Iter<'_, Span> {
        self.0.iter()
    }

    /// Those that have begun before `end`, cut there: what is known while a sequence has `end` tokens.
    pub fn until(&self, end: u32) -> Self {
        let begun = self.0.iter().filter(|span| span.positions.start < end).cloned();
        let cut = |span: Span| Span {
            positions: span.positions.start..span.positions.end.min(end),
            ..span
        };
        Self(begun.map(cut).collect())
    }

    /// Position behind the last one.
    pub fn end(&self) -> u32 {
        self.0.last().map_or(0, |span| span.positions.end)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}..{}", self.kind, self.positions.start, self.positions.end)
    }
}

impl fmt::Display for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, span) in self.0.iter().enumerate() {
            write!(f, "{}{span}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Spans {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let span = |part: &str| {
            let (kind, positions) = part.trim().split_once(':')?;
            let (start, end) = positions.split_once("..")?;
            Some(Span {
                kind: kind.parse().ok()?,
                positions: start.parse().ok()?..end.parse().ok()?,
            })
        };
        let parts = text.split(',').filter(|part| !part.trim().is_empty()).map(span);
        let spans = parts.collect::<Option<_>>().ok_or_else(|| Error::Parameter {
            name: "spans",
            expected: EXPECTED,
            got: text.to_owned(),
        })?;
        Self::new(spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let text = "system:0..20,frame:20..276,frame:276..532,mask:600..632";
        let spans: Spans = text.parse().unwrap();
        assert_eq!(spans.to_string(), text);
        assert_eq!(spans.of(SpanKind::Frame).collect::<Vec<_>>(), [20..276, 276..532]);
        assert_eq!(spans.end(), 632);
        assert_eq!("".parse::<Spans>().unwrap(), Spans::default());
    }

    #[test]
    fn what_is_still_to_come_is_cut() {
        let spans: Spans = "system:0..20,frame:20..276".parse().unwrap();
        assert_eq!(spans.until(20).to_string(), "system:0..20");
        assert_eq!(spans.until(21).to_string(), "system:0..20,frame:20..21");
        assert_eq!((spans.until(0), spans.until(300)), (Spans::default(), spans));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["frame:5..5", "frame:9..4", "frame:0..9,mask:8..10", "image:0..4", "frame 1..2"]
        {
            let error = text.parse::<Spans>().unwrap_err().to_string();
            assert!(error.contains("spans"), "{error}");
        }
    }
}
