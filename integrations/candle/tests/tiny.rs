//! The dump explains the attention, on a tiny llama with random weights.

#[path = "common/plain_attention.rs"]
mod plain_attention;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::rms_norm;
use kvbudget::{ExpectedQueries, QueryMoments};
use kvbudget_candle::capture::capture_with;
use kvbudget_candle::host::Lent;
use kvbudget_candle::{CaptureOptions, DenseAttention, Dump};
use plain_attention::{RecordOutputs, worst_ratio};
use tiny_model::{LAYERS, Tiny, tiny_ids};

const TOKENS: usize = 20;
const NEXT: usize = 5;

fn options(layers: &[usize], window: usize, dtype: DType) -> CaptureOptions {
    let layers = layers.to_vec();
    CaptureOptions { layers, tokens: TOKENS, window, next: NEXT, dtype, ..Default::default() }
}

/// A dump, and the attention outputs of the layers it holds.
fn captured(options: &CaptureOptions) -> (Dump, Vec<Tensor>) {
    let model = Tiny::new().and_then(|tiny| tiny.load()).expect("the model loads");
    let mut recorder = RecordOutputs::new(DenseAttention::new(LAYERS), LAYERS);
    let dump = capture_with(&model, &tiny_ids(TOKENS + NEXT), options, &mut recorder);
    let outputs = options.layers.iter().map(|&layer| recorder.layer(layer));
    (
        dump.expect("the capture succeeds"),
        outputs.collect::<Result<_>>().expect("every layer was called"),
    )
}

#[test]
fn dump_explains_attention() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for window in [6, TOKENS] {
            let (dump, outputs) = captured(&options(&[0, 2], window, dtype));
            for (layer, output) in outputs.iter().enumerate() {
                let ratio = worst_ratio(&dump, layer, output)?;
                assert!(ratio <= 1.0, "{dtype:?}, window {window}, layer {layer}: {ratio}");
            }
        }
    }
    Ok(())
}

#[test]
fn corrupted_element_is_noticed() -> Result<()> {
    // The bound grows with the rounding of the dump, and with it what can be told from rounding.
    for (dtype, change) in [(DType::F32, 0.1), (DType::F16, 8.0), (DType::BF16, 32.0)] {
        let (dump, outputs) = captured(&options(&[1], TOKENS, dtype));
        for name in ["k", "v", "q", "k_next", "v_next", "q_next"] {
            let mut corrupted = dump.clone();
            let tensor = &dump.tensors[&format!("l0.{name}")];
            // The last element, which the newest token's query or, as a key or value, the last query sees.
            let mut values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            *values.last_mut().expect("the tensor has elements") += change;
            let values = Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?;
            let values = values.to_dtype(dtype)?;
            corrupted.tensors.insert(format!("l0.{name}"), values);
            let ratio = worst_ratio(&corrupted, 0, &outputs[0])?;
            assert!(ratio > 1.0, "{dtype:?}, {name}: {ratio}");
        }
    }
    Ok(())
}

#[test]
fn wrong_layer_is_noticed() -> Result<()> {
    let (dump, _) = captured(&options(&[0], TOKENS, DType::F32));
    let (_, outputs) = captured(&options(&[1], TOKENS, DType::F32));
    assert!(worst_ratio(&dump, 0, &outputs[0])? > 1.0);
    Ok(())
}

/// A probe sees the context as the tokens that follow it do, and leaves nothing behind.
#[test]
fn probe_is_rolled_back() -> Result<()> {
    let layers: Vec<usize> = (0..LAYERS).collect();
    let plain = options(&layers, 6, DType::F32);
    let probe = tiny_ids(TOKENS + NEXT)[TOKENS..].to_vec();
    let model = Tiny::new()?.load()?;
    let dump = |options: &CaptureOptions| {
        kvbudget_candle::capture(&model, &tiny_ids(TOKENS + NEXT), options).expect("a dump")
    };
    let without = dump(&plain);
    let with = dump(&CaptureOptions { probe, ..plain });
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    for (name, tensor) in &without.tensors {
        assert_eq!(values(tensor)?, values(&with.tensors[name])?, "{name}");
    }
    for l in 0..LAYERS {
        let [probe, next] =
            ["q_probe", "q_next"].map(|kind| &with.tensors[&format!("l{l}.{kind}")]);
        assert_eq!(values(probe)?, values(next)?, "layer {l}");
    }
    assert_eq!(
        (without.metadata["version"].as_str(), with.metadata["version"].as_str()),
        ("1", "2")
    );
    Ok(())
}

/// What enters the first layer are the tokens' embeddings.
#[test]
fn hidden_norms_are_those_of_the_residual_stream() -> Result<()> {
    let options = CaptureOptions { hidden_norms: true, ..options(&[0, 1], 6, DType::F16) };
    let (dump, _) = captured(&options);
    let ids = tiny_ids(TOKENS);
    let embedding = Tiny::new()?.weight("token_embd.weight").to_dtype(DType::F32)?;
    let rows = embedding.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
    let expected: Vec<f32> = rows.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
    let norms: Vec<f32> = dump.tensors["l0.hidden_norms"].to_vec1()?;
    assert_eq!(norms.len(), TOKENS);
    for (norm, expected) in norms.iter().zip(&expected) {
        assert!((norm - expected).abs() <= 1e-5 * expected, "{norm} {expected}");
    }
    let later: Vec<f32> = dump.tensors["l1.hidden_norms"].to_vec1()?;
    assert_ne!(norms, later);
    Ok(())
}

