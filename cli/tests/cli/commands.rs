//! Each subcommand does its work, and answers what it cannot do with what it can.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use safetensors::Dtype;
use serde_json::Value;

use crate::support::{SMALL, Sizes, Tensors, fails, folder, kvbudget, succeeds};

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn plan_writes_to_a_file_or_to_standard_output() {
    let folder = folder("c_plan");
    Tensors::noise(SMALL, Dtype::BF16).save(&folder.join("d"));
    let plan = ["plan", "d", "--policy", "ada-snapkv", "--budget", "1/4", "--set", "window=8"];
    let printed = succeeds(&folder, &plan);
    let said = succeeds(&folder, &[&plan[..], &["-o", "p.json"]].concat());
    assert!(said.starts_with("ada-snapkv at 25%: 41 of 164 slots, 1.3 KiB"), "{said}");
    let written = fs::read(folder.join("p.json")).unwrap();
    assert_eq!(printed.as_bytes(), written);
    let plan = json(&written);
    assert_eq!(plan["format"], "kvbudget-plan");
    assert_eq!((&plan["version"], &plan["tokens"]), (&1.into(), &41.into()));
    assert_eq!((&plan["policy"], &plan["budget"]), (&"ada-snapkv".into(), &"25%".into()));
    assert_eq!((&plan["slots"], &plan["bytes"]), (&41.into(), &(41 * 32).into()));
    // The window is protected: the last 8 of 41.
    for layer in plan["layers"].as_array().unwrap() {
        for head in layer["heads"].as_array().unwrap() {
            let kept = head["kept"].as_array().unwrap();
            assert!((33..41).all(|p| kept.contains(&p.into())));
        }
    }
}

#[test]
fn threads_do_not_change_a_plan() {
    let folder = folder("c_threads");
    let sizes = Sizes { tokens: 700, window: 32, ..SMALL };
    Tensors::noise(sizes, Dtype::F16).save(&folder.join("d"));
    let plan = ["plan", "d", "--policy", "layer-defensivekv", "--budget", "10%"];
    let one = succeeds(&folder, &[&plan[..], &["--threads", "1"]].concat());
    assert_eq!(one, succeeds(&folder, &[&plan[..], &["--threads", "3"]].concat()));
    assert_eq!(one, succeeds(&folder, &plan));
}

#[test]
fn budgets_in_every_unit() {
    let folder = folder("c_budgets");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    // A slot has 2 · 8 · 4 = 64 bytes, there are 4 heads of 41 tokens.
    for (budget, slots) in
        [("20%", 32), ("0.2", 32), ("10/head", 40), ("33 slots", 33), ("2 KiB", 32), ("900%", 0)]
    {
        let plan = ["plan", "d", "--policy", "random", "--budget", budget];
        if slots == 0 {
            let output = kvbudget(&folder, &plan);
            assert_eq!(output.status.code(), Some(2));
            assert!(String::from_utf8_lossy(&output.stderr).contains("900%"));
        } else {
            assert_eq!(json(succeeds(&folder, &plan).as_bytes())["slots"], slots, "{budget}");
        }
    }
}

#[test]
fn pages_are_kept_whole() {
    let folder = folder("c_units");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let plan = ["plan", "d", "--policy", "tova", "--budget", "50%", "-o", "p.json"];
    succeeds(&folder, &[&plan[..], &["--set", "unit=4"]].concat());
    succeeds(&folder, &["check", "p.json", "d", "--unit", "4"]);
    fails(&folder, &["check", "p.json", "d", "--unit", "5"], &["unit", "kept in part"]);
}

#[test]
fn queries_and_weights_may_have_types_of_their_own() {
    let folder = folder("c_types");
    let mut tensors = Tensors::noise(SMALL, Dtype::BF16);
    let eval =
        ["eval", "d", "--policies", "ada-criticalkv", "--budgets", "50%", "--json", "r.json"];
    let eval = [&eval[..], &["--set", "window=8"]].concat();
    let measured = |tensors: &Tensors| -> Value {
        tensors.save(&folder.join("d"));
        succeeds(&folder, &eval);
        let results = json(&fs::read(folder.join("r.json")).unwrap());
        results["rows"][0]["output_error"].clone()
    };
    let same_types = measured(&tensors);
    // Wider types hold the same values.
    for name in ["l0.q", "l1.o_proj", "l0.q_next"] {
        tensors.get(name).cast(Dtype::F32);
    }
    assert_eq!(measured(&tensors), same_types);
}

