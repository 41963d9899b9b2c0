//! A long conversation on a fraction of its cache: EpiCache's episodes against plain eviction in blocks, at the same device memory.
//!
//! Facts are asked for one after the other; a question and its answer are rolled back, so every question meets the same cache. An
//! answer counts as right if its word is the likeliest of sixteen (chance: 1/16).

mod conversation;

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;
use clap::Parser;
use indicatif::HumanBytes;
use kvbudget::{Budget, LayerProfile, PolicyConfig, Spans, preset};
use kvbudget_candle::episodes::{
    Embedder, EpisodeStore, Episodes, KMeans, Match, TokenMean, patched_prompt, read_episodes,
    segments,
};
use kvbudget_candle::{BudgetCache, Llama, Span, tokenizer};
use tokenizers::Tokenizer;

use conversation::{Conversation, Fact, WORDS, conversation};

const SYSTEM: &str = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
const INSTRUCTION: &str = "\n\nList the speakers, dated events, personal details and names of this conversation.<|im_end|>\n\
                           <|im_start|>assistant\n";

/// Answer questions on a long conversation from a cache per episode.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// GGUF file of a llama model with SmolLM2's chat template
    #[arg(long, env = "KVBUDGET_SMOLLM2")]
    model: PathBuf,
    /// Slots per head that stay on the device
    #[arg(long, default_value_t = 256)]
    budget: u64,
    /// Tokens read at once
    #[arg(long, default_value_t = 256)]
    block: usize,
    /// Utterances of the conversation
    #[arg(long, default_value_t = 48)]
    utterances: usize,
    /// Episodes
    #[arg(long, default_value_t = 4)]
    episodes: usize,
    /// Facts asked for in each of four topics
    #[arg(long, default_value_t = 3)]
    facts: usize,
    /// Utterances per segment
    #[arg(long, default_value_t = 4)]
    segment: usize,
    /// Segments in a probe
    #[arg(long, default_value_t = 2)]
    medoids: usize,
    /// Compare questions with centroids as the published code does, by a plain product
    #[arg(long)]
    dot: bool,
    /// Layer profile (`sensitivity`): budgets of layers of the epicache rows
    #[arg(long)]
    layer_profile: Option<PathBuf>,
    /// Seeds of conversations, such as 0..8
    #[arg(long, default_value = "0..1", value_parser = parse_range)]
    seeds: Range<u64>,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let bad = || format!("expected a range of seeds such as 0..8, got {text:?}");
    let (start, end) = text.split_once("..").ok_or_else(bad)?;
    Ok(start.parse().map_err(|_| bad())?..end.parse().map_err(|_| bad())?)
}

/// Sums of one row of the table.
#[derive(Default)]
struct Row {
    name: String,
    right: Vec<bool>,
    ranks: usize,
    loss: f64,
    matched: usize,
    device: u64,
    host: u64,
    seconds: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut file = File::open(&args.model).with_context(|| args.model.display().to_string())?;
    let content = Content::read(&mut file)?;
    let (model, tokenizer) = (Llama::load(&content, &mut file)?, tokenizer::from_gguf(&content)?);
    let profile: Option<LayerProfile> = match &args.layer_profile {
        Some(path) => Some(serde_json::from_reader(File::open(path)?)?),
        None => None,
    };
    let mut epicache = preset("epicache")?;
    if let Some(profile) = &profile {
        profile.apply(&mut epicache)?;
    }
    let mut snapkv = preset("snapkv")?;
    snapkv.set("protect_spans", "system")?;
    let budget = Budget::TokensPerHead(args.budget);
    let one = "epicache, 1 episode".to_owned();
    let many = format!("epicache, {} episodes", args.episodes);
    let rows = [
        ("full cache".to_owned(), snapkv.clone(), Budget::keep(1, 1)?, 1),
        ("snapkv in blocks".to_owned(), snapkv, budget, 1),
        (one, epicache.clone(), budget, 1),
        (many, epicache, budget, args.episodes),
    ];
    let bench = Bench { args, model, tokenizer };
    let mut table: Vec<Row> =
        rows.iter().map(|(name, ..)| Row { name: name.clone(), ..Row::default() }).collect();
    for seed in bench.args.seeds.clone() {
        let talk = conversation(seed, bench.args.utterances, 4, bench.args.facts);
        for ((name, policy, budget, episodes), row) in rows.iter().zip(&mut table) {
            eprintln!("seed {seed}: {name}");
            bench.measure(&talk, policy, *budget, *episodes, row)?;
        }
    }
    let seeds = bench.args.seeds.end.saturating_sub(bench.args.seeds.start).max(1);
    println!(
        "| | right | paired: won, lost | mean rank | nats | device | host | topic found | s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for row in &table {
        let n = row.right.len().max(1);
        let pairs = || row.right.iter().zip(&table[1].right);
        let (won, lost) =
            (pairs().filter(|(a, b)| **a && !**b), pairs().filter(|(a, b)| !**a && **b));
        println!(
            "| {} | {} of {n} | {}, {} | {:.1} | {:.2} | {} | {} | {} | {:.0} |",
            row.name,
            row.right.iter().filter(|&&r| r).count(),
            won.count(),
            lost.count(),
            row.ranks as f64 / n as f64,
            row.loss / n as f64,
            HumanBytes(row.device),
            HumanBytes(row.host),
            row.matched,
            row.seconds / seeds as f64,
        );
    }
    Ok(())
}

