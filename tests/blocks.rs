//! Block-wise prefill through the engine contract: a small engine with real caches reads prompts in blocks of any size, and after
//! every event what it holds is compared with what the contract promises.

use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::cache::FlatCache;
use kvbudget::plan::Promise;
use kvbudget::score::{Needs, Queries};
use kvbudget::{
    BlockPrefill, Books, Budget, CacheManager, Dtype, Error, Fraction, Geometry, INFORMED, Keep,
    LayerId, LayerShape, LayerView, PRESETS, Pairs, Plan, Planner, Policy, PolicyConfig, Position,
    Profile, QueryMoments, Ragged, Result, Rope, Rows, SpanKind, Spans, preset, profile::Point,
    profiled,
};
use proptest::prelude::*;

const DIM: u32 = 4;
const GROUP: u32 = 2;
const HIDDEN: u32 = 6;
const PROBE: u32 = 3;

/// Tokens have the same keys, values and queries whenever they are read.
fn noise(what: u64, layer: usize, head: u32, token: u32) -> impl Iterator<Item = f32> {
    let mut state = [what, layer as u64, u64::from(head), u64::from(token)]
        .iter()
        .fold(0x9e37_79b9_7f4a_7c15u64, |s, x| {
            (s ^ x).wrapping_mul(0xd129_0d3c_5c2b_6cb5).rotate_left(29)
        });
    std::iter::repeat_with(move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    })
    .take(DIM as usize)
}

/// `[heads, tokens, D]`
fn rows(what: u64, layer: usize, heads: u32, tokens: std::ops::Range<u32>) -> Vec<f32> {
    let head = |h| tokens.clone().flat_map(move |t| noise(what, layer, h, t));
    (0..heads).flat_map(head).collect()
}

/// An engine whose model is noise, with caches that really evict.
struct Engine {
    geometry: Geometry,
    caches: Vec<FlatCache>,
    /// Most slots held at once.
    peak: u64,
}

impl Engine {
    fn new(heads: &[u32]) -> Result<Self> {
        let shape = |&h: &u32| LayerShape::new(GROUP * h, h, DIM);
        let shapes = heads.iter().map(shape).collect::<Result<Vec<_>>>()?;
        let empty = |shape: &LayerShape| {
            let none = Rows::heads_first(HostSlice::F32(&[]), shape.kv_heads() as u32, 0, DIM)?;
            let kept = Ragged::filled(vec![0; shape.kv_heads()], Position(0));
            FlatCache::gather(&LayerView::new(*shape, 0, none, none)?, &kept, 0)
        };
        let caches = shapes.iter().map(empty).collect::<Result<_>>()?;
        Ok(Self { geometry: Geometry::new(shapes, Dtype::F32)?, caches, peak: 0 })
    }

    fn slots(&self) -> u64 {
        self.caches.iter().flat_map(FlatCache::lens).map(|&n| u64::from(n)).sum()
    }

    fn held(&self) -> Vec<Ragged<Position>> {
        self.caches.iter().map(|cache| cache.positions().iter().cloned().collect()).collect()
    }

    fn append(&mut self, tokens: u32) -> Result<()> {
        for (l, cache) in self.caches.iter_mut().enumerate() {
            let (heads, new) = (cache.lens().len() as u32, cache.tokens()..cache.tokens() + tokens);
            let (k, v) = (rows(0, l, heads, new.clone()), rows(1, l, heads, new));
            let lend = |data| Rows::heads_first(HostSlice::F32(data), heads, tokens, DIM);
            cache.repack(tokens)?;
            cache.append(&lend(&k)?, &lend(&v)?)?;
        }
        self.peak = self.peak.max(self.slots());
        Ok(())
    }

    /// Reads a block as the contract has it.
    fn read(&mut self, manager: &mut impl CacheManager<Cpu>, tokens: u32) -> Result<Plan> {
        let whole = self.caches.iter().all(|c| c.lens().iter().all(|&n| n == c.tokens()));
        let evicts = manager.begin_block(tokens)?;
        self.append(tokens)?;
        for l in 0..if evicts { self.caches.len() } else { 0 } {
            let keeps = self.lend(l, whole, manager.needs(), |view| {
                manager.layer_done(LayerId(l as u32), view)
            })?;
            for Keep { layer, positions } in keeps {
                self.caches[layer.index()].compact(&positions)?;
            }
        }
        let plan = manager.end_block()?;
        for (cache, kept) in self.caches.iter_mut().zip(&plan.layers) {
            cache.compact(kept)?;
        }
        Ok(plan)
    }

