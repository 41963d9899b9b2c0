//! Presets that look with a probe's queries: on a dump that holds them and says what its stretches are, and on one that does not.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::{SMALL, Sizes, Tensors, fails, folder, succeeds};

/// Four layers of 41 tokens: 6 of instructions, 25 more of prompt, 10 masks, whose queries probe.
fn save(path: &Path) {
    let sizes = Sizes { layers: 4, ..SMALL };
    let mut tensors = Tensors::noise(sizes, Dtype::F32);
    for l in 0..sizes.layers {
        let mut probe = tensors.get(&format!("l{l}.q")).clone();
        probe.reshape(&[sizes.query_heads, 10, sizes.dim]);
        tensors.0.insert(format!("l{l}.q_probe"), probe);
    }
    let spans = "system:0..6,prompt:6..31,mask:31..41";
    tensors.save_with(path, &[("version", "2"), ("spans", spans)]);
}

/// Slots of each head, and whether each keeps a range of positions.
fn planned(folder: &Path, args: &[&str], kept: std::ops::Range<u64>) -> Vec<usize> {
    let plan = [&["plan", "d", "--budget", "20/head"], args].concat();
    let plan: Value = serde_json::from_str(&succeeds(folder, &plan)).unwrap();
    assert_eq!(plan["slots"], 20 * 8);
    let heads = plan["layers"].as_array().unwrap().iter();
    let heads = heads.flat_map(|layer| layer["heads"].as_array().unwrap());
    heads
        .map(|head| {
            let slots = head["kept"].as_array().unwrap();
            assert!(kept.clone().all(|p| slots.contains(&p.into())), "{head}");
            slots.len()
        })
        .collect()
}

fn by_layer(heads: &[usize]) -> Vec<usize> {
    heads.chunks(2).map(|layer| layer.iter().sum()).collect()
}

#[test]
fn spans_stay_and_layers_share_by_what_was_measured() {
    let folder = folder("p_plans");
    save(&folder.join("d"));
    let profile = r#"{"format": "kvbudget-layers", "version": 1, "model": "noise",
        "similarity": [0.9, 0.5, 0.5, 0.9], "importance": [0.4, 0.1, 0.1, 0.4]}"#;
    fs::write(folder.join("layers.json"), profile).unwrap();
    let measured = ["--layer-profile", "layers.json"];

    let epicache = ["--policy", "epicache"];
    assert_eq!(by_layer(&planned(&folder, &epicache, 0..6)), [40; 4]);
    let more = planned(&folder, &[&epicache[..], &measured].concat(), 0..6);
    // Squares of .1 and .5: the outer layers get no more than they must, system spans of two heads.
    assert_eq!(by_layer(&more), [12, 68, 68, 12]);
    assert!(more.chunks(2).any(|heads| heads[0] != heads[1]), "heads are contested: {more:?}");

    let maskkv = ["--policy", "maskkv"];
    let plain = planned(&folder, &maskkv, 31..41);
    assert_eq!(by_layer(&plain), [40; 4]);
    assert!(plain.chunks(2).any(|heads| heads[0] != heads[1]), "by preference: {plain:?}");
    let more = planned(&folder, &[&maskkv[..], &measured].concat(), 31..41);
    // 80 slots of prompt, .4 equally and .6 by 8 to 2: 27.2 and 12.8 of each layer, beside 20 masks.
    assert_eq!(by_layer(&more), [47, 33, 33, 47]);
    let set = ["--set", "importance=0.4,0.1,0.1,0.4", "--set", "beta=1", "--set", "alpha=1"];
    assert_eq!(planned(&folder, &[&maskkv[..], &set].concat(), 31..41), [20; 8]);
}

#[test]
fn what_is_missing_is_named() {
    let folder = folder("p_missing");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    for policy in ["epicache", "maskkv"] {
        fails(&folder, &["plan", "d", "--policy", policy, "--budget", "50%"], &["q_probe"]);
    }
    let mut tensors = Tensors::noise(SMALL, Dtype::F32);
    for l in 0..SMALL.layers {
        let probe = tensors.get(&format!("l{l}.q")).clone();
        tensors.0.insert(format!("l{l}.q_probe"), probe);
    }
    tensors.save(&folder.join("unspoken"));
    for policy in ["epicache", "maskkv"] {
        let args = ["plan", "unspoken", "--policy", policy, "--budget", "50%"];
        fails(&folder, &args, &["spans"]);
        succeeds(&folder, &[&args[..], &["--set", "protect_spans="]].concat());
    }
    let plan = |policy| {
        ["plan", "d", "--policy", policy, "--budget", "50%", "--layer-profile", "layers.json"]
    };
    fails(&folder, &plan("epicache"), &["layers.json"]);
    let write = |text: &str| fs::write(folder.join("layers.json"), text).unwrap();
    write(r#"{"format": "kvbudget-layers", "version": 2, "model": "m"}"#);
    fails(&folder, &plan("epicache"), &["layers.json", "version 2"]);
    write(r#"{"format": "kvbudget-layers", "version": 1, "model": "m", "similarity": [0.5]}"#);
    fails(&folder, &plan("maskkv"), &["layers.json", "importance"]);
    fails(&folder, &plan("snapkv"), &["layers.json", "ask for no measurement"]);
    fails(&folder, &plan("epicache"), &["similarities of layers: expected 2, got 1"]);
}
