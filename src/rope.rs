//! Rotary position embeddings, as far as statistics of queries need them: turning rows back, and the mean turn of many positions.
//!
//! A row's element pairs are turned by angles that grow with the position. Angles are f64: those of far positions are large.

use std::ops::Range;

use crate::error::{Error, Result};

/// Which elements of a head turn together, for `n` frequencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `i` and `i + n` (`rotate_half`): checkpoints of transformers.
    Halves,
    /// `2i` and `2i + 1`: GPT-J, and llamas in GGUF files.
    Neighbours,
}

/// A model's RoPE: at position `p`, pair `i` of a head turns by `p · frequencies[i]`. Elements that are in no pair do not turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    frequencies: Vec<f64>,
    pairs: Pairs,
}

/// Cosine and sine of a pair's angle, or their means.
type Turn = [f64; 2];

impl Rope {
    /// Inverse frequencies in radians per position, those of a scaled RoPE included.
    ///
    /// Errors: a frequency that is not finite.
    pub fn new(frequencies: Vec<f64>, pairs: Pairs) -> Result<Self> {
        if let Some(bad) = frequencies.iter().find(|f| !f.is_finite()) {
            let (name, expected) = ("RoPE frequency", "a finite number");
            return Err(Error::Parameter { name, expected, got: bad.to_string() });
        }
        Ok(Self { frequencies, pairs })
    }

    /// `base^(-2i / dim)` for the first `dim` elements of a head: RoPE as published.
    ///
    /// Errors: a base that is not positive.
    pub fn with_base(base: f64, dim: u32, pairs: Pairs) -> Result<Self> {
        if base <= 0.0 {
            let (name, expected) = ("RoPE base", "a positive number");
            return Err(Error::Parameter { name, expected, got: base.to_string() });
        }
        let frequency = |pair: u32| base.powf(-f64::from(2 * pair) / f64::from(dim));
        Self::new((0..dim / 2).map(frequency).collect(), pairs)
    }

    /// Checks that a head has so many pairs.
    pub(crate) fn fits(&self, head_dim: usize) -> Result<()> {
        let (got, limit) = (2 * self.frequencies.len() as u64, head_dim as u64);
        if got > limit {
            return Err(Error::TooLarge { what: "elements of a head that turn", got, limit });
        }
        Ok(())
    }

    /// What turns rows of a position.
    pub(crate) fn at(&self, position: u64) -> Vec<Turn> {
        let turn = |f: &f64| {
            let (sin, cos) = (f * position as f64).sin_cos();
            [cos, sin]
        };
        self.frequencies.iter().map(turn).collect()
    }

    /// The mean of what turns rows of these positions, of which there is at least one.
    pub(crate) fn mean(&self, positions: Range<u32>) -> Vec<Turn> {
        let mut sums = vec![[0.0; 2]; self.frequencies.len()];
        for position in positions.clone() {
            for (sum, [cos, sin]) in sums.iter_mut().zip(self.at(position.into())) {
                *sum = [sum[0] + cos, sum[1] + sin];
            }
        }
        sums.into_iter().map(|sum| sum.map(|x| x / positions.len() as f64)).collect()
    }

    /// Turns a row.
    pub(crate) fn turn(&self, turns: &[Turn], row: &mut [f64]) {
        for (pair, &[cos, sin]) in turns.iter().enumerate() {
            let (a, b) = match self.pairs {
                Pairs::Halves => (pair, pair + turns.len()),
                Pairs::Neighbours => (2 * pair, 2 * pair + 1),
            };
            (row[a], row[b]) = (cos * row[a] - sin * row[b], sin * row[a] + cos * row[b]);
        }
    }
}

/// The turn back.
pub(crate) fn back(turns: Vec<Turn>) -> Vec<Turn> {
    turns.into_iter().map(|[cos, sin]| [cos, -sin]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f64; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    fn turned(pairs: Pairs, position: u64) -> [f64; 6] {
        // A quarter per position, and a half.
        let quarter = std::f64::consts::FRAC_PI_2;
        let rope = Rope::new(vec![quarter, 2.0 * quarter], pairs).unwrap();
        let mut row = ROW;
        rope.turn(&rope.at(position), &mut row);
        row.map(|x| x.round())
    }

    #[test]
    fn pairs_turn_and_the_rest_stays() {
        assert_eq!(turned(Pairs::Halves, 1), [-3.0, -2.0, 1.0, -4.0, 5.0, 6.0]);
        assert_eq!(turned(Pairs::Neighbours, 1), [-2.0, 1.0, -3.0, -4.0, 5.0, 6.0]);
        assert_eq!(turned(Pairs::Neighbours, 4), ROW);
    }

    #[test]
    fn rows_are_turned_back() {
        let rope = Rope::with_base(10_000.0, 6, Pairs::Halves).unwrap();
        let mut row = ROW;
        rope.turn(&rope.at(123_456), &mut row);
        assert!((row[0] - ROW[0]).abs() > 0.1, "{row:?}");
        rope.turn(&back(rope.at(123_456)), &mut row);
        assert!(row.iter().zip(ROW).all(|(a, b)| (a - b).abs() < 1e-12), "{row:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Rope::new(vec![1.0, f64::NAN], Pairs::Halves).is_err());
        assert!(Rope::with_base(0.0, 6, Pairs::Halves).is_err());
        let rope = Rope::with_base(10_000.0, 6, Pairs::Halves).unwrap();
        assert!(rope.fits(6).is_ok() && rope.fits(5).is_err());
    }
}