    fn lend<R>(
        &self,
        l: usize,
        whole: bool,
        needs: Needs,
        look: impl FnOnce(&LayerView<'_, HostSlice<'_>>) -> Result<R>,
    ) -> Result<R> {
        let (shape, cache) = (self.geometry.layers()[l], &self.caches[l]);
        let (query_heads, tokens) = (shape.query_heads() as u32, cache.tokens());
        let window = match needs.queries {
            Queries::None => 0,
            Queries::Last(n) => n.min(tokens),
            Queries::All => tokens,
        };
        let q = rows(2, l, query_heads, tokens - window..tokens);
        let probe = rows(3, l, query_heads, tokens..tokens + PROBE);
        let o_proj: Vec<f32> = (0..HIDDEN)
            .flat_map(|row| (0..query_heads).flat_map(move |h| noise(4, l, h, row)))
            .collect();
        let lent = |data, n| Rows::heads_first(HostSlice::F32(data), query_heads, n, DIM);
        let mut view = cache.view(shape)?;
        if whole {
            view = LayerView::new(shape, tokens, *view.k(), *view.v())?;
        }
        if needs.queries != Queries::None {
            view = view.with_queries(lent(&q, window)?)?;
        }
        if needs.probe {
            view = view.with_probe(lent(&probe, PROBE)?)?;
        }
        if needs.o_proj {
            let o_proj = Rows::heads_first(HostSlice::F32(&o_proj), 1, HIDDEN, query_heads * DIM)?;
            view = view.with_output_projection(o_proj)?;
        }
        let norms: Vec<f32> =
            (0..tokens).flat_map(|t| noise(5, l, 0, t).take(1)).map(|x| 20.0 + x).collect();
        if needs.hidden_norms {
            view =
                view.with_hidden_norms(Rows::heads_first(HostSlice::F32(&norms), 1, tokens, 1)?)?;
        }
        let mut moments = QueryMoments::new(shape);
        let all = rows(2, l, query_heads, 0..tokens);
        let rope = Rope::with_base(10_000.0, DIM, Pairs::Neighbours)?;
        moments.push_rotated(&lent(&all, tokens)?, &rope, 0)?;
        let expected = moments.expected(&rope, tokens..tokens + QueryMoments::FUTURE)?;
        if needs.expected_queries {
            view = view.with_expected(&expected)?;
        }
        look(&view)
    }
}

fn profiled_config() -> PolicyConfig {
    let shares = vec![vec![0.7, 0.3], vec![0.1, 0.2], vec![0.5, 0.4]];
    let point = Point { keep: Fraction::new(1, 3).unwrap(), shares };
    profiled(Profile::new("noise", vec![point]).unwrap())
}

/// All that work in blocks, with windows as small as the prompts are.
fn policies() -> Vec<Policy<Cpu>> {
    let named = PRESETS.iter().chain(INFORMED).map(|name| {
        let mut config = preset(name).unwrap();
        config.set("window", "4").ok();
        // Larger units meet a budget to less than a unit.
        config.set("unit", "1").unwrap();
        config
    });
    named.chain([profiled_config()]).map(|config| config.build().unwrap()).collect()
}

#[derive(Debug, Clone)]
struct Case {
    policy: usize,
    budget: u64,
    blocks: Vec<u32>,
    system: u32,
}

fn cases() -> impl Strategy<Value = Case> {
    let blocks = prop::collection::vec(1u32..20, 1..8);
    let policies = PRESETS.len() + INFORMED.len() + 1;
    (0..policies, 1u64..24, blocks, 1u32..6).prop_map(|(policy, budget, blocks, system)| Case {
        policy,
        budget,
        blocks,
        system,
    })
}

