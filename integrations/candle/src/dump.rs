//! The dump file: safetensors with string metadata, the same bytes for the same content.
//!
//! The header is written here because the safetensors crate keeps metadata in a hash map, so that
//! its files differ from run to run and cannot be pinned by a hash.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

/// Named tensors and what is known about them.
#[derive(Debug, Clone, Default)]
pub struct Dump {
    pub tensors: BTreeMap<String, Tensor>,
    pub metadata: BTreeMap<String, String>,
}

impl Dump {
    /// Adds `tensor` as `dtype`, and refuses values that `dtype` cannot hold.
    pub fn insert(&mut self, name: String, tensor: &Tensor, dtype: DType) -> Result<()> {
        let tensor = tensor.contiguous()?.to_dtype(dtype)?;
        // A sum of finite f16 or bf16 values stays finite in f64; one infinity or NaN does not.
        let sum = tensor.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        if !sum.is_finite() {
            bail!("{name} has values that are not finite as {}", dtype.as_str());
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut header = BTreeMap::new();
        let mut data = Vec::new();
        for (name, tensor) in &self.tensors {
            let start = data.len();
            let dtype = append_little_endian(tensor, &mut data)
                .with_context(|| format!("cannot write {name}"))?;
            header.insert(
                name.as_str(),
                json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, data.len()]}),
            );
        }
        let metadata: Vec<_> = self.metadata.iter().collect();
        header.insert("__metadata__", json!(BTreeMap::from_iter(metadata)));

        let mut header = serde_json::to_vec::<BTreeMap<&str, Value>>(&header)?;
        // The format asks for data at a multiple of eight bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut header);
        bytes.append(&mut data);
        Ok(bytes)
    }

    /// Writes the file in one step, so that an interrupted run leaves no half of it.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        fs::write(&partial, self.to_bytes()?)
            .and_then(|()| fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Appends the tensor's bytes and returns its safetensors dtype.
fn append_little_endian(tensor: &Tensor, data: &mut Vec<u8>) -> Result<&'static str> {
    let flat = tensor.flatten_all()?;
    match tensor.dtype() {
        DType::F16 => {
            for value in flat.to_vec1::<half::f16>()? {
                data.extend(value.to_le_bytes());
            }
            Ok("F16")
        }
        DType::BF16 => {
            for value in flat.to_vec1::<half::bf16>()? {
                data.extend(value.to_le_bytes());
            }
            Ok("BF16")
        }
        DType::F32 => {
            for value in flat.to_vec1::<f32>()? {
                data.extend(value.to_le_bytes());
            }
            Ok("F32")
        }
        other => bail!("a dump cannot hold {}", other.as_str()),
    }
}
