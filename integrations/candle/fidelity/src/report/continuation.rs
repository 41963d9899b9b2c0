//! Continuation: loss above that of the full cache, and the attention error, mean over layers and by layer.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::samples::Samples;
use super::{Row, rows};
use crate::record::{Item, Measured, Mode};
use crate::variant::Variant;

/// All variants at one length.
#[derive(Debug, Serialize)]
pub struct Continuation {
    pub length: usize,
    /// Loss of the full cache, nats per token.
    pub full_loss: f64,
    /// Nats per token above the full cache.
    pub loss: Vec<Row>,
    /// Relative L2 error of the attention output, mean over layers.
    pub error: Vec<Row>,
    /// The same by layer, mean over samples.
    pub error_by_layer: Vec<Layers>,
}

#[derive(Debug, Serialize)]
pub struct Layers {
    #[serde(flatten)]
    pub variant: Variant,
    pub errors: Vec<f64>,
}

pub fn continuation(samples: &Samples<'_>, baseline: &str) -> Vec<Continuation> {
    let measured = |variant: &Variant, length: usize| -> BTreeMap<u64, (f64, Vec<f64>)> {
        let these = samples.of(Mode::Agnostic, variant).filter(|(i, _)| i.length == length);
        these
            .filter_map(|(item, sample)| match sample.measured {
                Measured::Continuation { loss, errors } => {
                    Some((item.seed, (*loss, errors.clone())))
                }
                Measured::Answer { .. } => None,
            })
            .collect()
    };
    let full = Variant::full();
    let is_one = |item: &Item| item.task == crate::tasks::Task::Continuation;
    let lengths: BTreeSet<usize> = samples
        .of(Mode::Agnostic, &full)
        .filter(|(item, _)| is_one(item))
        .map(|(item, _)| item.length)
        .collect();
    let of_length = |length: usize| {
        let variants = samples.kept(Mode::Agnostic, |item| is_one(item) && item.length == length);
        let whole = measured(&full, length);
        let above = |variant: &Variant| {
            let above = measured(variant, length).into_iter();
            vec![above.filter_map(|(seed, (l, _))| Some((seed, l - whole.get(&seed)?.0))).collect()]
        };
        let error = |variant: &Variant| {
            let errors = measured(variant, length).into_iter();
            vec![errors.map(|(seed, (_, e))| (seed, mean(&e))).collect()]
        };
        let by_layer = |(variant, _): &(Variant, f64)| {
            let errors: Vec<Vec<f64>> =
                measured(variant, length).into_values().map(|(_, e)| e).collect();
            let layers = errors.iter().map(Vec::len).min().unwrap_or(0);
            let layer = |l: usize| mean(&errors.iter().map(|e| e[l]).collect::<Vec<_>>());
            Layers { variant: variant.clone(), errors: (0..layers).map(layer).collect() }
        };
        let losses: Vec<f64> = whole.values().map(|(loss, _)| *loss).collect();
        Continuation {
            length,
            full_loss: mean(&losses),
            error_by_layer: variants.iter().map(by_layer).collect(),
            loss: rows(variants.clone(), baseline, above),
            error: rows(variants, baseline, error),
        }
    };
    lengths.into_iter().map(of_length).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
