//! Block-wise reading, episodes, switching and rolling back on a tiny random model: the whole flow, without a word of sense.

#[path = "../examples/episodes/conversation.rs"]
mod conversation;
#[path = "common/tiny_model.rs"]
mod tiny_model;

use anyhow::Result;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::Value;
use conversation::{WORDS, conversation};
use kvbudget::backend::cpu::Cpu;
use kvbudget::{Budget, Planner, Policy, PolicyConfig, Sequence, Spans, preset};
use kvbudget_candle::blocks::read_blocks;
use kvbudget_candle::episodes::{Episodes, KMeans, Match, patched_prompt, read_episodes, segments};
use kvbudget_candle::sensitivity::{BlockMask, Over, measure};
use kvbudget_candle::{AttentionHook, BudgetCache, DenseAttention, Llama, Span};
use tiny_model::{HEAD_DIM, KV_HEADS, LAYERS, Tiny, VOCABULARY, tiny_ids};

const HEADS: u64 = (LAYERS * KV_HEADS) as u64;

fn model() -> Result<Llama> {
    let mut tiny = Tiny::new()?;
    for (key, value) in &mut tiny.metadata {
        if key == "llama.context_length" {
            *value = Value::U32(4096);
        }
    }
    Ok(tiny.load()?)
}

fn cache(model: &Llama, policy: PolicyConfig, budget: Budget) -> Result<BudgetCache> {
    let mut cache =
        BudgetCache::new(model.geometry()?, model.output_projections(), policy, budget)?;
    cache.add_sequence()?;
    Ok(cache)
}

fn encode(text: &str) -> Vec<u32> {
    text.bytes().step_by(3).map(|b| u32::from(b) % VOCABULARY as u32).collect()
}

/// Frequencies of letters, as good an embedding as any here.
fn embed(text: &str) -> Vec<f32> {
    let mut counts = vec![0f32; 26];
    for letter in text.bytes().map(|b| b.to_ascii_lowercase()).filter(u8::is_ascii_lowercase) {
        counts[usize::from(letter - b'a')] += 1.0;
    }
    let norm = counts.iter().map(|x| x * x).sum::<f32>().sqrt();
    counts.into_iter().map(|x| x / norm).collect()
}

#[test]
fn blocks_meet_the_budget_and_the_probe_leaves_no_trace() -> Result<()> {
    let model = model()?;
    let (ids, probe) = (tiny_ids(100), tiny_ids(7));
    for name in ["snapkv", "epicache", "reach", "criticalkv"] {
        let mut policy = preset(name)?;
        policy.set("window", "4").ok();
        let mut cache = cache(&model, policy, Budget::TokensPerHead(12))?;
        cache.sequence_mut(0)?.set_spans("system:0..3".parse()?);
        let mut peak = 0;
        let mut forward = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
            model.forward(ids, spans, hook).map(drop)
        };
        for (i, block) in ids.chunks(16).enumerate() {
            read_blocks(&mut cache, 0, block, 16, &probe, &mut forward)?;
            let sequence = &cache.sequences()[0];
            let seen = (16 * (i + 1)).min(100) as u64;
            assert_eq!(u64::from(sequence.tokens()), seen, "{name}");
            assert_eq!(sequence.slots(), HEADS * seen.min(12), "{name}");
            let slot = 2 * HEAD_DIM as u64 * 4;
            peak = peak.max(cache.peak_bytes() / slot);
        }
        // The budget and a block; a layer may stand beside its copy for a moment, with a block's room or the probe's.
        let layer = KV_HEADS as u64 * (12 + 64 + 16);
        assert!(peak <= HEADS * (12 + 64) + layer, "{name}: {peak}");
        if name == "epicache" {
            for layer in cache.sequences()[0].layers() {
                for head in layer.positions() {
                    assert!((0..3).all(|p| head.contains(&kvbudget::Position(p))), "{name}");
                }
            }
        }
    }
    let mut cache = cache(&model, preset("epicache")?, Budget::TokensPerHead(12))?;
    let refused = read_blocks(&mut cache, 0, &ids, 16, &[], &mut |_, _, _| Ok(()));
    assert!(refused.unwrap_err().to_string().contains("probe"));
    Ok(())
}

