//! Plans that are not, or that do not fit the dump.

use std::fs;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{SMALL, Tensors, fails, folder, succeeds};

fn planned(test: &str) -> (PathBuf, Value) {
    let folder = folder(test);
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d.safetensors"));
    let plan = ["plan", "d.safetensors", "--policy", "knorm", "--budget", "50%", "-o", "p.json"];
    succeeds(&folder, &plan);
    let plan = serde_json::from_slice(&fs::read(folder.join("p.json")).unwrap()).unwrap();
    (folder, plan)
}

fn kept(plan: &mut Value) -> &mut Vec<Value> {
    plan["layers"][1]["heads"][0]["kept"].as_array_mut().unwrap()
}

/// A change to a good plan that `check` must see.
fn unfit(test: &str, change: impl FnOnce(&mut Value), words: &[&str]) {
    let (folder, mut plan) = planned(test);
    let check = ["check", "p.json", "d.safetensors"];
    assert!(succeeds(&folder, &check).starts_with("ok: knorm at 50%: 82 of 164 slots"));
    change(&mut plan);
    fs::write(folder.join("p.json"), plan.to_string()).unwrap();
    fails(&folder, &check, &[&["p.json"], words].concat());
}

/// A change after which it is no plan, for `plot` as for `check`.
fn unreadable(test: &str, change: impl FnOnce(&mut Value), words: &[&str]) {
    let (folder, mut plan) = planned(test);
    change(&mut plan);
    fs::write(folder.join("p.json"), plan.to_string()).unwrap();
    fails(&folder, &["check", "p.json", "d.safetensors"], words);
    fails(&folder, &["plot", "p.json", "-o", "p.svg"], words);
}

#[test]
fn forms() {
    unreadable("p_format", |p| p["format"] = json!("other"), &["not a plan", "kvbudget-plan"]);
    unreadable("p_version", |p| p["version"] = json!(2), &["not a plan", "version 2"]);
    unreadable("p_field", |p| p["surprise"] = json!(1), &["not a plan", "surprise"]);
    unreadable("p_list", |p| *p = json!([1, 2]), &["not a plan"]);
    unreadable("p_budget", |p| p["budget"] = json!("200%"), &["not a plan", "200%"]);
    unreadable("p_negative", |p| kept(p)[0] = json!(-1), &["not a plan"]);
    unreadable("p_order", |p| kept(p).swap(0, 1), &["layer 1, head 0", "ascend"]);
    unreadable("p_twice", |p| kept(p)[1] = kept(p)[0].clone(), &["layer 1, head 0", "ascend"]);
    unreadable("p_beyond", |p| kept(p).push(json!(41)), &["layer 1, head 0", "below 41"]);
    unreadable("p_few", |p| p["tokens"] = json!(3), &["ascend below 3"]);
}

#[test]
fn promises() {
    unfit("u_tokens", |p| p["tokens"] = json!(4_000_000_000u32), &["4000000000 tokens", "41"]);
    unfit("u_slots", |p| p["slots"] = json!(83), &["slots", "83", "82"]);
    unfit("u_bytes", |p| p["bytes"] = json!(1), &["bytes"]);
    unfit("u_layers", |p| drop(p["layers"].as_array_mut().unwrap().pop()), &["expected 2 layers"]);
    unfit("u_budget", |p| p["budget"] = json!("25%"), &["budget allows 41 of 164"]);
    let fewer = |p: &mut Value| {
        kept(p).pop();
        p["slots"] = json!(81);
        p["bytes"] = json!(81 * 2 * 8 * 4);
    };
    unfit("u_fewer", fewer, &["budget allows 82 of 164", "keeps 81"]);
}

#[test]
fn another_budget_can_be_asked_of_a_plan() {
    let (folder, _) = planned("u_asked");
    succeeds(&folder, &["check", "p.json", "d.safetensors", "--budget", "82 slots"]);
    fails(&folder, &["check", "p.json", "d.safetensors", "--budget", "40%"], &["allows 65"]);
}

#[test]
fn what_cannot_be_drawn() {
    let (folder, mut plan) = planned("u_draw");
    fails(&folder, &["plot", "p.json", "-o", "p.gif"], &["p.gif", ".svg or .png"]);
    fails(&folder, &["plot", "p.json", "-o", "no/such/folder/p.svg"], &["p.svg"]);
    fails(&folder, &["plot", "no.json", "-o", "p.svg"], &["no.json"]);
    plan["layers"] = json!([]);
    fs::write(folder.join("p.json"), plan.to_string()).unwrap();
    fails(&folder, &["plot", "p.json", "-o", "p.svg"], &["empty"]);
    plan["layers"] = json!(vec![json!({"heads": []}); 100_000]);
    fs::write(folder.join("p.json"), plan.to_string()).unwrap();
    fails(&folder, &["plot", "p.json", "-o", "p.svg"], &["empty"]);
    plan["layers"] = json!([{"heads": vec![json!({"kept": [0]}); 5000]}]);
    fs::write(folder.join("p.json"), plan.to_string()).unwrap();
    fails(&folder, &["plot", "p.json", "-o", "p.png"], &["5000 heads"]);
}
