//! The header: from the first bytes of an untrusted file to a geometry and a place for every tensor.
//!
//! The safetensors crate checks that tensors tile the data section and that shapes agree with sizes; here the
//! header is bounded before it is read, the data section is held against the size of the file, and the
//! tensors against the dump format.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek, SeekFrom};

use anyhow::{Context, Result, bail, ensure};
use kvbudget::{Dtype, Geometry, LayerShape, MAX_LEN, Spans};
use safetensors::tensor::Metadata;

/// A header holds a line per tensor and some metadata; more than this is hostile or no dump.
const MAX_HEADER: u64 = 16 << 20;
const KINDS: [&str; 11] = [
    "k",
    "v",
    "q",
    "q_probe",
    "o_proj",
    "hidden_norms",
    "expected_mean",
    "expected_covariance",
    "q_next",
    "k_next",
    "v_next",
];

/// A validated header.
#[derive(Debug, Clone)]
pub struct Header {
    /// Layers, heads, head dims and the type of keys and values.
    pub geometry: Geometry,
    /// Tokens of the context.
    pub tokens: u32,
    /// Tensors of each layer.
    pub layers: Vec<LayerTensors>,
    /// What stretches of the context are, if the dump says.
    pub spans: Option<Spans>,
    /// Free text that came with the dump, sorted by key.
    pub metadata: BTreeMap<String, String>,
    /// Size of the file.
    pub file_bytes: u64,
}

/// Tensors of a layer.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// Keys.
    pub k: TensorInfo,
    /// Values.
    pub v: TensorInfo,
    /// Queries of the last tokens.
    pub q: TensorInfo,
    /// Queries of a probe.
    pub q_probe: Option<TensorInfo>,
    /// Output projection.
    pub o_proj: Option<TensorInfo>,
    /// Norms of hidden rows.
    pub hidden_norms: Option<TensorInfo>,
    /// Mean and covariance of the queries to come.
    pub expected: Option<[TensorInfo; 2]>,
    /// Queries, keys and values of the tokens that followed.
    pub next: Option<[TensorInfo; 3]>,
}

/// What a tensor is and where it starts in the file.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Its shape; the product is `elements`.
    pub shape: Vec<u32>,
    /// Number of elements.
    pub elements: usize,
    /// First byte.
    pub start: u64,
}

impl Header {
    pub(super) fn read(source: &mut (impl Read + Seek)) -> Result<Self> {
        let file_bytes = source.seek(SeekFrom::End(0))?;
        source.seek(SeekFrom::Start(0))?;
        let mut size = [0; 8];
        ensure!(
            file_bytes >= 8,
            "not a safetensors file: {file_bytes} bytes, shorter than any header"
        );
        source.read_exact(&mut size)?;
        let size = u64::from_le_bytes(size);
        ensure!(
            size <= MAX_HEADER,
            "not a safetensors dump: its header claims {size} bytes, at most {MAX_HEADER} are allowed"
        );
        ensure!(
            size <= file_bytes - 8,
            "truncated: the header claims {size} bytes, the file has {} after its length",
            file_bytes - 8
        );
        let mut text = vec![0; size as usize];
        source.read_exact(&mut text)?;
        let meta: Metadata = serde_json::from_slice(&text).context("bad safetensors header")?;
        let data = file_bytes - 8 - size;
        ensure!(
            meta.data_len() as u64 == data,
            "{}: the tensors take {} bytes, the file has {data} after its header",
            if meta.data_len() as u64 > data { "truncated" } else { "trailing bytes" },
            meta.data_len()
        );
        let (geometry, tokens, layers) = layers(&meta, 8 + size)?;
        let metadata = meta.metadata().iter().flatten();
        let metadata: BTreeMap<String, String> =
            metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        version(&metadata)?;
        let spans = spans(&metadata, tokens)?;
        Ok(Self { geometry, tokens, layers, spans, metadata, file_bytes })
    }

    /// Tokens after the context that the dump holds.
    pub fn next_tokens(&self) -> Option<u32> {
        self.layers[0].next.as_ref().map(|[q, ..]| q.shape[1])
    }
}

impl LayerTensors {
    /// All tensors of the layer.
    pub fn iter(&self) -> impl Iterator<Item = &TensorInfo> {
        let next = self.next.iter().flatten();
        let optional = [&self.q_probe, &self.o_proj, &self.hidden_norms].into_iter().flatten();
        let expected = self.expected.iter().flatten();
        [&self.k, &self.v, &self.q].into_iter().chain(optional).chain(expected).chain(next)
    }
}

