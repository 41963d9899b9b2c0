//! Speed without a GPU: what the kernels of the reference workload ask of one, by the simulator's counters.
//!
//! Counted at fewer tokens than the reference has and scaled, which says so in the table: what grows with the tokens is
//! exact, what does not is counted too often. More tokens are not scaled. `benches/cuda.md` must agree;
//! `SIMCUDA_BLESS=1` writes it.

use std::collections::BTreeMap;
use std::fmt::Write;

use kvbudget::Result;
use kvbudget::backend::Backend;
use kvbudget::backend::cuda::cache::FlatCache;
use kvbudget::backend::ops::{Pool, Pooling, TopK, ValueNorm};
use serde_json::Value;
use simcuda::{
    A100_SXM, Checks, Counters, Device, H100_SXM, Installed, Policy, Resource, Roofline,
};

use crate::device::Gpu;
use crate::reference::{self, DIM, GROUP, HEADS, HIDDEN, Layer, ROW, SCORING, TOKENS, WINDOW};

/// An operation that ran, and its kernels.
struct Measured {
    name: &'static str,
    shape: String,
    /// Times what was counted, to get to the reference.
    scale: u64,
    /// Bytes that must be read and written at least, as counted.
    ideal: u64,
    waits: u64,
    kernels: Vec<(String, u64, Counters)>,
}

impl Measured {
    fn launches(&self) -> u64 {
        self.kernels.iter().map(|(_, launches, _)| launches).sum()
    }
    fn sum(&self) -> Counters {
        let mut sum = Counters::default();
        self.kernels.iter().for_each(|(_, _, counters)| sum.add(counters));
        sum
    }
    fn read(&self) -> u64 {
        32 * self.sum().global_load.sectors
    }
    /// Bytes that the warps of a kernel asked for.
    fn asked(&self, kernel: &str) -> u64 {
        let found = self.kernels.iter().find(|(name, ..)| name == kernel).expect("it was launched");
        found.2.global_load.bytes
    }
    /// Bytes from and to DRAM, each sector once, though a kernel may find in L2 what the last one left.
    fn dram(&self) -> u64 {
        32 * (self.sum().dram_read_sectors + self.sum().dram_write_sectors)
    }
    fn moved(&self) -> u64 {
        self.read() + 32 * self.sum().global_store.sectors
    }
}

/// The kernels that ship, by name: their entry in the manifest.
pub fn manifest() -> BTreeMap<String, Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/ptx/manifest.json");
    let text = std::fs::read_to_string(path).expect("a manifest");
    let manifest: Value = serde_json::from_str(&text).expect("JSON");
    let files = manifest["files"].as_object().expect("files");
    let kernels = files.values().flat_map(|file| file["kernels"].as_object().expect("kernels"));
    kernels.map(|(name, facts)| (name.clone(), facts.clone())).collect()
}

