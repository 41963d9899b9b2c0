//! The numbers of `eval` against attention computed here, in f64 and in loops, from the same file and the plan
//! of `plan`. What the comparison can see is itself tested: another kept position is another number.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::{SMALL, Tensors, folder, succeeds};

const SETTINGS: [&str; 2] = ["--set", "window=8"];

/// Kept positions, `[layer][head]`.
type Kept = Vec<Vec<Vec<usize>>>;

struct Numbers {
    mean: f64,
    p95: f64,
    mass: f64,
    layer: f64,
}

/// Softmax attention of one query over the given rows: the output and the weights.
fn attend(q: &[f32], rows: &[(&[f32], &[f32])]) -> (Vec<f64>, Vec<f64>) {
    let dot =
        |k: &[f32]| -> f64 { q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let logits: Vec<f64> = rows.iter().map(|(k, _)| dot(k) / (q.len() as f64).sqrt()).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| (l - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (weight, (_, v)) in weights.iter().zip(rows) {
        out.iter_mut().zip(*v).for_each(|(o, x)| *o += weight / sum * f64::from(*x));
    }
    (out, weights.iter().map(|w| w / sum).collect())
}

fn oracle(tensors: &mut Tensors, kept: &Kept) -> Numbers {
    let d = SMALL.dim;
    let (mut errors, mut masses, mut layers) = (Vec::new(), Vec::new(), Vec::new());
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (l, kept) in kept.iter().enumerate() {
        // All heads' outputs of each query, one after the other: full, and what is missing.
        let mut outputs = vec![(Vec::new(), Vec::new()); SMALL.next];
        let data = |t: &mut Tensors, kind: &str| t.get(&format!("l{l}.{kind}")).data.clone();
        let [k, v, kn, vn, qn] =
            ["k", "v", "k_next", "v_next", "q_next"].map(|kind| data(tensors, kind));
        for hq in 0..SMALL.query_heads {
            let h = hq / (SMALL.query_heads / SMALL.heads);
            let at =
                |head: usize, len: usize, i: usize| (head * len + i) * d..(head * len + i + 1) * d;
            for i in 0..SMALL.next {
                let q = &qn[at(hq, SMALL.next, i)];
                let slot = |p: usize| (&k[at(h, SMALL.tokens, p)], &v[at(h, SMALL.tokens, p)]);
                let new = (0..=i).map(|j| (&kn[at(h, SMALL.next, j)], &vn[at(h, SMALL.next, j)]));
                let whole: Vec<_> = (0..SMALL.tokens).map(slot).chain(new.clone()).collect();
                let part: Vec<_> = kept[h].iter().map(|&p| slot(p)).chain(new).collect();
                let (full, weights) = attend(q, &whole);
                let (got, _) = attend(q, &part);
                let gap: Vec<f64> = full.iter().zip(&got).map(|(a, b)| a - b).collect();
                errors.push(norm(&gap) / norm(&full));
                outputs[i].0.extend(full);
                outputs[i].1.extend(gap);
                let context: f64 = weights[..SMALL.tokens].iter().sum();
                masses.push(kept[h].iter().map(|&p| weights[p]).sum::<f64>() / context);
            }
        }
        let weights = data(tensors, "o_proj");
        let project = |x: &[f64]| -> Vec<f64> {
            let rows = weights.chunks(SMALL.query_heads * d);
            rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
        };
        layers.extend(outputs.iter().map(|(full, gap)| norm(&project(gap)) / norm(&project(full))));
    }
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (error, mass) = (mean(&errors), mean(&masses));
    errors.sort_by(f64::total_cmp);
    // Nearest rank: at least 95 of 100 samples are not above it.
    let rank = (0.95 * errors.len() as f64).ceil() as usize;
    Numbers { mean: error, p95: errors[rank - 1], mass, layer: mean(&layers) }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn kept(plan: &Value) -> Kept {
    let list = |v: &Value| v.as_array().unwrap().clone();
    let head = |h: &Value| list(&h["kept"]).iter().map(|p| p.as_u64().unwrap() as usize).collect();
    list(&plan["layers"]).iter().map(|l| list(&l["heads"]).iter().map(head).collect()).collect()
}

fn agrees(row: &Value, numbers: &Numbers, tolerance: f64) -> bool {
    let near = |got: &Value, expected: f64| (got.as_f64().unwrap() - expected).abs() <= tolerance;
    near(&row["output_error"]["mean"], numbers.mean)
        && near(&row["output_error"]["p95"], numbers.p95)
        && near(&row["retained_mass"], numbers.mass)
        && near(&row["layer_error"], numbers.layer)
}

/// f32 arithmetic over at most 46 slots of exactly represented inputs: errors of a few units in the last place
/// of numbers near 1, well below this.
const TOLERANCE: f64 = 1e-5;

fn compare(dtype: Dtype, name: &str) {
    let folder = folder(name);
    let mut tensors = Tensors::noise(SMALL, dtype);
    tensors.save(&folder.join("d"));
    let eval =
        ["eval", "d", "--policies", "snapkv,knorm", "--budgets", "25%,60%", "--json", "r.json"];
    let table = succeeds(&folder, &[&eval[..], &SETTINGS].concat());
    let results = json(&folder.join("r.json"));
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        let (policy, budget) = (row["policy"].as_str().unwrap(), row["budget"].as_str().unwrap());
        let settings = if policy == "snapkv" { &SETTINGS[..] } else { &[] };
        let plan = ["plan", "d", "--policy", policy, "--budget", budget, "-o", "p.json"];
        succeeds(&folder, &[&plan[..], settings].concat());
        let plan = json(&folder.join("p.json"));
        let mut kept = kept(&plan);

        // 41 tokens · 4 heads = 164 slots, a quarter of which is 41 and 60 % of which is 98.4.
        let expected = if budget == "25%" { 41 } else { 98 };
        assert_eq!(row["slots"], expected);
        assert_eq!(kept.iter().flatten().map(Vec::len).sum::<usize>(), expected);
        let size = if dtype == Dtype::F32 { 4 } else { 2 };
        assert_eq!(row["bytes"], expected * 2 * 8 * size);

        let numbers = oracle(&mut tensors, &kept);
        assert!(agrees(row, &numbers, TOLERANCE), "{row} against {:?}", numbers.mean);
        assert!(table.contains(&format!("{:.4}", numbers.mean)), "{table}");

        // The first kept position of a head becomes one that is not kept.
        let head = &mut kept[1][0];
        let other = (0..SMALL.tokens).find(|p| !head.contains(p)).unwrap();
        head[0] = other;
        let mutated = oracle(&mut tensors, &kept);
        assert!(!agrees(row, &mutated, 10.0 * TOLERANCE), "a mutated plan went unnoticed");
    }
}

#[test]
fn eval_measures_what_it_says() {
    compare(Dtype::F32, "numbers_f32");
    compare(Dtype::F16, "numbers_f16");
    compare(Dtype::BF16, "numbers_bf16");
}

#[test]
fn a_full_budget_costs_nothing() {
    let folder = folder("numbers_full");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let eval = ["eval", "d", "--policies", "knorm", "--budgets", "100%", "--json", "r.json"];
    succeeds(&folder, &eval);
    let row = &json(&folder.join("r.json"))["rows"][0];
    assert_eq!(row["output_error"]["mean"], 0.0);
    assert_eq!(row["retained_mass"], 1.0);
    assert_eq!(row["slots"], 164);
}
