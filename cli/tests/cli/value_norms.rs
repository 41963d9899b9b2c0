//! How well the L2 value norm stands for CriticalKV's L1 norm: on the sample's values, with the model's own output
//! projections.

use std::collections::BTreeSet;
use std::path::Path;

use kvbudget::Budget;
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::Cpu;
use kvbudget::backend::ops::ValueNorm;
use kvbudget::preset;
use kvbudget_cli::dump::Dump;
use kvbudget_cli::planning;

fn sample() -> Dump<std::fs::File> {
    Dump::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("sample/smollm2.safetensors")).unwrap()
}

/// Slots, best first.
fn order(norms: &[f32]) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..norms.len()).collect();
    slots.sort_by(|&a, &b| norms[b].total_cmp(&norms[a]));
    slots
}

/// Spearman's rank correlation.
fn spearman(a: &[f32], b: &[f32]) -> f64 {
    let ranks = |x: &[f32]| {
        let mut ranks = vec![0.0; x.len()];
        order(x).into_iter().enumerate().for_each(|(rank, slot)| ranks[slot] = rank as f64);
        ranks
    };
    let (n, pairs) = (a.len() as f64, ranks(a).into_iter().zip(ranks(b)));
    1.0 - 6.0 * pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>() / (n * (n * n - 1.0))
}

/// Which part of the best fifth by one is among the best fifth by the other.
fn overlap(a: &[f32], b: &[f32]) -> f64 {
    let best = |x| order(x).into_iter().take(a.len() / 5).collect::<BTreeSet<_>>();
    best(a).intersection(&best(b)).count() as f64 / (a.len() / 5) as f64
}

/// Median and least.
fn median_and_least(mut of: Vec<f64>) -> (f64, f64) {
    of.sort_by(f64::total_cmp);
    (of[of.len() / 2], of[0])
}

#[test]
fn l2_norms_rank_slots_nearly_as_l1_norms_do() {
    let (cpu, mut dump) = (Cpu::new(), sample());
    let (mut ranks, mut best, mut spreads, mut ratios) = (vec![], vec![], vec![], vec![]);
    for l in 0..dump.geometry().layers().len() {
        let layer = dump.layer(l, false).unwrap();
        let lens = vec![dump.tokens(); layer.shape().kv_heads()];
        let norms = [ValueNorm::L1, ValueNorm::L2].map(|op| {
            let mut norms = cpu.zeros(&lens).unwrap();
            cpu.value_norm(op, &[layer.view().unwrap()], &mut norms).unwrap();
            norms
        });
        let hidden = f64::from(layer.o_proj.as_ref().unwrap().shape()[0]);
        for (l1, l2) in norms[0].iter().zip(norms[1].iter()) {
            ranks.push(spearman(l1, l2));
            best.push(overlap(l1, l2));
            let of_gaussian = (2.0 * hidden / std::f64::consts::PI).sqrt();
            let ratio = |(a, b): (&f32, &f32)| f64::from(*a) / f64::from(*b) / of_gaussian;
            let all: Vec<f64> = l1.iter().zip(l2).map(ratio).collect();
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
            spreads.push(-variance.sqrt() / mean);
            ratios.push(mean);
        }
    }
    let (ranks, best, spreads) =
        (median_and_least(ranks), median_and_least(best), median_and_least(spreads));
    ratios.sort_by(f64::total_cmp);
    println!("Spearman {ranks:.4?}, best fifth {best:.4?}, -spread of the ratio {spreads:.4?}");
    println!(
        "L1 / L2 / sqrt(2 hidden / pi) of heads: {:.3} to {:.3}",
        ratios[0],
        ratios[ratios.len() - 1]
    );
    assert!(ranks.0 > 0.99 && ranks.1 > 0.9, "Spearman, median and least: {ranks:?}");
    assert!(best.0 > 0.95 && best.1 > 0.75, "the best fifth, median and least: {best:?}");
}

#[test]
fn plans_by_l2_norms_keep_nearly_the_same() {
    let (cpu, mut dump) = (Cpu::new(), sample());
    let budget: Budget = "20%".parse().unwrap();
    for name in ["criticalkv", "ada-criticalkv", "defensivekv", "layer-defensivekv", "reach"] {
        let mut kept = |norm: &str| -> BTreeSet<(usize, usize, u32)> {
            let mut config = preset(name).unwrap();
            config.set("value_norm", norm).unwrap();
            if name == "reach" {
                // What the sample has.
                config.set("queries", "64").unwrap();
            }
            let plan = planning::plan(&cpu, &mut dump, &config, budget, || {}).unwrap().plan;
            let heads =
                plan.layers.iter().enumerate().flat_map(|(l, layer)| {
                    layer.iter().enumerate().map(move |(h, head)| (l, h, head))
                });
            heads.flat_map(|(l, h, head)| head.iter().map(move |p| (l, h, p.0))).collect()
        };
        let (l1, l2) = (kept("l1"), kept("l2"));
        let same = l1.intersection(&l2).count() as f64 / l1.len() as f64;
        println!("{name}: {same:.4} of the slots");
        assert!(same > 0.95 && same < 1.0, "{name}: {same}");
    }
}
