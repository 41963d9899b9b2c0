//! How much may stay: a fraction, tokens per head, slots, or bytes, resolved to slots once and rounded down once.
//!
//! Ratios are fractions of integers. The published codes take floats and truncate, which keeps 199 of 1000
//! tokens at "20 %" (methods in reference mode reproduce that); here 20 % of 1000 is 200.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::ids::LayerId;

/// A fraction `num / den` with `num <= den`, kept exactly, in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct Fraction {
    num: u64,
    den: u64,
}

impl Fraction {
    /// Nothing.
    pub const ZERO: Self = Self { num: 0, den: 1 };

    /// `num / den`, between 0 and 1.
    pub fn new(num: u64, den: u64) -> Result<Self> {
        if den == 0 || num > den {
            return Err(Error::Budget {
                got: format!("{num}/{den}"),
                expected: "expected a fraction between 0 and 1",
            });
        }
        let divisor = gcd(num, den);
        Ok(Self { num: num / divisor, den: den / divisor })
    }

    /// Numerator.
    pub fn num(self) -> u64 {
        self.num
    }
    /// Denominator.
    pub fn den(self) -> u64 {
        self.den
    }
    /// `⌊total · num / den⌋`.
    pub fn of(self, total: u64) -> u64 {
        // At most `total`, since num <= den.
        (u128::from(total) * u128::from(self.num) / u128::from(self.den)) as u64
    }
    /// The nearest double.
    pub fn as_f64(self) -> f64 {
        self.num as f64 / self.den as f64
    }
}

impl Default for Fraction {
    fn default() -> Self {
        Self::ZERO
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if 100 % self.den == 0 {
            write!(f, "{}%", self.num * (100 / self.den))
        } else {
            write!(f, "{}/{}", self.num, self.den)
        }
    }
}

/// `20%`, `12.5%`, `0.2`, `1/5`: all exact.
impl FromStr for Fraction {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::Budget {
            got: text.to_owned(),
            expected: "expected a fraction between 0 and 1, such as 20%, 0.2 or 1/5",
        };
        let integer = |s: &str| s.parse::<u64>().ok();
        let (decimal, percent) = match text.strip_suffix('%') {
            Some(rest) => (rest.trim_end(), 100),
            None => (text, 1),
        };
        let parsed = if let Some((num, den)) = text.split_once('/') {
            integer(num.trim()).zip(integer(den.trim()))
        } else {
            let (whole, part) = decimal.split_once('.').unwrap_or((decimal, ""));
            u32::try_from(part.len())
                .ok()
                .and_then(|digits| 10u64.checked_pow(digits))
                .and_then(|scale| scale.checked_mul(percent))
                .zip(integer(&format!("{whole}{part}")))
                .map(|(den, num)| (num, den))
        };
        let (num, den) = parsed.ok_or_else(bad)?;
        Self::new(num, den).map_err(|_| bad())
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl TryFrom<String> for Fraction {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Fraction> for String {
    fn from(f: Fraction) -> String {
        f.to_string()
    }
}

/// How much of the cache may stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub enum Budget {
    /// A fraction of the slots that a full cache of the tokens seen so far would have.
    Keep(Fraction),
    /// So many slots per head on average.
    TokensPerHead(u64),
    /// So many slots of all layers and heads.
    Slots(u64),
    /// So many bytes of keys and values. Where layers differ in bytes per slot, the largest counts, so
    /// that the bytes are never exceeded wherever the slots end up.
    Bytes(u64),
}

impl Budget {
    /// Keeps `num / den` of the slots.
    pub fn keep(num: u64, den: u64) -> Result<Self> {
        Ok(Self::Keep(Fraction::new(num, den)?))
    }

    /// Slots for a sequence of `tokens` tokens: the one place where a budget is rounded, downwards.
    /// Never more than a full cache has; what a compressed cache still holds may be less, and the planner keeps
    /// `min(budget, available)`.
    pub fn resolve(self, geometry: &Geometry, tokens: u64) -> u64 {
        let full = geometry.slots(tokens);
        let slots = match self {
            Self::Keep(fraction) => fraction.of(full),
            Self::TokensPerHead(n) => n.saturating_mul(geometry.heads() as u64),
            Self::Slots(n) => n,
            Self::Bytes(n) => {
                let layers = 0..geometry.layers().len() as u32;
                let slot = layers.map(|l| geometry.slot_bytes(LayerId(l))).max();
                n / slot.unwrap_or(1)
            }
        };
        slots.min(full)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(fraction) => fraction.fmt(f),
            Self::TokensPerHead(n) => write!(f, "{n}/head"),
            Self::Slots(n) => write!(f, "{n} slots"),
            Self::Bytes(n) => write!(f, "{n} B"),
        }
    }
}

/// `20%`, `0.2`, `1/5` · `256/head` · `10000 slots` · `512 MiB`, `1000 B`, `2 GB`.
impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let trimmed = text.trim();
        let bad = || Error::Budget {
            got: text.to_owned(),
            expected: "expected a fraction (20%, 0.2, 1/5), tokens per head (256/head), \
                       slots (10000 slots) or bytes (512 MiB)",
        };
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let count = || trimmed[..digits].parse::<u64>().map_err(|_| bad());
        let unit = match trimmed[digits..].trim() {
            "/head" | "per head" => return Ok(Self::TokensPerHead(count()?)),
            "slots" => return Ok(Self::Slots(count()?)),
            "B" => 1,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return trimmed.parse().map(Self::Keep).map_err(|_| bad()),
        };
        count()?.checked_mul(unit).map(Self::Bytes).ok_or_else(bad)
    }
}

impl TryFrom<String> for Budget {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Budget> for String {
    fn from(b: Budget) -> String {
        b.to_string()
    }
}
