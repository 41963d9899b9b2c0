//! Synthetic dumps, and running the binary on them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A directory of the test's own, empty.
pub fn folder(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Runs the binary in `folder`.
pub fn kvbudget(folder: &Path, args: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_kvbudget");
    Command::new(binary).args(args).current_dir(folder).output().unwrap()
}

/// Runs it, expects success, and returns standard output.
pub fn succeeds(folder: &Path, args: &[&str]) -> String {
    let output = kvbudget(folder, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?} failed: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs it and expects one line of error that holds all of `words`, and exit code 1.
pub fn fails(folder: &Path, args: &[&str], words: &[&str]) {
    let output = kvbudget(folder, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: {word:?} is not in: {stderr}");
    }
}

/// Shape and elements of a tensor.
#[derive(Clone)]
pub struct Values {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Tensors by name, before they are a file.
#[derive(Clone)]
pub struct Tensors(pub BTreeMap<String, Values>);

/// Sizes of a synthetic dump.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub query_heads: usize,
    pub heads: usize,
    pub tokens: usize,
    pub window: usize,
    pub next: usize,
    pub dim: usize,
}

/// Small, with a GQA group of two, odd lengths, and all optional tensors.
pub const SMALL: Sizes =
    Sizes { layers: 2, query_heads: 4, heads: 2, tokens: 41, window: 8, next: 5, dim: 8 };

impl Tensors {
    /// Reproducible noise of a size at which softmax prefers some slots. Values are rounded to `dtype`.
    pub fn noise(sizes: Sizes, dtype: Dtype) -> Self {
        let Sizes { query_heads: hq, heads: h, tokens: t, window: w, next: f, dim: d, .. } = sizes;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut tensors = BTreeMap::new();
        for l in 0..sizes.layers {
            for (kind, shape) in [
                ("k", vec![h, t, d]),
                ("v", vec![h, t, d]),
                ("q", vec![hq, w, d]),
                ("o_proj", vec![hq * d, hq * d]),
                ("k_next", vec![h, f, d]),
                ("v_next", vec![h, f, d]),
                ("q_next", vec![hq, f, d]),
            ] {
                let data = (0..shape.iter().product()).map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    rounded(dtype, ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0)
                });
                let data = data.collect();
                tensors.insert(format!("l{l}.{kind}"), Values { dtype, shape, data });
            }
        }
        Self(tensors)
    }

    pub fn get(&mut self, name: &str) -> &mut Values {
        self.0.get_mut(name).unwrap()
    }

    /// Without the tensors that followed the context.
    pub fn without_next(mut self) -> Self {
        self.0.retain(|name, _| !name.ends_with("_next"));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_with(None)
    }

    fn bytes_with(&self, metadata: Option<HashMap<String, String>>) -> Vec<u8> {
        let raw: Vec<(&String, &Values, Vec<u8>)> =
            self.0.iter().map(|(name, v)| (name, v, encode(v))).collect();
        let views = raw
            .iter()
            .map(|(name, v, b)| (*name, TensorView::new(v.dtype, v.shape.clone(), b).unwrap()));
        safetensors::serialize(views, metadata).unwrap()
    }

    pub fn save(&self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }

    pub fn save_with(&self, path: &Path, metadata: &[(&str, &str)]) {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        fs::write(path, self.bytes_with(Some(metadata.iter().map(pair).collect()))).unwrap();
    }
}

impl Values {
    /// Fills a new shape with what there is, repeated.
    pub fn reshape(&mut self, shape: &[usize]) {
        self.shape = shape.to_vec();
        self.data = self.data.iter().copied().cycle().take(shape.iter().product()).collect();
    }

    /// Element type and values rounded to it.
    pub fn cast(&mut self, dtype: Dtype) {
        self.dtype = dtype;
        self.data.iter_mut().for_each(|x| *x = rounded(dtype, *x));
    }
}

fn rounded(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn encode(values: &Values) -> Vec<u8> {
    let bytes = |&x: &f32| match values.dtype {
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F32 | Dtype::I32 => x.to_le_bytes().to_vec(),
        other => panic!("no encoding for {other:?}"),
    };
    values.data.iter().flat_map(bytes).collect()
}