/// The probe pass keeps what a planner keeps that is shown dense keys and the probe's queries.
#[test]
fn a_probe_scores_as_dense_attention_would() -> Result<()> {
    let model = model()?;
    let (ids, probe) = (tiny_ids(40), tiny_ids(6));
    let (policy, budget) = (preset("epicache")?, Budget::TokensPerHead(10));
    let mut cache = cache(&model, policy.clone(), budget)?;
    let mut forward = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
        model.forward(ids, spans, hook).map(drop)
    };
    read_blocks(&mut cache, 0, &ids, 40, &probe, &mut forward)?;

    let mut dense = Recorded { inner: DenseAttention::new(LAYERS), layers: Vec::new() };
    model.forward(&ids, &[Span::new(0, 40)], &mut dense)?;
    let keys: Vec<_> = std::mem::take(&mut dense.layers);
    model.forward(&probe, &[Span::new(40, 6)], &mut dense)?;
    let (geometry, policy): (_, Policy<Cpu>) = (model.geometry()?, policy.build()?);
    let cpu = Cpu::new();
    let none = Spans::default();
    let sequence = Sequence { spans: Some(&none), ..40u32.into() };
    let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[sequence])?;
    for ((l, [_, k, v]), [q, ..]) in keys.iter().enumerate().zip(&dense.layers) {
        let (k, v, q) = (lent(k)?, lent(v)?, lent(q)?);
        let view =
            kvbudget::LayerView::new(geometry.layers()[l], 40, k.all_tokens()?, v.all_tokens()?)?;
        planner.push(&[view.with_probe(q.all_tokens()?)?])?;
    }
    let plan = planner.finish()?.remove(0);
    for (layer, kept) in cache.sequences()[0].layers().iter().zip(&plan.layers) {
        let held: Vec<_> = layer.positions().iter().map(Vec::as_slice).collect();
        assert_eq!(held, kept.iter().collect::<Vec<_>>());
    }
    Ok(())
}

fn lent(tensor: &Tensor) -> Result<kvbudget_candle::host::Lent<'_>> {
    Ok(kvbudget_candle::host::Lent::new(tensor)?)
}

/// `q`, `k` and `v` of each layer.
struct Recorded {
    inner: DenseAttention,
    layers: Vec<[Tensor; 3]>,
}

impl AttentionHook for Recorded {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spans: &[Span],
    ) -> candle_core::Result<Tensor> {
        self.layers.push([q.contiguous()?, k.contiguous()?, v.contiguous()?]);
        self.inner.attend(layer, q, k, v, spans)
    }
}