/// What is expected of queries that never saw a rotation, worked out from the weights of the first layer.
#[test]
fn expected_queries_are_those_before_rope() -> Result<()> {
    let options = CaptureOptions { expected: 100, ..options(&[0, 1], 6, DType::F16) };
    let (dump, _) = captured(&options);
    let tiny = Tiny::new()?;
    let model = Tiny::new()?.load()?;
    let weight = |name: &str| tiny.weight(name).to_dtype(DType::F32);
    let ids = &tiny_ids(TOKENS)[4..];
    let rows = weight("token_embd.weight")?.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
    let norm = weight("blk.0.attn_norm.weight")?;
    let normed = rms_norm(&rows.contiguous()?, &norm, model.config().rms_eps)?;
    let q = normed.matmul(&weight("blk.0.attn_q.weight")?.t()?)?;
    let shape = model.geometry()?.layers()[0];
    let q = q.reshape((ids.len(), shape.query_heads(), shape.head_dim()))?;

    let mut moments = QueryMoments::new(shape);
    moments.push(&Lent::new(&q)?.all_tokens()?).expect("queries of this shape");
    let tokens = TOKENS as u32;
    let expected = moments.expected(&model.rope()?, tokens..tokens + 100).expect("moments");
    let close = |name: &str, of: fn(&ExpectedQueries, usize) -> &[f32]| -> Result<()> {
        let dumped: Vec<f32> = dump.tensors[&format!("l0.{name}")].flatten_all()?.to_vec1()?;
        let rows = (0..shape.query_heads()).flat_map(|head| of(&expected, head));
        let worst = rows.zip(&dumped).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = dumped.iter().fold(0f32, |a, b| a.max(b.abs()));
        assert!(worst < 1e-5 * largest, "{name}: {worst} of {largest}");
        Ok(())
    };
    close("expected_mean", ExpectedQueries::mean)?;
    close("expected_covariance", ExpectedQueries::covariance)?;
    assert_eq!(dump.metadata["version"], "2");
    assert!(dump.tensors.contains_key("l1.expected_covariance"));
    Ok(())
}

#[test]
fn output_projection_is_the_models() -> Result<()> {
    let (dump, _) = captured(&options(&[0, 2], 6, DType::F32));
    let tiny = Tiny::new()?;
    for (index, layer) in [(0, 0), (1, 2)] {
        let weight = tiny.weight(&format!("blk.{layer}.attn_output.weight"));
        let dumped = &dump.tensors[&format!("l{index}.o_proj")];
        assert_eq!(dumped.to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
    }
    Ok(())
}

#[test]
fn file_reads_back_and_repeats() -> anyhow::Result<()> {
    for (dtype, element) in [(DType::F32, "F32"), (DType::F16, "F16"), (DType::BF16, "BF16")] {
        let (dump, _) = captured(&options(&[0, 2], 6, dtype));
        let bytes = dump.to_bytes()?;
        assert_eq!(bytes, captured(&options(&[0, 2], 6, dtype)).0.to_bytes()?);

        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        assert_eq!(metadata["format"], "kvbudget-dump");
        assert_eq!(metadata["version"], "1");
        assert_eq!(metadata["source_layers"], "0,2");
        assert_eq!(metadata["tokens"], "20");

        let file = safetensors::SafeTensors::deserialize(&bytes)?;
        assert_eq!(file.len(), 14);
        assert_eq!(format!("{:?}", file.tensor("l1.k")?.dtype()), element);
        for (name, shape) in [
            ("k", vec![2, 20, 8]),
            ("v", vec![2, 20, 8]),
            ("q", vec![4, 6, 8]),
            ("q_next", vec![4, 5, 8]),
            ("k_next", vec![2, 5, 8]),
            ("v_next", vec![2, 5, 8]),
            ("o_proj", vec![24, 32]),
        ] {
            assert_eq!(file.tensor(&format!("l1.{name}"))?.shape(), shape, "{name}");
        }
        let read = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        for (name, tensor) in &dump.tensors {
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let again = read[name].to_dtype(DType::F32)?.flatten_all()?;
            assert_eq!(values, again.to_vec1::<f32>()?, "{name}");
        }
    }
    Ok(())
}

#[test]
fn bad_requests_are_refused() -> Result<()> {
    let model = Tiny::new()?.load()?;
    let good = options(&[0, 2], 6, DType::F32);
    let refused = |ids: usize, options: CaptureOptions, reason: &str| {
        let error = kvbudget_candle::capture(&model, &tiny_ids(ids), &options)
            .expect_err("the request is bad");
        assert!(error.to_string().contains(reason), "{error}");
    };
    refused(24, good.clone(), "too short");
    refused(25, options(&[3], 6, DType::F32), "no layer 3");
    refused(25, options(&[], 6, DType::F32), "no layers");
    refused(25, options(&[2, 0], 6, DType::F32), "ascending");
    refused(25, options(&[0, 0], 6, DType::F32), "ascending");
    refused(25, options(&[0], 0, DType::F32), "window");
    refused(25, options(&[0], 21, DType::F32), "window");
    let none_next = CaptureOptions { next: 0, ..good.clone() };
    refused(25, none_next, "at least one");
    let beyond_context = CaptureOptions { tokens: 60, ..good.clone() };
    refused(65, beyond_context, "context of 64");
    let endless = CaptureOptions { tokens: usize::MAX, ..good.clone() };
    refused(25, endless, "context of 64");
    refused(25, options(&[0], 6, DType::U8), "cannot hold");
    Ok(())
}
