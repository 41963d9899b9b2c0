//! Records by variant and sample. Where a sample was measured more than once, the last record counts.

use std::collections::BTreeMap;

use crate::record::{Item, Measured, Mode, Record};
use crate::variant::Variant;

/// What happened to a variant in one sample.
pub struct Sample<'r> {
    pub measured: &'r Measured,
    /// Share of slots kept.
    pub kept: f64,
}

pub struct Samples<'r> {
    by_mode: BTreeMap<Mode, BTreeMap<&'r Variant, BTreeMap<Item, Sample<'r>>>>,
}

impl<'r> Samples<'r> {
    pub fn new(records: &'r [Record]) -> Self {
        let mut by_mode: BTreeMap<_, BTreeMap<_, BTreeMap<_, _>>> = BTreeMap::new();
        // The full cache says how many slots there are; it may stand in another record of the item.
        let full = records.iter().flat_map(|r| r.outcomes.iter().map(move |o| (r, o)));
        let full: BTreeMap<(Mode, Item), u64> = full
            .filter(|(_, o)| o.variant.is_full())
            .map(|(r, o)| ((r.mode, r.item), o.slots))
            .collect();
        for record in records {
            let all = full.get(&(record.mode, record.item)).map_or(f64::NAN, |&slots| slots as f64);
            for outcome in &record.outcomes {
                let sample =
                    Sample { measured: &outcome.measured, kept: outcome.slots as f64 / all };
                let mode = by_mode.entry(record.mode).or_default();
                mode.entry(&outcome.variant).or_default().insert(record.item, sample);
            }
        }
        Self { by_mode }
    }

    /// Samples of a variant.
    pub fn of(&self, mode: Mode, variant: &Variant) -> impl Iterator<Item = (&Item, &Sample<'r>)> {
        self.by_mode.get(&mode).and_then(|variants| variants.get(variant)).into_iter().flatten()
    }

    /// Variants with samples that `wanted` takes, the full cache first, and the mean share of slots they kept.
    pub fn kept(&self, mode: Mode, wanted: impl Fn(&Item) -> bool) -> Vec<(Variant, f64)> {
        let mut all = Vec::new();
        for (&variant, samples) in self.by_mode.get(&mode).into_iter().flatten() {
            let kept: Vec<f64> =
                samples.iter().filter(|(item, _)| wanted(item)).map(|(_, s)| s.kept).collect();
            if !kept.is_empty() {
                all.push((variant.clone(), kept.iter().sum::<f64>() / kept.len() as f64));
            }
        }
        all.sort_by_key(|(variant, _)| (!variant.is_full(), variant.policy.clone()));
        all
    }
}