/// Runs an operation and reads the counters.
fn measure(
    gpu: &Gpu,
    (name, shape): (&'static str, String),
    scale: u64,
    ideal: u64,
    run: impl FnOnce() -> Result<()>,
) -> Measured {
    simcuda::clear_counters(gpu.ordinal);
    run().expect(name);
    let waits = simcuda::waits(gpu.ordinal);
    let kernels = manifest().into_keys().filter_map(|kernel| {
        let (launches, counters) = simcuda::counters(gpu.ordinal, &kernel);
        (launches > 0).then_some((kernel, launches, counters))
    });
    Measured { name, shape, scale, ideal, waits, kernels: kernels.collect() }
}

const SCORES: &str = "window attention, LSE given";
const LONG_SCORES: &str = "window attention, LSE given, twice as long";
const SELECTION: &str = "selection";
const POOLED: &str = "pooling and selection";
const GATHER: &str = "gather, keys and values";
const NORMS: &str = "value norms";
/// What compresses a layer.
const PIPELINE: [&str; 3] = [SCORES, POOLED, GATHER];

fn scoring(gpu: &Gpu, layer: &Layer, lse: bool) -> Measured {
    let (name, passes) = match lse {
        true if layer.tokens > TOKENS => (LONG_SCORES, 1),
        true => (SCORES, 1),
        false => ("window attention", 2),
    };
    let mut out = gpu.cuda.zeros(&layer.lens()).expect("room for scores");
    let ideal = u64::from(HEADS * layer.tokens) * (passes * ROW + 4);
    let views = [layer.view(lse)];
    let shape = format!("T = {}", layer.tokens);
    let run = || gpu.cuda.window_attention(&SCORING, &views, &mut out, None);
    measure(gpu, (name, shape), u64::from(TOKENS / layer.tokens).max(1), ideal, run)
}

fn workload(gpu: &Gpu) -> Vec<Measured> {
    let cuda = &gpu.cuda;
    let layer = Layer::new(cuda, TOKENS, 8);
    let (lens, slots) = (layer.lens(), u64::from(HEADS * TOKENS));
    let whole = |name| (name, format!("T = {TOKENS}"));
    let scores = || {
        let rows = (0..HEADS).map(|h| reference::noise(TOKENS as usize, u64::from(h)).collect());
        cuda.upload(rows.collect()).expect("room for scores")
    };
    let mut all = vec![
        scoring(gpu, &layer, true),
        scoring(gpu, &Layer::new(cuda, 2 * TOKENS, 8), true),
        scoring(gpu, &Layer::new(cuda, 4096, 8), false),
    ];

    let past: Vec<u32> = lens.iter().map(|len| len - WINDOW).collect();
    let pool = Pool { kind: Pooling::Avg, kernel: 5, lens: &past };
    let mut rows = scores();
    all.push(measure(gpu, whole("pooling"), 1, slots * 8, || cuda.pool(&pool, &mut rows)));

    let (contests, protected) = ([layer.contest()], layer.protected());
    let op = TopK { contests: &contests, protected: &protected };
    let rows = scores();
    let ideal = slots * 4 + contests[0].budget * 4;
    // Smoothed scores stay, to be looked at.
    let run = || cuda.pool_top_k(&pool, &op, &rows).map(drop);
    all.push(measure(gpu, whole(POOLED), 1, ideal + slots * 4, run));
    let mut selection = None;
    let run = || {
        selection = Some(cuda.top_k(&op, &[(&rows, 0..HEADS as usize)])?);
        Ok(())
    };
    all.push(measure(gpu, whole(SELECTION), 1, ideal, run));
    let selection = selection.expect("the selection ran");

    // A row is read and written, and so are its number and its position.
    let ideal = contests[0].budget * (2 * 2 * ROW + 8);
    let run =
        || FlatCache::gather_selected(cuda, &layer.view(false), &selection, 0, &lens).map(drop);
    all.push(measure(gpu, whole(GATHER), 1, ideal, run));

    let mut out = cuda.zeros(&vec![DIM; (HEADS * GROUP) as usize]).expect("room for an output");
    let run = || cuda.attend(&reference::attention(), &[layer.attend()], &mut out, None);
    let ideal = slots * 2 * ROW;
    all.push(measure(gpu, whole("attend, one token"), 1, ideal, run));

    let (few, hidden) = (8192, 128);
    let layer = Layer::new(cuda, few, hidden);
    let mut out = cuda.zeros(&layer.lens()).expect("room for norms");
    let scale = u64::from(TOKENS / few) * u64::from(HIDDEN / hidden);
    // Of the weights, a read for each block of 256 slots: they come from L2.
    let weights = u64::from(hidden * GROUP) * ROW * u64::from(few / 256);
    let ideal = u64::from(HEADS) * (u64::from(few) * (ROW + 4) + weights);
    let name = (NORMS, format!("T = {few}, hidden = {hidden}"));
    let run = || cuda.value_norm(ValueNorm::L1, &[layer.view(false)], &mut out);
    all.push(measure(gpu, name, scale, ideal, run));
    all
}

/// Blocks of a kernel that one multiprocessor holds: the rules of compute capability 8.0 and 9.0, which differ in the
/// shared memory they have.
fn resident(registers: u64, counters: &Counters, shared_memory: u64) -> u64 {
    let warps = counters.threads / counters.blocks / 32;
    let shared = counters.shared_bytes / counters.blocks + 1024;
    let per_warp = (registers * 32).next_multiple_of(256);
    let by_registers = 65536 / 4 / per_warp * 4 / warps;
    32.min(64 / warps).min(by_registers).min(shared_memory / shared.next_multiple_of(128))
}

/// The lower bound of a launch that does so much more.
fn bound(counters: &Counters, scale: u64, device: &Device) -> String {
    let words: Vec<u64> = counters.to_words().into_iter().map(|word| word * scale).collect();
    let scaled = Counters::from_words(&words).expect("as many words as before");
    // Not what is issued: ptxas folds and drops much of what the simulator counts.
    let hard = |resource| matches!(resource, Resource::Shared | Resource::Mma | Resource::Dram);
    let bounds = Roofline::of(&scaled, device).seconds.into_iter().filter(|b| hard(b.0));
    let (resource, seconds) = bounds.max_by(|a, b| a.1.total_cmp(&b.1)).expect("three");
    format!("{:.1} {resource:?}", seconds * 1e6)
}

fn ratio(actual: u64, ideal: u64) -> String {
    match ideal {
        0 => "-".to_owned(),
        _ => format!("{:.3}", actual as f64 / ideal as f64),
    }
}

fn table(all: &[Measured], manifest: &BTreeMap<String, Value>) -> String {
    let mut text = format!(
        "# The kernels on a GPU, as far as that is known without one\n\n\
         Written by `SIMCUDA_BLESS=1 cargo test --test cuda speed`, from what the simulator counts: no time here was measured. One \
         layer of Llama-3.1-8B, bf16: {HEADS} KV heads, {} query heads, D = {DIM}, W = {WINDOW}, T = {TOKENS}, hidden = {HIDDEN}. Counted at \
         the shape named; the *bounds*, in microseconds, are for that count scaled to the reference, and name the resource that \
         binds: lower bounds, not predictions. `cargo bench --features cuda --bench cuda` measures, where there is a GPU.\n\n\
         ## Operations\n\n\
         Moved: sectors between L2 and the multiprocessors, as if L1 never hit, over the bytes that must be read and written; \
         DRAM: sectors touched, each once in a launch, over the same.\n\n\
         | operation | counted at | launches | waits | MB moved | moved / ideal | DRAM / ideal | scale | H100 bound | A100 bound |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        HEADS * GROUP
    );
    for m in all {
        let sum = m.sum();
        writeln!(
            text,
            "| {} | {} | {} | {} | {:.2} | {} | {} | {} | {} | {} |",
            m.name,
            m.shape,
            m.launches(),
            m.waits,
            m.moved() as f64 / 1e6,
            ratio(m.moved(), m.ideal),
            ratio(m.dram(), m.ideal),
            m.scale,
            bound(&sum, m.scale, &H100_SXM),
            bound(&sum, m.scale, &A100_SXM),
        )
        .expect("to a string");
    }
    text.push_str(
        "\n## Kernels\n\nRegisters and blocks per multiprocessor on sm_80 / sm_90. Sectors: moved, over what the bytes of each request \
         need. Wavefronts: passes through the banks of shared memory, over passes without conflicts.\n\n\
         | kernel | operation | registers | spilled bytes | shared bytes | blocks | mma | sectors read | sectors written | wavefronts |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for m in all {
        for (name, _, c) in &m.kernels {
            let fact =
                |arch: &str, what: &str| manifest[name][arch][what].as_u64().expect("a number");
            let of_each = |what| format!("{} / {}", fact("sm_80", what), fact("sm_90", what));
            let blocks = |arch, shared: u64| resident(fact(arch, "registers"), c, shared << 10);
            writeln!(
                text,
                "| {name} | {} | {} | {} | {} | {} / {} | {} | {} | {} | {} |",
                m.name,
                of_each("registers"),
                of_each("spills"),
                c.shared_bytes / c.blocks,
                blocks("sm_80", 164),
                blocks("sm_90", 228),
                c.mma,
                ratio(c.global_load.sectors, c.global_load.ideal_sectors),
                ratio(c.global_store.sectors, c.global_store.ideal_sectors),
                ratio(
                    c.shared_load.wavefronts + c.shared_store.wavefronts,
                    c.shared_load.ideal_wavefronts + c.shared_store.ideal_wavefronts
                ),
            )
            .expect("to a string");
        }
    }
    text
}

/// What must hold whatever the table says.
fn gates(all: &[Measured], manifest: &BTreeMap<String, Value>) {
    for (name, facts) in manifest {
        for arch in ["sm_80", "sm_90"] {
            assert_eq!(facts[arch]["spills"], 0, "{name} spills on {arch}");
        }
    }
    for m in all {
        assert_eq!(m.waits, 0, "{} waits for the device", m.name);
    }
    let named = |name: &str| all.iter().find(|m| m.name == name).expect("an operation that ran");
    let at_most = |name: &str, bytes: u64, ideal: u64, percent: u64| {
        assert!(
            bytes * 100 <= ideal * percent,
            "{name}: {bytes} bytes, {percent} % of {ideal} allowed"
        );
    };
    let slots = u64::from(HEADS * TOKENS);
    // A block reads 32 KB of queries for 1024 keys of 256 bytes. Twice as many keys are 1.07 and would leave half of the
    // multiprocessors' places empty at this length; at twice the length blocks are that long. DRAM gives queries once.
    at_most(SCORES, named(SCORES).read(), slots * ROW, 115);
    at_most(LONG_SCORES, named(LONG_SCORES).read(), 2 * slots * ROW, 107);
    at_most(SCORES, named(SCORES).dram(), named(SCORES).ideal, 101);
    // Levels 0 and 1 read each key once. What else they read is known, but for tables of 0.03 N at each: the counts of
    // 2048 digits of each segment and of their contest, 0.07 N at each, since 8 blocks of 4096 keys share a segment's.
    let counts = 2 * u64::from(HEADS + 1) * 2048 * 4;
    for (name, level_0) in [(SELECTION, "top_k_level_0"), (POOLED, "top_k_pooled_avg")] {
        let levels = named(name).asked(level_0) + named(name).asked("top_k_level_1");
        at_most(name, levels - counts, slots * 4, 210);
        // In all 2.49: those, 1024 last digits of each segment, marks, twice 1/16, candidates, and tables. In sectors
        // it is 3.12, as if L1 never hit: every warp reads tables, and candidates a few at a time.
        at_most(name, named(name).sum().global_load.bytes, slots * 4, 250);
        at_most(name, named(name).read(), slots * 4, 313);
    }
    at_most(GATHER, named(GATHER).dram(), named(GATHER).ideal, 102);
    at_most(NORMS, named(NORMS).moved(), named(NORMS).ideal, 102);
    let launches: u64 = PIPELINE.iter().map(|name| named(name).launches()).sum();
    // Scores, three digits (pooling with the first) and an emission, a gather.
    assert!(launches <= 6, "{launches} launches compress a layer");
}

#[test]
fn speed_is_as_written() {
    if simcuda::install() == Installed::RealDriver {
        println!("a real device has no such counters: not run");
        return;
    }
    // What the checks find is the other tests' business.
    let checks = Checks { init: false, race: false };
    let gpu = Gpu::under(Policy { checks, ..Policy::default() });
    let (all, manifest) = (workload(&gpu), manifest());
    let text = table(&all, &manifest);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/cuda.md");
    if std::env::var_os("SIMCUDA_BLESS").is_some() {
        std::fs::write(path, &text).expect("the table can be written");
    }
    println!("{text}");
    gates(&all, &manifest);
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == text,
        "benches/cuda.md is not what was counted; SIMCUDA_BLESS=1 rewrites it"
    );
}
