//! ExpectedAttention on dumps: with the mean and covariance of the queries to come, and without.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::{SMALL, Sizes, Tensors, Values, fails, folder, succeeds};

/// All queries to come look along a direction in which the key of slot 24 is the largest; slot 30 has the largest value.
fn with_expected() -> Tensors {
    let Sizes { query_heads, heads, tokens, dim, .. } = SMALL;
    let mut tensors = Tensors::noise(SMALL, Dtype::F32);
    for l in 0..SMALL.layers {
        for (kind, slot, x) in [("k", 24, 4.0), ("v", 30, 9.0)] {
            let row = |head: usize| (head * tokens + slot) * dim..(head * tokens + slot + 1) * dim;
            let data = &mut tensors.get(&format!("l{l}.{kind}")).data;
            (0..heads).for_each(|head| data[row(head)].fill(x));
        }
        for (name, shape, x) in [
            ("mean", vec![query_heads, dim], 10.0),
            ("covariance", vec![query_heads, dim, dim], 0.0),
        ] {
            let data = vec![x; shape.iter().product()];
            let values = Values { dtype: Dtype::F32, shape, data };
            tensors.0.insert(format!("l{l}.expected_{name}"), values);
        }
    }
    tensors
}

/// What a plan of five slots per head keeps, which must be the same in all heads.
fn kept(folder: &Path, settings: &[&str]) -> Value {
    let plan = ["plan", "d", "--policy", "expected-attention", "--budget", "5/head"];
    let plan = succeeds(folder, &[&plan[..], settings].concat());
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["slots"], 5 * 4);
    let heads = plan["layers"].as_array().unwrap().iter();
    let mut heads = heads.flat_map(|layer| layer["heads"].as_array().unwrap());
    let kept = heads.next().unwrap()["kept"].clone();
    assert!(heads.all(|head| head["kept"] == kept), "{plan}");
    kept
}

#[test]
fn what_is_expected_stays_or_with_epsilon_what_is_large() {
    let folder = folder("x_plan");
    with_expected().save_with(&folder.join("d"), &[("version", "2")]);
    assert_eq!(kept(&folder, &[]), serde_json::json!([0, 1, 2, 3, 24]));
    assert_eq!(kept(&folder, &["--set", "epsilon=0.01"]), serde_json::json!([0, 1, 2, 3, 24]));
    assert_eq!(kept(&folder, &["--set", "epsilon=1000"]), serde_json::json!([0, 1, 2, 3, 30]));
    succeeds(&folder, &["inspect", "d"]);
    let eval = ["eval", "d", "--policies", "expected-attention", "--budgets", "50%"];
    succeeds(&folder, &[&eval[..], &["--set", "epsilon=0.01"]].concat());
}

#[test]
fn what_is_missing_or_malformed_is_named() {
    let folder = folder("x_missing");
    let plan = ["plan", "d", "--policy", "expected-attention", "--budget", "50%"];
    let refused = |tensors: Tensors, words: &[&str]| {
        fs::write(folder.join("d"), tensors.bytes()).unwrap();
        fails(&folder, &plan, words);
    };
    refused(Tensors::noise(SMALL, Dtype::F32), &["expected_mean, expected_covariance"]);
    let without = |name: &str| {
        let mut tensors = with_expected();
        tensors.0.remove(name);
        tensors
    };
    let words = ["\"l1.expected_covariance\" is missing", "together or not at all"];
    refused(without("l1.expected_covariance"), &words);
    let mut tensors = with_expected();
    tensors.get("l0.expected_mean").reshape(&[2, 16]);
    refused(tensors, &["\"l0.expected_mean\"", "[4, 8]"]);
    let mut tensors = with_expected();
    tensors.get("l0.expected_covariance").cast(Dtype::F16);
    refused(tensors, &["\"l0.expected_covariance\"", "f16"]);
    let mut tensors = with_expected();
    tensors.get("l1.expected_mean").data[3] = f32::NAN;
    refused(tensors, &["mean of the expected queries", "NaN"]);
    let mut tensors = with_expected();
    tensors.0.retain(|name, _| !name.starts_with("l1.expected"));
    refused(tensors, &["expected_mean", "every layer"]);
}
