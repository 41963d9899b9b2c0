//! Comparisons that cannot pass by accident: lengths first, then NaN and infinities, then a derived tolerance.
//!
//! The tolerance is twice the error that the oracle's own loops make in f32, plus a few ulps for the cases in
//! which those happen to be exact. Errors are compared as `error <= tolerance`, which no NaN passes.

use std::fmt::Debug;

use kvbudget::Ragged;

/// `Ok`, or what differs and where.
pub type Verdict = Result<(), String>;

/// What an error is measured against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Each element's own magnitude: sums of positive terms, where small scores must be right too.
    Element,
    /// The largest magnitude of the row: sums whose terms cancel.
    Row,
    /// One, and its own magnitude above: logarithms, whose error is relative to what they are taken of.
    Unit,
}

/// Rounding that any f32 evaluation may do beyond the baseline's luck, in units of `f32::EPSILON`.
const FLOOR_ULPS: f64 = 8.0;

/// Rows against the oracle, with the tolerance derived from `baseline`: the same loops in f32.
pub fn floats(
    got: &Ragged<f32>,
    want: &[Vec<f64>],
    baseline: &[Vec<f32>],
    scale: Scale,
) -> Verdict {
    lengths("got", got.lens(), want)?;
    lengths("the baseline has", baseline.iter().map(Vec::len), want)?;
    for (r, row) in want.iter().enumerate() {
        for (c, &x) in row.iter().enumerate() {
            same_class(f64::from(got.row(r)[c]), x)
                .map_err(|e| format!("row {r}, entry {c}: {e}"))?;
        }
    }
    let relative =
        2.0 * baseline_error(want, baseline, scale) + FLOOR_ULPS * f64::from(f32::EPSILON);
    let mut worst: Option<(f64, String)> = None;
    for (r, row) in want.iter().enumerate() {
        let largest = largest(row);
        for (c, &x) in row.iter().enumerate().filter(|(_, x)| x.is_finite()) {
            // Below the smallest normal number a device may flush to zero.
            let unit = scale.of(x, largest);
            let tolerance = relative * unit + f64::from(f32::MIN_POSITIVE);
            let got = got.row(r)[c];
            let error = (f64::from(got) - x).abs();
            let passes = error <= tolerance;
            if !passes && worst.as_ref().is_none_or(|(w, _)| error / tolerance > *w) {
                let off = format!("off by {error:.1e}, allowed {tolerance:.1e}");
                let report = format!("row {r}, entry {c}: got {got:e}, want {x:e}: {off}");
                worst = Some((error / tolerance, report));
            }
        }
    }
    worst.map_or(Ok(()), |(_, report)| Err(report))
}

/// Rows that must be the same numbers; NaN equals NaN, `-0` equals `+0`.
pub fn exact(got: &Ragged<f32>, want: &[Vec<f64>]) -> Verdict {
    lengths("got", got.lens(), want)?;
    for (r, row) in want.iter().enumerate() {
        for (c, &x) in row.iter().enumerate() {
            let got = f64::from(got.row(r)[c]);
            if !(got == x || got.is_nan() && x.is_nan()) {
                return Err(format!("row {r}, entry {c}: got {got:e}, want {x:e}"));
            }
        }
    }
    Ok(())
}

/// Indices and counts: the same list, in the same order, nothing more and nothing less.
pub fn equal<T: PartialEq + Debug>(got: &[T], want: &[T]) -> Verdict {
    if got.len() != want.len() {
        return Err(format!("got {} entries, want {}: {got:?}, {want:?}", got.len(), want.len()));
    }
    match got.iter().zip(want).position(|(g, w)| g != w) {
        Some(i) => Err(format!("entry {i}: got {:?}, want {:?}", got[i], want[i])),
        None => Ok(()),
    }
}

/// Selections: per segment the same slots in the same order.
pub fn selections(got: &Ragged<u32>, want: &[Vec<u32>]) -> Verdict {
    if got.rows() != want.len() {
        return Err(format!("got {} segments, want {}", got.rows(), want.len()));
    }
    for (s, row) in want.iter().enumerate() {
        equal(got.row(s), row).map_err(|e| format!("segment {s}: {e}"))?;
    }
    Ok(())
}