struct Bench {
    args: Args,
    model: Llama,
    tokenizer: Tokenizer,
}

impl Bench {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        tokenizer::encode(&self.tokenizer, text)
    }

    /// Reads a conversation and asks for all facts.
    fn measure(
        &self,
        talk: &Conversation,
        policy: &PolicyConfig,
        budget: Budget,
        episodes: usize,
        row: &mut Row,
    ) -> Result<()> {
        let Self { args, model, tokenizer } = self;
        let started = Instant::now();
        let embedder = TokenMean::new(model, tokenizer);
        let segments = segments(&talk.utterances, args.segment, None);
        let embedder = embedder.centred(&segments)?;
        let embeddings = segments.iter().map(|s| embedder.embed(s)).collect::<Result<_>>()?;
        let kmeans = KMeans { clusters: episodes, ..KMeans::default() };
        let episodes = Episodes::fit(embeddings, &kmeans)?;
        let probe = |e| -> Result<Vec<u32>> {
            let medoids = episodes.medoids(e, args.medoids)?;
            self.encode(&format!("{INSTRUCTION}{}", patched_prompt(&segments, &medoids)))
        };
        let probes = (0..episodes.len()).map(probe).collect::<Result<Vec<_>>>()?;

        let system = self.encode(SYSTEM)?;
        let text: String = talk.utterances.iter().map(|u| u.line()).collect();
        let context = self.encode(&format!("<|im_start|>user\n{text}"))?;
        let spans: Spans = format!("system:0..{}", system.len()).parse()?;
        let ids = [system, context].concat();
        let (geometry, o_proj) = (model.geometry()?, model.output_projections());
        let mut cache = BudgetCache::new(geometry, o_proj, policy.clone(), budget)?;
        cache.add_sequence()?;
        let mut forward =
            |ids: &[u32], spans: &[Span], hook: &mut dyn kvbudget_candle::AttentionHook| {
                model.forward(ids, spans, hook).map(drop)
            };
        let mut store = read_episodes(&mut cache, &ids, &spans, &probes, args.block, &mut forward)?;
        for fact in &talk.facts {
            let query = embedder.embed_query(&fact.question)?;
            let by = if args.dot { Match::Dot } else { Match::Cosine };
            let episode = episodes.match_query(&query, by)?;
            row.matched +=
                usize::from(self.is_of_topic(talk, episodes.assignment(), episode, fact));
            self.ask(fact, episode, &mut store, &mut cache, row)?;
        }
        row.device = row.device.max(cache.sequences()[0].bytes_used());
        row.host = row.host.max(store.bytes());
        row.seconds += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Whether an episode has as great a part of the fact's topic as any other.
    fn is_of_topic(
        &self,
        talk: &Conversation,
        assignment: &[usize],
        episode: usize,
        fact: &Fact,
    ) -> bool {
        let about = |e: usize| {
            let of = |&(u, &t): &(usize, &usize)| {
                t == fact.topic && assignment[u / self.args.segment] == e
            };
            talk.topics.iter().enumerate().filter(of).count()
        };
        assignment.iter().all(|&other| about(episode) >= about(other))
    }

    /// Asks for a fact on the cache of an episode, and takes question and answer back.
    fn ask(
        &self,
        fact: &Fact,
        episode: usize,
        store: &mut EpisodeStore,
        cache: &mut BudgetCache,
        row: &mut Row,
    ) -> Result<()> {
        store.activate(episode, cache, 0)?;
        let text = format!("\n{}<|im_end|>\n<|im_start|>assistant\n{}", fact.question, fact.prefix);
        let (question, answer) = (self.encode(&text)?, self.word(fact.word)?);
        let ids = [question.as_slice(), &answer].concat();
        let (before, mark) = (cache.sequences()[0].slots(), cache.sequences()[0].mark());
        let spans = cache.spans(&[ids.len() as u32]);
        let hidden = self.model.forward(&ids, &spans, cache)?;
        cache.sequence_mut(0)?.roll_back(&mark)?;
        ensure!(cache.sequences()[0].slots() == before, "an answer has left a trace");

        // The last token of the question and the answer's own predict the answer.
        let hidden = hidden.narrow(0, question.len() - 1, answer.len())?;
        let logs: Tensor = log_softmax(&self.model.logits(&hidden)?, D::Minus1)?;
        let logs = logs.to_vec2::<f32>()?;
        row.loss -=
            answer.iter().zip(&logs).map(|(&id, row)| f64::from(row[id as usize])).sum::<f64>();
        let first = |w: usize| -> Result<f32> { Ok(logs[0][self.word(w)?[0] as usize]) };
        let right = first(fact.word)?;
        let better = (0..WORDS.len()).map(first).collect::<Result<Vec<_>>>()?;
        let rank = 1 + better.iter().filter(|&&other| other > right).count();
        row.ranks += rank;
        row.right.push(rank == 1);
        Ok(())
    }

    /// The tokens of a word behind others.
    fn word(&self, word: usize) -> Result<Vec<u32>> {
        let ids = self.encode(&format!(" {}", WORDS[word]))?;
        if ids.is_empty() {
            bail!("the word {:?} has no tokens", WORDS[word]);
        }
        Ok(ids)
    }
}
