//! Dumps that are not: each class of corruption ends in one line that says what is wrong.

use std::fs;
use std::path::PathBuf;

use safetensors::Dtype;

use crate::support::{SMALL, Tensors, fails, folder, succeeds};

fn good() -> Tensors {
    Tensors::noise(SMALL, Dtype::F32)
}

/// `inspect`, `plan`, `eval` and `check` read through the same door; `inspect` stands for them.
fn rejected(test: &str, bytes: &[u8], words: &[&str]) -> PathBuf {
    let folder = folder(test);
    fs::write(folder.join("bad.safetensors"), bytes).unwrap();
    fails(&folder, &["inspect", "bad.safetensors"], &[&["bad.safetensors"], words].concat());
    folder
}

fn rejected_after(test: &str, break_it: impl FnOnce(&mut Tensors), words: &[&str]) {
    let mut tensors = good();
    break_it(&mut tensors);
    rejected(test, &tensors.bytes(), words);
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn not_safetensors() {
    rejected("empty", b"", &["0 bytes"]);
    rejected("short", b"1234567", &["7 bytes"]);
    rejected("text", &b"what is this? surely no tensors here".repeat(9), &["header claims"]);
    rejected("no_json", &with_header("{no", 0), &["bad safetensors header"]);
    rejected("no_tensors", &with_header("{}", 0), &["no tensors"]);
    rejected("not_utf8", &[4, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0xfd, 0xfc], &["header"]);
    rejected("nested", &with_header(&"[".repeat(1 << 20), 0), &["header"]);
}

#[test]
fn hostile_sizes() {
    for claim in [u64::MAX, u64::MAX - 7, 1 << 40, 17 << 20] {
        let mut bytes = good().bytes();
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        rejected("claims", &bytes, &["header claims"]);
    }
    rejected("past_the_end", &with_header("{}", 0)[..9], &["truncated"]);
    let tensor = |shape: &str, end: &str| {
        let info =
            format!(r#"{{"l0.k":{{"dtype":"F16","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
        with_header(&info, 16)
    };
    let max = u64::MAX.to_string();
    rejected("overflow", &tensor(&format!("[{max},{max},2]"), "16"), &["header"]);
    rejected("huge", &tensor("[1099511627776,1,1]", "2199023255552"), &["truncated"]);
    rejected("negative", &tensor("[-1,1,8]", "16"), &["header"]);
    rejected("reversed", &tensor("[1,1,8]", "-16"), &["header"]);
    rejected("zero", &tensor("[0,1,8]", "0"), &["trailing bytes"]);
}

#[test]
fn truncated_and_trailing() {
    let mut bytes = good().bytes();
    bytes.push(0);
    rejected("trailing", &bytes, &["trailing bytes"]);
    bytes.truncate(bytes.len() - 2);
    rejected("truncated", &bytes, &["truncated"]);
    bytes.truncate(40);
    rejected("in_header", &bytes, &["truncated"]);
}

#[test]
fn names() {
    let insert = |name: &'static str| {
        move |t: &mut Tensors| {
            let tensor = t.get("l0.k").clone();
            t.0.insert(name.to_owned(), tensor);
        }
    };
    rejected_after("unknown", insert("l0.kk"), &["unknown tensor \"l0.kk\"", "q_next"]);
    rejected_after("padded", insert("l01.k"), &["unknown tensor \"l01.k\""]);
    rejected_after("foreign", insert("model.embed"), &["unknown tensor \"model.embed\""]);
    rejected_after("gap", insert("l3.k"), &["layer 2 are missing"]);
    rejected_after("no_v", |t| drop(t.0.remove("l1.v")), &["\"l1.v\" is missing"]);
    rejected_after("no_q", |t| drop(t.0.remove("l0.q")), &["\"l0.q\" is missing"]);
    rejected_after(
        "no_first",
        |t| t.0.retain(|n, _| n.starts_with("l1")),
        &["layer 0 are missing"],
    );
    let words = ["\"l1.v_next\" is missing", "together or not at all"];
    rejected_after("half_next", |t| drop(t.0.remove("l1.v_next")), &words);
    let no_next = |t: &mut Tensors| t.0.retain(|n, _| !(n.starts_with("l1") && n.contains("next")));
    rejected_after("next_once", no_next, &["every layer"]);
    rejected_after("o_proj_once", |t| drop(t.0.remove("l0.o_proj")), &["o_proj"]);
}

#[test]
fn shapes() {
    let reshape = |name: &'static str, shape: &'static [usize]| {
        move |t: &mut Tensors| t.get(name).reshape(shape)
    };
    rejected_after("v_short", reshape("l0.v", &[2, 40, 8]), &["\"l0.v\"", "[2, 41, 8]"]);
    rejected_after("rank", reshape("l0.k", &[2, 41 * 8]), &["\"l0.k\"", "3 dimensions"]);
    rejected_after("flat_o", reshape("l0.o_proj", &[32, 31]), &["\"l0.o_proj\"", "[32, 32]"]);
    rejected_after("heads", reshape("l0.q", &[3, 8, 8]), &["3 query heads", "2 kv heads"]);
    rejected_after("window", reshape("l1.q", &[4, 42, 8]), &["42 queries", "41 tokens"]);
    rejected_after("dim", reshape("l0.q", &[4, 8, 4]), &["\"l0.q\"", "[4, 8, 8]"]);
    rejected_after("next_q", reshape("l0.q_next", &[4, 6, 8]), &["\"l0.k_next\"", "[2, 6, 8]"]);
    rejected_after("zero_dim", reshape("l0.v", &[2, 0, 8]), &["\"l0.v\"", "sizes from 1"]);
    let tokens = |t: &mut Tensors| ["l1.k", "l1.v"].map(|n| t.get(n).reshape(&[2, 40, 8])).len();
    rejected_after("tokens", |t| assert_eq!(tokens(t), 2), &["\"l1.k\"", "40 tokens", "41"]);
    let next = |t: &mut Tensors| {
        t.get("l1.q_next").reshape(&[4, 3, 8]);
        t.get("l1.k_next").reshape(&[2, 3, 8]);
        t.get("l1.v_next").reshape(&[2, 3, 8]);
    };
    rejected_after("next", next, &["same number of next tokens"]);
}

#[test]
fn dtypes() {
    let cast = |name: &'static str, dtype: Dtype| move |t: &mut Tensors| t.get(name).cast(dtype);
    rejected_after("integers", cast("l0.q", Dtype::I32), &["\"l0.q\"", "I32", "BF16"]);
    rejected_after("v_half", cast("l0.v", Dtype::F16), &["\"l0.v\"", "dtype f16", "expected f32"]);
    rejected_after("layer_half", cast("l1.k", Dtype::BF16), &["\"l1.k\"", "dtype bf16"]);
    rejected_after("next_half", cast("l1.k_next", Dtype::F16), &["\"l1.k_next\"", "dtype f16"]);
}

#[test]
fn every_command_reads_through_the_same_door() {
    let folder = rejected("door", &good().bytes()[..100], &["truncated"]);
    fails(
        &folder,
        &["plan", "bad.safetensors", "--policy", "knorm", "--budget", "50%"],
        &["truncated"],
    );
    let eval = ["eval", "bad.safetensors", "--policies", "knorm", "--budgets", "50%"];
    fails(&folder, &eval, &["truncated"]);
    good().save(&folder.join("good.safetensors"));
    let plan = ["plan", "good.safetensors", "--policy", "knorm", "--budget", "50%", "-o", "p.json"];
    succeeds(&folder, &plan);
    fails(&folder, &["check", "p.json", "bad.safetensors"], &["truncated"]);
    fails(&folder, &["inspect", "no.safetensors"], &["no.safetensors"]);
    fails(&folder, &["inspect", "."], &["."]);
}

#[test]
fn numbers_that_are_none() {
    let folder = folder("nan");
    let mut tensors = good();
    tensors.get("l1.k").data[7] = f32::NAN;
    tensors.get("l1.v").data[3] = f32::INFINITY;
    tensors.save(&folder.join("d.safetensors"));
    let plan = ["plan", "d.safetensors", "--policy", "knorm", "--budget", "50%"];
    fails(&folder, &plan, &["layer 1", "NaN", "allow_nan"]);
    succeeds(&folder, &[&plan[..], &["--set", "allow_nan=true"]].concat());
    let eval = ["eval", "d.safetensors", "--policies", "random", "--budgets", "50%"];
    fails(&folder, &eval, &["layer 1", "not finite"]);
    let shown = succeeds(&folder, &["inspect", "d.safetensors"]);
    let line = |name: &str| shown.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
    assert!(line("l1.k ").ends_with(" 1") && line("l1.v ").ends_with(" 1"), "{shown}");
    assert!(line("l0.k ").ends_with(" 0"), "{shown}");
}
