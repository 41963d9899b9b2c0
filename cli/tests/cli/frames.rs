//! Policies that ask for more than queries: the dump has it, or the error says what is missing.

use std::fs;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::{SMALL, Tensors, Values, fails, folder, succeeds};

/// With norms of hidden rows, all the same but one.
fn with_norms() -> Tensors {
    let mut tensors = Tensors::noise(SMALL, Dtype::F32);
    for l in 0..SMALL.layers {
        let mut data = vec![1.0; SMALL.tokens];
        data[24] = 9.0;
        let norms = Values { dtype: Dtype::F32, shape: vec![SMALL.tokens], data };
        tensors.0.insert(format!("l{l}.hidden_norms"), norms);
    }
    tensors
}

#[test]
fn guikv_plans_a_dump_with_frames() {
    let folder = folder("f_guikv");
    let frames = "system:0..3,frame:3..16,frame:18..31";
    with_norms().save_with(&folder.join("d"), &[("spans", frames)]);
    let plan = ["plan", "d", "--policy", "guikv", "--budget", "12/head", "-o", "p.json"];
    // At such a weight the token that stands out is in every head.
    succeeds(&folder, &[&plan[..], &["--set", "saliency=1000"]].concat());
    succeeds(&folder, &["check", "p.json", "d"]);
    let plan: Value = serde_json::from_slice(&fs::read(folder.join("p.json")).unwrap()).unwrap();
    assert_eq!((&plan["policy"], &plan["slots"]), (&"guikv".into(), &48.into()));
    for layer in plan["layers"].as_array().unwrap() {
        for head in layer["heads"].as_array().unwrap() {
            let kept = head["kept"].as_array().unwrap();
            assert!(kept.contains(&24.into()) && (33..41).all(|p| kept.contains(&p.into())));
        }
    }
}

#[test]
fn guikv_says_what_is_missing() {
    let folder = folder("f_missing");
    let plan = ["plan", "d", "--policy", "guikv", "--budget", "50%"];
    with_norms().save(&folder.join("d"));
    fails(&folder, &plan, &["guikv", "spans"]);
    let frames = [("spans", "frame:3..16")];
    Tensors::noise(SMALL, Dtype::F32).save_with(&folder.join("d"), &frames);
    fails(&folder, &plan, &["hidden_norms"]);
}