/// Sorts the tensors by layer, then checks each layer against the format and all against the first.
fn layers(meta: &Metadata, data_start: u64) -> Result<(Geometry, u32, Vec<LayerTensors>)> {
    let mut by_layer: BTreeMap<u32, HashMap<&str, TensorInfo>> = BTreeMap::new();
    for (name, info) in meta.tensors() {
        let (layer, kind) = parse_name(&name)?;
        let info = tensor(name, info, data_start)?;
        by_layer.entry(layer).or_default().insert(kind, info);
    }
    ensure!(
        !by_layer.is_empty(),
        "the file holds no tensors; a dump has at least l0.k, l0.v and l0.q"
    );
    let mut shapes = Vec::new();
    let mut layers: Vec<LayerTensors> = Vec::new();
    for (expected, (layer, mut tensors)) in (0u32..).zip(by_layer) {
        ensure!(
            layer == expected,
            "tensors of layer {expected} are missing (layer {layer} is there)"
        );
        let mut need = |kind: &str| match tensors.remove(kind) {
            Some(info) => Ok(info),
            None => bail!("tensor \"l{layer}.{kind}\" is missing"),
        };
        let (k, v, q) = (need("k")?, need("v")?, need("q")?);
        let (q_probe, o_proj) = (tensors.remove("q_probe"), tensors.remove("o_proj"));
        let hidden_norms = tensors.remove("hidden_norms");
        let expected = together(layer, &mut tensors, ["expected_mean", "expected_covariance"])?;
        let next = together(layer, &mut tensors, ["q_next", "k_next", "v_next"])?;
        let layer = LayerTensors { k, v, q, q_probe, o_proj, hidden_norms, expected, next };
        shapes.push(layer_shape(&layer)?);
        same_as_first(layers.first().unwrap_or(&layer), &layer)?;
        layers.push(layer);
    }
    let (dtype, tokens) = (layers[0].k.dtype, layers[0].k.shape[1]);
    Ok((Geometry::new(shapes, dtype)?, tokens, layers))
}

/// Tensors of a layer that come together or not at all.
fn together<const N: usize>(
    layer: u32,
    tensors: &mut HashMap<&str, TensorInfo>,
    kinds: [&str; N],
) -> Result<Option<[TensorInfo; N]>> {
    if !kinds.iter().any(|kind| tensors.contains_key(kind)) {
        return Ok(None);
    }
    let need = |kind| {
        tensors.remove(kind).with_context(|| {
            let all = kinds.join(", ");
            format!("tensor \"l{layer}.{kind}\" is missing: {all} come together or not at all")
        })
    };
    let all = kinds.into_iter().map(need).collect::<Result<Vec<_>>>()?;
    Ok(all.try_into().ok())
}

/// Versions that this code reads. Files of others would be misread.
fn version(metadata: &BTreeMap<String, String>) -> Result<()> {
    match metadata.get("version").map(String::as_str) {
        None | Some("1" | "2") => Ok(()),
        Some(other) => bail!("the dump has version {other:?}; expected 1 or 2"),
    }
}

fn spans(metadata: &BTreeMap<String, String>, tokens: u32) -> Result<Option<Spans>> {
    let Some(text) = metadata.get("spans") else { return Ok(None) };
    let spans: Spans = text.parse().context("metadata \"spans\"")?;
    ensure!(
        spans.end() <= tokens,
        "metadata \"spans\" ends at {}, the context at {tokens}",
        spans.end()
    );
    Ok(Some(spans))
}

fn parse_name(name: &str) -> Result<(u32, &'static str)> {
    let parsed = name.strip_prefix('l').and_then(|rest| {
        let (number, kind) = rest.split_once('.')?;
        let layer: u32 = number.parse().ok()?;
        let kind = KINDS.into_iter().find(|&k| k == kind)?;
        // One spelling per tensor: no l00, no l+0.
        (layer.to_string() == number).then_some((layer, kind))
    });
    parsed.with_context(|| {
        format!(
            "unknown tensor {:?}: expected l<layer>.<one of {}>",
            shorten(name),
            KINDS.join(", ")
        )
    })
}