/// Reads all blocks; the plans.
fn run(case: &Case, policy: &Policy<Cpu>) -> Result<Vec<Plan>> {
    let (cpu, mut engine) = (Cpu::new(), Engine::new(&[2; 3])?);
    let geometry = engine.geometry.clone();
    let budget = Budget::TokensPerHead(case.budget);
    let mut manager = BlockPrefill::new(&cpu, policy, &geometry, budget, Books::default())?;
    manager.spans(format!("system:0..{}", case.system).parse()?)?;
    let largest = u64::from(*case.blocks.iter().max().unwrap());
    let mut plans = Vec::new();
    for &block in &case.blocks {
        let mut before = engine.held();
        let seen = engine.caches[0].tokens();
        let plan = engine.read(&mut manager, block)?;
        let tokens = seen + block;
        for layer in &mut before {
            let new = |row: &[Position]| {
                row.iter().copied().chain((seen..tokens).map(Position)).collect()
            };
            *layer = layer.iter().map(new).collect();
        }
        // The independent checker: exact budgets, ascending positions out of those held, a slot for every head.
        plan.check(
            &geometry,
            &Promise { budget: Some(budget), held: Some(&before), ..Promise::default() },
        )?;
        let full: u64 = before.iter().map(|l| l.total() as u64).sum();
        assert_eq!(plan.slots, full.min(budget.resolve(&geometry, tokens.into())));
        assert_eq!((plan.tokens, &plan.layers), (tokens, &engine.held()));
        assert_eq!(manager.books().slots(&geometry), engine.slots());
        plans.push(plan);
    }
    assert_eq!(manager.peak_slots(), engine.peak);
    assert!(engine.peak <= (case.budget + largest) * geometry.heads() as u64);
    Ok(plans)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_policy_stays_within_the_budget_and_a_block(case in cases()) {
        let policies = policies();
        let policy = &policies[case.policy];
        let plans = run(&case, policy)?;
        // What is protected survives all blocks where there is room for it.
        let protects = policy.config().protect.spans.contains(&SpanKind::System);
        if protects && case.budget > u64::from(2 * case.system) * 4 {
            for head in plans.last().unwrap().layers.iter().flat_map(Ragged::iter) {
                let system = case.system.min(case.blocks.iter().sum());
                prop_assert!((0..system).all(|p| head.contains(&Position(p))));
            }
        }
        // Whatever the number of threads.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let again = pool.install(|| run(&case, policy))?;
        prop_assert_eq!(plans, again);
    }
}

#[test]
fn a_block_of_everything_is_one_plan() {
    let (cpu, policy) = (Cpu::new(), preset("knorm").unwrap().build::<Cpu>().unwrap());
    let mut engine = Engine::new(&[2, 2]).unwrap();
    let geometry = engine.geometry.clone();
    let budget = Budget::TokensPerHead(5);
    let mut manager =
        BlockPrefill::new(&cpu, &policy, &geometry, budget, Books::default()).unwrap();
    let plan = engine.read(&mut manager, 30).unwrap();

    let mut whole = Engine::new(&[2, 2]).unwrap();
    whole.append(30).unwrap();
    let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[30u32]).unwrap();
    for l in 0..2 {
        whole.lend(l, true, policy.needs(), |view| planner.push(&[*view])).unwrap();
    }
    assert_eq!(plan.layers, planner.finish().unwrap().remove(0).layers);
}