/// Every bit of every row.
pub fn bits(got: &Ragged<f32>, want: &Ragged<f32>) -> Verdict {
    equal(got.offsets(), want.offsets()).map_err(|e| format!("offsets: {e}"))?;
    let all = |rows: &Ragged<f32>| rows.data().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    equal(&all(got), &all(want)).map_err(|e| format!("bits: {e}"))
}

fn lengths(who: &str, got: impl Iterator<Item = usize>, want: &[Vec<f64>]) -> Verdict {
    let (got, want): (Vec<_>, Vec<_>) = (got.collect(), want.iter().map(Vec::len).collect());
    if got == want { Ok(()) } else { Err(format!("{who} rows of {got:?}, want {want:?}")) }
}

fn same_class(got: f64, want: f64) -> Verdict {
    let same = if want.is_finite() {
        got.is_finite()
    } else {
        got == want || (got.is_nan() && want.is_nan())
    };
    if same { Ok(()) } else { Err(format!("got {got:e}, want {want:e}")) }
}

fn baseline_error(want: &[Vec<f64>], baseline: &[Vec<f32>], scale: Scale) -> f64 {
    let mut worst = 0.0f64;
    for (want, baseline) in want.iter().zip(baseline) {
        let largest = largest(want);
        for (&x, &b) in want.iter().zip(baseline) {
            let unit = scale.of(x, largest);
            // Subnormals have no relative precision to speak of.
            if x.is_finite() && b.is_finite() && unit > f64::from(f32::MIN_POSITIVE) {
                worst = worst.max((f64::from(b) - x).abs() / unit);
            }
        }
    }
    worst
}

fn largest(row: &[f64]) -> f64 {
    row.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max)
}

impl Scale {
    fn of(self, x: f64, largest: f64) -> f64 {
        match self {
            Self::Element => x.abs(),
            Self::Unit => x.abs().max(1.0),
            Self::Row => largest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANT: [f64; 4] = [1.0, 0.0, f64::NAN, f64::NEG_INFINITY];

    fn against(got: &[f32]) -> Verdict {
        let baseline = WANT.map(|x| x as f32).to_vec();
        floats(&Ragged::from_iter([got.to_vec()]), &[WANT.to_vec()], &[baseline], Scale::Element)
    }

    #[test]
    fn what_is_wrong_is_named() {
        let (nan, low) = (f32::NAN, f32::NEG_INFINITY);
        assert_eq!(against(&[1.0 + f32::EPSILON, 0.0, nan, low]), Ok(()));
        for (got, named) in [
            (&[1.0, 0.0, nan][..], "rows of [3]"),
            (&[1.0, 0.0, nan, low, 0.0], "rows of [5]"),
            (&[nan, 0.0, nan, low], "entry 0"),
            (&[1.0, 0.0, 0.0, low], "entry 2"),
            (&[1.0, 0.0, nan, f32::INFINITY], "entry 3"),
            (&[1.0, 0.0, nan, nan], "entry 3"),
            (&[1.0, 0.0, nan, f32::MIN], "entry 3"),
            (&[1.0001, 0.0, nan, low], "entry 0"),
            (&[1.0, 1e-30, nan, low], "entry 1"),
        ] {
            let error = against(got).expect_err(&format!("{got:?} passed"));
            assert!(error.contains(named), "{got:?}: {error}");
        }
    }

    #[test]
    fn a_worse_baseline_allows_twice_its_error_and_no_more() {
        let with_baseline = |x: f32, b: f32| {
            floats(&Ragged::from_iter([vec![x]]), &[vec![1.0]], &[vec![b]], Scale::Row)
        };
        assert!(with_baseline(1.00019, 1.0001).is_ok());
        assert!(with_baseline(1.00022, 1.0001).is_err());
    }

    #[test]
    fn selections_are_lists_not_sets() {
        let got =
            |slots: &[u32]| selections(&Ragged::from_iter([slots.to_vec()]), &[vec![1, 4, 6]]);
        assert!(got(&[1, 4, 6]).is_ok());
        for slots in [&[1, 4][..], &[1, 4, 6, 7], &[1, 6, 4], &[1, 4, 4], &[1, 4, 5]] {
            assert!(got(slots).is_err(), "{slots:?} passed");
        }
    }
}