/// A hostile name may be as long as the header.
fn shorten(name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

fn tensor(
    name: String,
    info: &safetensors::tensor::TensorInfo,
    data_start: u64,
) -> Result<TensorInfo> {
    let dtype = match info.dtype {
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::BF16,
        other => bail!("tensor {name:?} has dtype {other:?}; expected F32, F16 or BF16"),
    };
    let dims = match name.rsplit('.').next() {
        Some("o_proj" | "expected_mean") => 2,
        Some("hidden_norms") => 1,
        _ => 3,
    };
    ensure!(
        info.shape.len() == dims,
        "tensor {name:?} has shape {:?}; expected {dims} dimensions",
        info.shape
    );
    let dim = |&n: &usize| match u32::try_from(n) {
        Ok(n) if n > 0 && u64::from(n) <= MAX_LEN => Ok(n),
        _ => {
            bail!("tensor {name:?} has shape {:?}; expected sizes from 1 to {MAX_LEN}", info.shape)
        }
    };
    let shape = info.shape.iter().map(dim).collect::<Result<Vec<_>>>()?;
    // The product fits: it was checked against the offsets, and those against the file.
    let elements = info.shape.iter().product();
    Ok(TensorInfo { name, dtype, shape, elements, start: data_start + info.data_offsets.0 as u64 })
}

fn layer_shape(layer: &LayerTensors) -> Result<LayerShape> {
    let (heads, tokens, dim) = (layer.k.shape[0], layer.k.shape[1], layer.k.shape[2]);
    let (query_heads, window) = (layer.q.shape[0], layer.q.shape[1]);
    let shape = LayerShape::new(query_heads, heads, dim)
        .with_context(|| format!("tensors {:?} and {:?}", layer.q.name, layer.k.name))?;
    expect_shape(&layer.v, &[heads, tokens, dim])?;
    expect_shape(&layer.q, &[query_heads, window, dim])?;
    ensure!(
        window <= tokens,
        "tensor {:?} holds {window} queries of a context of {tokens} tokens",
        layer.q.name
    );
    if let Some(o_proj) = &layer.o_proj {
        let columns =
            query_heads.checked_mul(dim).context("query heads times head dim overflow")?;
        expect_shape(o_proj, &[o_proj.shape[0], columns])?;
    }
    if let Some(probe) = &layer.q_probe {
        expect_shape(probe, &[query_heads, probe.shape[1], dim])?;
    }
    if let Some(norms) = &layer.hidden_norms {
        expect_shape(norms, &[tokens])?;
        expect_f32(norms)?;
    }
    if let Some([mean, covariance]) = &layer.expected {
        expect_shape(mean, &[query_heads, dim])?;
        expect_shape(covariance, &[query_heads, dim, dim])?;
        expect_f32(mean).and(expect_f32(covariance))?;
    }
    if let Some([q, k, v]) = &layer.next {
        let next = q.shape[1];
        expect_shape(q, &[query_heads, next, dim])?;
        expect_shape(k, &[heads, next, dim])?;
        expect_shape(v, &[heads, next, dim])?;
        ensure!(
            u64::from(tokens) + u64::from(next) <= MAX_LEN,
            "{tokens} tokens and {next} next ones are more than {MAX_LEN}"
        );
    }
    Ok(shape)
}

fn expect_shape(info: &TensorInfo, expected: &[u32]) -> Result<()> {
    ensure!(
        info.shape == expected,
        "tensor {:?} has shape {:?}; expected {expected:?}",
        info.name,
        info.shape
    );
    Ok(())
}

fn expect_f32(info: &TensorInfo) -> Result<()> {
    ensure!(
        info.dtype == Dtype::F32,
        "tensor {:?} has dtype {}; expected {}",
        info.name,
        info.dtype,
        Dtype::F32
    );
    Ok(())
}

/// Layers agree on the number of tokens, on which tensors there are, and on the type of keys and values.
fn same_as_first(first: &LayerTensors, layer: &LayerTensors) -> Result<()> {
    let name = &layer.k.name;
    let tokens = layer.k.shape[1];
    ensure!(
        tokens == first.k.shape[1],
        "tensor {name:?} holds {tokens} tokens, layer 0 holds {}",
        first.k.shape[1]
    );
    let caches = [&layer.k, &layer.v].into_iter();
    for info in caches.chain(layer.next.iter().flat_map(|[_, k, v]| [k, v])) {
        ensure!(
            info.dtype == first.k.dtype,
            "tensor {:?} has dtype {}; expected {} like {:?}",
            info.name,
            info.dtype,
            first.k.dtype,
            first.k.name
        );
    }
    let next = |l: &LayerTensors| l.next.as_ref().map(|[q, ..]| q.shape[1]);
    ensure!(
        next(layer) == next(first),
        "{name:?}: every layer must hold the same number of next tokens, or none"
    );
    let optional = |l: &LayerTensors| {
        [
            ("q_probe", l.q_probe.is_some()),
            ("o_proj", l.o_proj.is_some()),
            ("hidden_norms", l.hidden_norms.is_some()),
            ("expected_mean", l.expected.is_some()),
        ]
    };
    for ((kind, here), (_, there)) in optional(layer).into_iter().zip(optional(first)) {
        ensure!(here == there, "{name:?}: {kind} must be there for every layer or for none");
    }
    Ok(())
}