#[test]
fn rows_are_rolled_back_and_caches_switched() {
    let (cpu, policy) = (Cpu::new(), preset("snapkv").unwrap().build::<Cpu>().unwrap());
    let mut engine = Engine::new(&[2, 2]).unwrap();
    let geometry = engine.geometry.clone();
    let budget = Budget::TokensPerHead(40);
    let mut manager =
        BlockPrefill::new(&cpu, &policy, &geometry, budget, Books::default()).unwrap();
    engine.read(&mut manager, 60).unwrap();
    let before = manager.books().clone();
    manager.append(7).unwrap();
    assert_eq!(manager.books().slots(&geometry), 4 * 47);
    manager.roll_back(63).unwrap();
    assert_eq!(manager.books().slots(&geometry), 4 * 43);
    manager.roll_back(60).unwrap();
    assert_eq!(manager.books(), &before);
    for (tokens, expected) in [(59, "does not come back"), (61, "too large")] {
        let error = manager.roll_back(tokens).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    let other = Books { tokens: 12, ..Books::default() };
    assert_eq!(manager.switch(other.clone()).unwrap(), before);
    assert_eq!(manager.switch(before.clone()).unwrap(), other);
    let short = Books { tokens: 1, held: Some(vec![vec![vec![]; 2]]), spans: Spans::default() };
    assert!(matches!(manager.switch(short), Err(Error::Shape { expected: 2, got: 1, .. })));
    assert_eq!(manager.books(), &before);
}

/// A diffusion model computes everything again: nothing of the books before plays a part, and what was decoded since is known.
#[test]
fn a_refresh_is_a_switch_to_nothing_and_one_block() {
    let (cpu, policy) = (Cpu::new(), preset("maskkv").unwrap().build::<Cpu>().unwrap());
    let geometry = Engine::new(&[2, 2]).unwrap().geometry;
    let spans = |text: &str| Books { spans: text.parse().unwrap(), ..Books::default() };
    let first = spans("prompt:0..50,mask:50..60");
    let later = spans("prompt:0..50,mask:50..52,decoded:52..53,mask:53..60");
    let manager = |books: &Books| {
        let budget = Budget::TokensPerHead(20);
        BlockPrefill::new(&cpu, &policy, &geometry, budget, books.clone()).unwrap()
    };
    let read = |manager: &mut BlockPrefill<'_, Cpu>| {
        Engine::new(&[2, 2]).unwrap().read(manager, 60).unwrap()
    };
    let mut refreshed = manager(&first);
    read(&mut refreshed);
    let before = refreshed.books().clone();
    assert_eq!(refreshed.switch(later.clone()).unwrap(), before);
    assert_eq!(read(&mut refreshed), read(&mut manager(&later)));
    assert_eq!((refreshed.books().tokens, &refreshed.books().spans), (60, &later.spans));
}

#[test]
fn events_out_of_order_are_refused() {
    let (cpu, policy) = (Cpu::new(), preset("knorm").unwrap().build::<Cpu>().unwrap());
    let mut engine = Engine::new(&[2, 2]).unwrap();
    let geometry = engine.geometry.clone();
    let budget = Budget::TokensPerHead(4);
    let mut manager =
        BlockPrefill::new(&cpu, &policy, &geometry, budget, Books::default()).unwrap();
    assert!(matches!(manager.end_block(), Err(Error::Unsupported { .. })));
    assert!(manager.begin_block(9).unwrap());
    assert!(matches!(manager.begin_block(9), Err(Error::Unsupported { .. })));
    engine.append(9).unwrap();
    let mut lend = |l: usize, as_layer: u32| {
        engine.lend(l, true, policy.needs(), |view| manager.layer_done(LayerId(as_layer), view))
    };
    assert!(matches!(lend(1, 1), Err(Error::LayerOrder { expected: 0, got: 1, .. })));
    lend(0, 0).unwrap();
    assert!(matches!(manager.end_block(), Err(Error::LayerOrder { .. })));
}

/// `docs/engines.md` names every preset and what it asks for.
#[test]
fn the_table_of_needs_is_true() {
    let (_, table) = include_str!("../docs/engines.md").split_once("## Who asks").unwrap();
    let row = |name: &str| {
        let row = table.lines().find(|line| line.starts_with(&format!("| `{name}`")));
        row.unwrap_or_else(|| panic!("no row for {name}"))
    };
    let names = PRESETS.iter().chain(INFORMED).chain(&["reconstruct"]);
    let mut configs: Vec<_> = names.map(|name| preset(name).unwrap()).collect();
    configs.push(profiled_config());
    for config in &configs {
        let policy = config.build::<Cpu>().unwrap();
        let needs = policy.needs();
        let Needs { queries, probe, o_proj, hidden_norms, expected_queries, .. } = needs;
        let queries = match queries {
            Queries::None => String::new(),
            Queries::Last(n) => format!("last {n}"),
            Queries::All => "all".to_owned(),
        };
        let mark = |needed: bool| if needed { "yes" } else { "" };
        let cells = [
            &queries,
            mark(probe),
            mark(o_proj),
            mark(hidden_norms),
            mark(expected_queries),
            mark(needs.spans),
            mark(needs.second_pass),
        ];
        let name = &config.name;
        let got: Vec<&str> = row(name).split('|').skip(2).take(7).map(str::trim).collect();
        assert_eq!(got, cells, "{name}");
    }
    let rows = table.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, configs.len());
}