#[test]
fn a_conversation_in_episodes() -> Result<()> {
    let model = model()?;
    let talk = conversation(3, 48, 4, 2);
    assert_eq!(talk.facts.len(), 8);
    for fact in &talk.facts {
        let sentence = format!("{} {}.", fact.prefix, WORDS[fact.word]);
        let said =
            talk.utterances.iter().zip(&talk.topics).filter(|(u, _)| u.text.contains(&sentence));
        let topics: Vec<usize> = said.map(|(_, &topic)| topic).collect();
        assert_eq!(topics, [fact.topic], "{sentence}");
    }
    let segments = segments(&talk.utterances, 4, None);
    let embeddings = segments.iter().map(|s| embed(s)).collect();
    let episodes = Episodes::fit(embeddings, &KMeans { clusters: 3, ..KMeans::default() })?;
    let probe = |e| Ok(encode(&patched_prompt(&segments, &episodes.medoids(e, 2)?)));
    let probes: Vec<Vec<u32>> = (0..episodes.len()).map(probe).collect::<Result<_>>()?;
    let text: String = talk.utterances.iter().map(|u| u.line()).collect();
    let ids = encode(&text);

    let mut cache = cache(&model, preset("epicache")?, Budget::TokensPerHead(40))?;
    let mut forward = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
        model.forward(ids, spans, hook).map(drop)
    };
    let spans: Spans = "system:0..5".parse()?;
    let mut store = read_episodes(&mut cache, &ids, &spans, &probes, 128, &mut forward)?;
    let one = HEADS * 40 * 2 * HEAD_DIM as u64 * 4;
    assert_eq!((store.len(), store.bytes()), (3, 3 * one));
    let mut first_answers = Vec::new();
    for turn in 0..2 {
        for (i, fact) in talk.facts.iter().enumerate() {
            let episode = episodes.match_query(&embed(&fact.question), Match::Cosine)?;
            store.activate(episode, &mut cache, 0)?;
            assert!(store.is_resident(episode) && !store.activate(episode, &mut cache, 0)?);
            // One on the device, whatever the number of episodes.
            assert_eq!(cache.sequences()[0].bytes_used() + store.bytes(), 3 * one);
            let (mark, held) = (cache.sequences()[0].mark(), cache.sequences()[0].books());
            let ids = encode(&fact.question);
            let answer = model.forward(&ids, &cache.spans(&[ids.len() as u32]), &mut cache)?;
            cache.sequence_mut(0)?.roll_back(&mark)?;
            assert_eq!(cache.sequences()[0].books(), held);
            // The same question meets the same cache, after any number of others.
            let answer = answer.flatten_all()?.to_vec1::<f32>()?;
            match turn {
                0 => first_answers.push(answer),
                _ => assert_eq!(answer, first_answers[i]),
            }
        }
    }
    assert!(store.activate(3, &mut cache, 0).is_err());

    // What fits is read once, and shared.
    let mut reads = 0;
    let mut counting = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
        reads += ids.len();
        model.forward(ids, spans, hook).map(drop)
    };
    let mut store = read_episodes(&mut cache, &ids[..40], &spans, &probes, 16, &mut counting)?;
    assert_eq!((store.len(), store.bytes(), reads), (3, one, 40));
    assert!(store.activate(0, &mut cache, 0)? && !store.activate(2, &mut cache, 0)?);
    Ok(())
}

#[test]
fn marks_do_not_survive_an_eviction() -> Result<()> {
    let model = model()?;
    let mut cache = cache(&model, preset("knorm")?, Budget::TokensPerHead(8))?;
    model.forward(&tiny_ids(20), &[Span::new(0, 20)], &mut cache)?;
    let mark = cache.sequences()[0].mark();
    cache.compress()?;
    let refused = cache.sequence_mut(0)?.roll_back(&mark).unwrap_err().to_string();
    assert!(refused.contains("evicted"), "{refused}");
    Ok(())
}

#[test]
fn sensitivity_is_what_blocks_hide() -> Result<()> {
    let model = model()?;
    let (geometry, ids) = (model.geometry()?, tiny_ids(64));
    let mut forward = |ids: &[u32], spans: &[Span], hook: &mut dyn AttentionHook| {
        model.forward(ids, spans, hook).map(drop)
    };
    let mut similarity = |sinks, overlap, over| -> Result<Vec<f64>> {
        let mask = BlockMask { block: 32, sinks, overlap };
        let profile = measure("tiny", &geometry, &ids, mask, over, &mut forward)?;
        Ok(profile.similarity.unwrap())
    };
    // The second block sees all of the first: both passes are the same.
    for same in similarity(0, 32, Over::Tokens)? {
        assert!((same - 1.0).abs() < 1e-5, "{same}");
    }
    let some = similarity(4, 8, Over::Tokens)?;
    let none = similarity(0, 0, Over::Tokens)?;
    assert!((some[0] - 1.0).abs() < 1e-6 && (none[0] - 1.0).abs() < 1e-6);
    assert!((1..LAYERS).all(|l| none[l] < some[l] && some[l] < 0.9999), "{none:?} {some:?}");
    assert_ne!(similarity(4, 8, Over::Windows(10))?, some);
    let mask = BlockMask { block: 64, sinks: 0, overlap: 0 };
    let refused = measure("tiny", &geometry, &ids, mask, Over::Tokens, &mut forward);
    assert!(refused.unwrap_err().to_string().contains("longer than a block"));
    Ok(())
}
