//! `fidelity calibrate`: measures the profile of a model, on prose that the tasks do not use.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use kvbudget::{Fraction, Profile};
use kvbudget_candle::reconstruct::{Calibration, calibrate};

use crate::measure::Bench;

/// Budgets at which shares are measured.
const BUDGETS: [&str; 8] = ["2%", "5%", "10%", "20%", "30%", "40%", "60%", "80%"];

/// Passages of `length` tokens, `each` of them out of every text, evenly spaced.
pub fn passages(
    bench: &Bench,
    texts: &[&str],
    length: usize,
    each: usize,
) -> Result<Vec<Vec<u32>>> {
    let mut passages = Vec::new();
    for text in texts {
        let ids = bench.encode(text)?;
        ensure!(
            ids.len() >= length * each,
            "a text of {} tokens has no {each} passages of {length}",
            ids.len()
        );
        let step = ids.len() / each.max(1);
        passages.extend((0..each).map(|i| ids[i * step..i * step + length].to_vec()));
    }
    Ok(passages)
}

/// Measures a profile on `texts` and writes it to `path`.
pub fn write(bench: &Bench, texts: Vec<Vec<u32>>, path: &Path) -> Result<Profile> {
    let bar = ProgressBar::new(texts.len() as u64).with_message("calibrating");
    let calibration = Calibration {
        prefix: bench.template().to_vec(),
        instruction: bench.instruction().to_vec(),
        texts,
        budgets: BUDGETS.iter().map(|b| b.parse()).collect::<kvbudget::Result<Vec<Fraction>>>()?,
    };
    let model = bench.model();
    let profile = calibrate(
        bench.name(),
        bench.cache()?,
        &calibration,
        &mut |ids, spans, hook| model.forward(ids, spans, hook).map(drop),
        |_| bar.inc(1),
    )?;
    bar.finish_and_clear();
    let named = || path.display().to_string();
    serde_json::to_writer(File::create(path).with_context(named)?, &profile).with_context(named)?;
    Ok(profile)
}

/// What part of the budget two profiles place differently, at the budget `keep`.
pub fn distance(a: &Profile, b: &Profile, keep: f64) -> f64 {
    let normalised = |profile: &Profile| {
        let shares = profile.shares(keep).concat();
        let sum: f64 = shares.iter().sum();
        shares.into_iter().map(move |s| s / sum)
    };
    normalised(a).zip(normalised(b)).map(|(x, y)| (x - y).abs()).sum::<f64>() / 2.0
}

#[cfg(test)]
mod tests {
    use super::distance;
    use kvbudget::profile::Point;
    use kvbudget::{Fraction, Profile};

    #[test]
    fn distances_are_parts_of_the_budget() {
        let profile = |a, b| {
            let keep = Fraction::new(1, 2).unwrap();
            Profile::new("m", vec![Point { keep, shares: vec![vec![a, b]] }]).unwrap()
        };
        let near = |x: f64, y: f64| assert!((x - y).abs() < 1e-12, "{x} {y}");
        near(distance(&profile(1.0, 0.0), &profile(0.0, 1.0), 0.5), 1.0);
        near(distance(&profile(0.6, 0.4), &profile(0.5, 0.5), 0.5), 0.1);
        near(distance(&profile(0.6, 0.4), &profile(0.6, 0.4), 0.2), 0.0);
    }
}