#[test]
fn unknown_names_list_the_known_ones() {
    let folder = folder("c_unknown");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let plan = |policy: &'static str, more: &[&'static str]| {
        [&["plan", "d", "--budget", "20%", "--policy", policy], more].concat()
    };
    let presets = ["\"snapvk\"", "snapkv", "layer-defensivekv", "lagkv"];
    fails(&folder, &plan("snapvk", &[]), &presets);
    let keys = ["--set windwo=3", "\"windwo\"", "window", "kernel", "sinks"];
    fails(&folder, &plan("snapkv", &["--set", "windwo=3"]), &keys);
    fails(&folder, &plan("snapkv", &["--set", "window=many"]), &["window = many", "expected"]);
    fails(&folder, &plan("snapkv", &["--set", "window"]), &["--set window", "key=value"]);
    fails(&folder, &plan("random", &["--reference", "kvpress"]), &["random", "snapkv", "tova"]);
    let output = kvbudget(&folder, &plan("snapkv", &["--reference", "other"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("defensivekv"));
}

#[test]
fn settings_reach_one_policy_or_all() {
    let folder = folder("c_settings");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let eval = |settings: &[&'static str]| {
        let all = ["eval", "d", "--policies", "snapkv,tova,random", "--budgets", "50%"];
        [&all[..], &["--json", "r.json"], settings].concat()
    };
    succeeds(&folder, &eval(&["--set", "window=4", "--set", "random.seed=9"]));
    let results = json(&fs::read(folder.join("r.json")).unwrap());
    let row = |i: usize| &results["rows"][i]["parameters"];
    assert_eq!((&row(0)["window"], &row(2)["seed"]), (&"4".into(), &"9".into()));
    fails(&folder, &eval(&["--set", "tova.window=4"]), &["tova", "\"window\"", "known:"]);
    fails(&folder, &eval(&["--set", "other.window=4"]), &["\"other\"", "snapkv, tova, random"]);
}

#[test]
fn reference_modes_are_policies_too() {
    let folder = folder("c_reference");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let policies = "kvpress:knorm,knorm";
    let table = succeeds(&folder, &["eval", "d", "--policies", policies, "--budgets", "50%"]);
    assert!(table.contains("kvpress:knorm"), "{table}");
    let plan = ["plan", "d", "--policy", "knorm", "--reference", "kvpress", "--budget", "50%"];
    assert_eq!(json(succeeds(&folder, &plan).as_bytes())["policy"], "kvpress:knorm");
}

#[test]
fn what_a_policy_needs_is_asked_first() {
    let folder = folder("c_needs");
    Tensors::noise(SMALL, Dtype::F32).save(&folder.join("d"));
    let eval = |policies: &'static str| ["eval", "d", "--budgets", "50%", "--policies", policies];
    fails(&folder, &eval("knorm,h2o"), &["policy h2o cannot run on d", "h2o"]);
    fails(&folder, &eval("snapkv"), &["snapkv", "last 32 tokens", "holds 8"]);
    let mut bare = Tensors::noise(SMALL, Dtype::F32);
    bare.0.retain(|name, _| !name.ends_with("o_proj"));
    bare.save(&folder.join("d"));
    let settings = ["--set", "window=8"];
    let words = ["criticalkv", "output projection"];
    fails(&folder, &[&eval("criticalkv")[..], &settings].concat(), &words);
    bare.without_next().save(&folder.join("d"));
    fails(&folder, &eval("knorm"), &["d has no q_next, k_next and v_next"]);
    succeeds(&folder, &["plan", "d", "--policy", "knorm", "--budget", "50%"]);
}

#[test]
fn eval_prints_a_block_per_budget() {
    let folder = folder("c_eval");
    Tensors::noise(SMALL, Dtype::F16).save(&folder.join("d"));
    let eval = ["eval", "d", "--policies", "knorm,random,tova", "--budgets", "10%,50%"];
    let table = succeeds(&folder, &eval);
    let blocks: Vec<&str> = table.split("\nbudget ").skip(1).collect();
    assert_eq!(blocks.len(), 2);
    for (block, (budget, slots)) in blocks.iter().zip([("10%", " 16 "), ("50%", " 82 ")]) {
        assert!(block.starts_with(budget));
        for policy in ["knorm", "random", "tova"] {
            let line = block.lines().find(|line| line.starts_with(policy)).unwrap();
            assert!(line.contains(slots), "{line}");
        }
        let width = block.lines().nth(1).map(str::len);
        assert!(block.trim_end().lines().skip(1).all(|line| Some(line.len()) == width), "{table}");
        assert_eq!(block.matches('*').count(), 4, "one best per measure: {block}");
    }
}

#[test]
fn inspect_shows_what_there_is() {
    let folder = folder("c_inspect");
    Tensors::noise(SMALL, Dtype::BF16).save(&folder.join("d"));
    let shown = succeeds(&folder, &["inspect", "d"]);
    for words in
        ["layers       2", "tokens       41", "next tokens  5", "bf16", "164 slots", "4 x 8 x 8"]
    {
        assert!(shown.contains(words), "{words} is not in {shown}");
    }
}

#[test]
fn plot_draws_both_kinds() {
    let folder = folder("c_plot");
    Tensors::noise(SMALL, Dtype::F16).save(&folder.join("d"));
    succeeds(&folder, &["plan", "d", "--policy", "knorm", "--budget", "50%", "-o", "p.json"]);
    succeeds(&folder, &["plot", "p.json", "-o", "p.svg"]);
    succeeds(&folder, &["plot", "p.json", "-o", "p.png"]);
    let svg = fs::read_to_string(folder.join("p.svg")).unwrap();
    for words in ["knorm at 50%", "82 of 164 slots", "layer 0", "position"] {
        assert!(svg.contains(words), "{words}");
    }
    assert!(fs::read(folder.join("p.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn demo_tells_and_draws() {
    let folder = folder("c_demo");
    let table = succeeds(&folder, &["demo"]);
    let results = json(&fs::read(folder.join("kvbudget-demo/results.json")).unwrap());
    let rows = results["rows"].as_array().unwrap();
    for policy in [
        "snapkv",
        "ada-snapkv",
        "ada-criticalkv",
        "defensivekv",
        "layer-defensivekv",
        "streaming",
        "knorm",
        "random",
    ] {
        assert!(table.contains(&format!("\n{policy} ")), "{table}");
        // 5 layers, 3 heads, 704 tokens.
        for (budget, slots) in [("5%", 528), ("10%", 1056), ("20%", 2112), ("40%", 4224)] {
            let row = rows.iter().find(|r| r["policy"] == policy && r["budget"] == budget).unwrap();
            assert_eq!((&row["slots"], &row["bytes"]), (&slots.into(), &(slots * 256).into()));
            let error = row["output_error"]["mean"].as_f64().unwrap();
            assert!(error > 0.0 && error < 2.0, "{policy} at {budget}: {error}");
        }
    }
    for name in ["map.svg", "map.png", "error.svg", "error.png", "plan.json"] {
        assert!(
            fs::metadata(folder.join("kvbudget-demo").join(name)).unwrap().len() > 1000,
            "{name}"
        );
    }
}

#[test]
fn a_closed_pipe_is_no_error() {
    let folder = folder("c_pipe");
    let sizes = Sizes { tokens: 20_000, dim: 1, window: 1, ..SMALL };
    Tensors::noise(sizes, Dtype::F16).save(&folder.join("d"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvbudget"))
        .args(["plan", "d", "--policy", "knorm", "--budget", "90%"])
        .current_dir(&folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // More than a pipe holds is on its way; one byte is read, then nobody listens.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn usage_errors_exit_with_two() {
    let folder = folder("c_usage");
    for args in [&[][..], &["plan"], &["fly"], &["demo", "--threads", "0"]] {
        assert_eq!(kvbudget(&folder, args).status.code(), Some(2), "{args:?}");
    }
    assert!(kvbudget(&folder, &["--version"]).status.success());
}
