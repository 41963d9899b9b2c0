//! Properties that every plan has, whatever the policy: the contracts of the crate.
//!
//! Scores come from a scorer of the test's own, so that ties, NaN, infinities and empty stretches are common
//! rather than lucky. The presets run on random tensors in `tests/presets.rs`.

use kvbudget::allocate::{
    AdaForm, Boundary, Claim, Heads, Layers, Preference, Sensitivity, apportion, highest_averages,
};
use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::plan::{CheckError, Promise};
use kvbudget::score::{Needs, Scored, Scorer, ScorerConfig, Streaming};
use kvbudget::select::{Align, Protect};
use kvbudget::{
    Budget, Dtype, Error, Fraction, Geometry, LayerId, LayerShape, LayerView, Plan, Planner,
    Policy, PolicyConfig, Position, Profile, Ragged, Result, Rows, Sequence, Trigger, profile,
};
use proptest::prelude::*;
use std::sync::Arc;

const DIM: u32 = 2;

/// Scores decided by the test, `[layer][head][slot]`, and the spread of each layer's heads.
struct Fixed(Vec<Vec<Vec<f32>>>, Vec<[f32; 2]>);

impl Scorer<Cpu> for Fixed {
    fn needs(&self) -> Needs {
        Needs::default()
    }
    fn score(
        &self,
        cpu: &Cpu,
        layer: LayerId,
        layers: &[HostLayer<'_>],
    ) -> Result<Scored<Ragged<f32>>> {
        let rows = &self.0[layer.index()];
        let scores = cpu.upload(layers.iter().flat_map(|_| rows.clone()).collect())?;
        let spread = vec![self.1[layer.index()].to_vec(); scores.rows()];
        Ok(Scored { spread: Some(cpu.upload(spread.into_iter().collect())?), ..scores.into() })
    }
}

#[derive(Debug, Clone)]
struct Case {
    tokens: u32,
    heads: Vec<u32>,
    scores: Vec<Vec<Vec<f32>>>,
    spread: Vec<[f32; 2]>,
    config: PolicyConfig,
    budget: Budget,
}

impl Case {
    fn geometry(&self) -> Geometry {
        let shape = |&h: &u32| LayerShape::new(2 * h, h, DIM).unwrap();
        Geometry::new(self.heads.iter().map(shape).collect(), Dtype::F32).unwrap()
    }

    fn policy(&self) -> Policy<Cpu> {
        let scorer = Fixed(self.scores.clone(), self.spread.clone());
        Policy::with_scorer(self.config.clone(), Box::new(scorer)).unwrap()
    }

    fn plan(&self, cascade: bool) -> Result<Plan> {
        self.plan_with(|planner| if cascade { planner.cascade() } else { Ok(planner) })
    }

    fn plan_with(
        &self,
        how: impl for<'a> FnOnce(Planner<'a, Cpu>) -> Result<Planner<'a, Cpu>>,
    ) -> Result<Plan> {
        let (cpu, geometry, policy) = (Cpu::new(), self.geometry(), self.policy());
        let mut planner =
            how(Planner::new(&cpu, &policy, &geometry, self.budget, &[self.tokens])?)?;
        let memory = vec![0f32; (self.heads.iter().max().unwrap() * self.tokens * DIM) as usize];
        for (l, shape) in geometry.layers().iter().enumerate() {
            let rows = Rows::heads_first(HostSlice::F32(&memory), self.heads[l], self.tokens, DIM)?;
            let changed = planner.push(&[LayerView::new(*shape, self.tokens, rows, rows)?])?;
            assert!(changed.iter().all(|id| id.index() <= l));
        }
        planner.finish().map(|mut plans| plans.remove(0))
    }

    fn promise(&self, plan: &Plan) -> Promise<'static> {
        let heads: u32 = self.heads.iter().sum();
        let slots = plan.report.budget_slots.min(plan.report.available_slots);
        let protect = self.config.protect.for_budget(slots / u64::from(heads));
        Promise {
            budget: Some(self.budget),
            protected: protect.positions(self.tokens),
            unit: self.config.align.unit,
            ..Promise::default()
        }
    }

    fn available(&self) -> u64 {
        self.heads.iter().map(|&h| u64::from(h * self.tokens)).sum()
    }
}

fn scores() -> impl Strategy<Value = f32> {
    prop_oneof![
        // Few values, so that ties at the cut are the rule.
        6 => (-3i8..4).prop_map(|x| f32::from(x) / 2.0),
        2 => any::<f32>(),
        1 => Just(f32::NAN),
        1 => prop_oneof![Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(0.0), Just(-0.0)],
    ]
}

fn budgets(slots: u64) -> impl Strategy<Value = Budget> {
    prop_oneof![
        (0u64..=20).prop_map(|n| Budget::keep(n, 20).unwrap()),
        (0u64..40).prop_map(Budget::TokensPerHead),
        (0..=slots + 3).prop_map(Budget::Slots),
        (0..=(slots + 1) * u64::from(2 * DIM * 4)).prop_map(Budget::Bytes),
    ]
}

fn allocations() -> impl Strategy<Value = (Layers, Heads)> {
    let fraction = || (0u64..=10).prop_map(|n| Fraction::new(n, 10).unwrap());
    let boundary = |(beta, first)| Boundary { beta, first, ..Boundary::default() };
    let sensitivity = |floor| Sensitivity { floor, ..Sensitivity::default() };
    let layers = prop_oneof![
        Just(Layers::Uniform),
        (1u64..30).prop_map(|beta| Layers::Pyramid { beta }),
        (fraction(), 0u32..4).prop_map(move |b| Layers::Boundary(boundary(b))),
        fraction().prop_map(move |floor| Layers::Sensitivity(sensitivity(floor))),
    ];
    let form = prop_oneof![Just(AdaForm::Floor), Just(AdaForm::Blend)];
    let ada = (fraction(), form).prop_map(|(alpha, form)| Heads::Ada { alpha, form }).boxed();
    let heads = prop_oneof![
        Just(Heads::Uniform),
        ada.clone(),
        fraction().prop_map(|alpha| Heads::Preference { alpha }),
    ];
    let preference = (1u8..6, 1u8..6).prop_map(|taus| {
        let [tau1, tau2] = [taus.0, taus.1].map(|tau| f64::from(tau) / 2.0);
        Preference { tau1, tau2 }
    });
    let contested = Heads::Ada { alpha: Fraction::ZERO, form: AdaForm::Floor };
    let under = prop_oneof![2 => Just(Heads::Uniform), 1 => Just(contested), 1 => ada];
    prop_oneof![
        3 => (layers, heads),
        2 => (preference.prop_map(Layers::Preference), under),
        1 => Just((Layers::Global, Heads::Weights { heads: Vec::new() })),
        2 => fraction()
            .prop_map(|alpha| (Layers::Global, Heads::Ada { alpha, form: AdaForm::Floor })),
    ]
}

/// Weights of every head, some of them zero, as they are or as a profile of one budget.
fn weighted(heads: &[u32], profile: bool) -> Heads {
    let weight = |l: usize, h: u32| f64::from((l as u32 * 7 + h * 3 + 1) % 5) / 4.0;
    let heads: Vec<Vec<f64>> =
        heads.iter().enumerate().map(|(l, &n)| (0..n).map(|h| weight(l, h)).collect()).collect();
    if !profile {
        return Heads::Weights { heads };
    }
    let point = profile::Point { keep: Fraction::new(1, 4).unwrap(), shares: heads };
    Heads::Profile { profile: Profile::new("test", vec![point]).unwrap() }
}

/// Measurements for layers that ask for them.
fn measure(layers: &mut Layers, count: usize) {
    let measured = (0..count).map(|l| (l * 5 % 4) as f64 / 3.0).collect();
    match layers {
        Layers::Boundary(boundary) => boundary.importance = measured,
        Layers::Sensitivity(sensitivity) => sensitivity.similarity = measured,
        _ => {}
    }
}

/// Weights as far apart as floats go.
fn weights() -> impl Strategy<Value = f64> {
    (0u64..=f64::MAX.to_bits()).prop_map(f64::from_bits)
}

/// Sums of entropy or variance: ties, nothing, too much, and no numbers.
fn spreads() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => 0f32..10.0,
        2 => (1u8..4).prop_map(f32::from),
        1 => Just(0.0),
        1 => prop_oneof![Just(1e-30), Just(1e30), Just(f32::INFINITY), Just(f32::NAN)],
    ]
}

fn cases(units: impl Strategy<Value = u32> + 'static) -> impl Strategy<Value = Case> {
    let shape = (1u32..40, prop::collection::vec(1u32..4, 1..5));
    (
        shape,
        allocations(),
        0u32..6,
        0u32..12,
        prop::collection::vec((0u32..40, 0u32..6), 0..3),
        units,
        any::<bool>(),
    )
        .prop_flat_map(
            |((tokens, heads), mut allocation, sinks, recent, ranges, unit, profile)| {
                if let Heads::Weights { .. } = allocation.1 {
                    allocation.1 = weighted(&heads, profile);
                }
                measure(&mut allocation.0, heads.len());
                let slots: u64 = heads.iter().map(|&h| u64::from(h * tokens)).sum();
                let layer = |&h: &u32| {
                    prop::collection::vec(
                        prop::collection::vec(scores(), tokens as usize),
                        h as usize,
                    )
                };
                let all: Vec<_> = heads.iter().map(layer).collect();
                let spread: Vec<_> = heads.iter().map(|_| [spreads(), spreads()]).collect();
                (all, spread, budgets(slots)).prop_map(move |(scores, spread, budget)| {
                    let ranges = ranges.iter().map(|&(start, n)| start..start + n).collect();
                    let config = PolicyConfig {
                        layers: allocation.0.clone(),
                        heads: allocation.1.clone(),
                        protect: Protect { sinks, recent, ranges, ..Protect::default() },
                        align: Align { unit, share_heads: false },
                        allow_nan: true,
                        ..PolicyConfig::new("test", ScorerConfig::Streaming(Streaming {}))
                    };
                    Case { tokens, heads: heads.clone(), scores, spread, config, budget }
                })
            },
        )
}

/// Rank of a score in the crate's order: NaN lowest, `-0 = +0`.
fn rank(score: f32) -> f64 {
    match f64::from(score) {
        nan if nan.is_nan() => f64::NEG_INFINITY,
        score => (score + 0.0).max(f64::MIN),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Budgets are met exactly, every head keeps a slot, protection holds: the checker says so.
    #[test]
    fn plans_keep_their_promises(case in cases(Just(1))) {
        let plan = case.plan(false).unwrap();
        let budget = case.budget.resolve(&case.geometry(), u64::from(case.tokens));
        prop_assert_eq!(plan.slots, budget.min(case.available()));
        plan.check(&case.geometry(), &case.promise(&plan)).unwrap();
        let nan = case.scores.iter().flatten().flatten().filter(|s| s.is_nan()).count();
        prop_assert_eq!(plan.report.nan_scores, nan as u64);
    }

    /// Units are kept or freed whole and the budget is never exceeded.
    #[test]
    fn units_are_whole(case in cases(2u32..9)) {
        let plan = case.plan(false).unwrap();
        plan.check(&case.geometry(), &case.promise(&plan)).unwrap();
        let wanted = plan.report.budget_slots.min(plan.report.available_slots);
        prop_assert_eq!(plan.slots + plan.report.alignment_waste, wanted);
    }

    /// Evicting as layers arrive ends with the plan of the one-shot selection, ties and NaN included, and never
    /// holds more than the budget (or what is protected) and one layer.
    #[test]
    fn cascade_equals_one_shot(case in cases(prop_oneof![Just(1u32), 2u32..5])) {
        let one_shot = case.plan(false).unwrap();
        if !case.policy().cascades() {
            let refused = case.plan(true);
            prop_assert!(matches!(refused, Err(Error::Unsupported { .. })), "{:?}", refused);
            return Ok(());
        }
        let cascade = case.plan(true).unwrap();
        prop_assert_eq!(&one_shot.layers, &cascade.layers);
        let layer = case.heads.iter().max().unwrap() * case.tokens;
        let wanted = cascade.report.budget_slots.min(cascade.report.available_slots);
        prop_assert!(cascade.report.peak_slots <= wanted + u64::from(layer));
    }

    /// What is left on the device until the end is the same plan, and the same report.
    #[test]
    fn deferred_equals_eager(case in cases(prop_oneof![Just(1u32), 2u32..5])) {
        prop_assert_eq!(case.plan(false).unwrap(), case.plan_with(|p| p.deferred()).unwrap());
    }

    /// Within a head, whatever is kept beats whatever is not: protected, then score, then position.
    #[test]
    fn heads_keep_their_best(case in cases(Just(1))) {
        let plan = case.plan(false).unwrap();
        let protected = case.promise(&plan).protected;
        let is_protected = |p: u32| protected.iter().any(|r| r.contains(&p));
        prop_assume!(plan.report.protection_cut == 0);
        for (l, heads) in plan.layers.iter().enumerate() {
            for h in 0..heads.rows() {
                let kept = heads.row(h);
                let key = |p: u32| {
                    let score = rank(case.scores[l][h][p as usize]);
                    (is_protected(p), score, -f64::from(p))
                };
                let worst = kept.iter().map(|p| key(p.0)).min_by(|a, b| a.partial_cmp(b).unwrap());
                let best_out = (0..case.tokens)
                    .filter(|p| kept.binary_search(&Position(*p)).is_err())
                    .map(key)
                    .max_by(|a, b| a.partial_cmp(b).unwrap());
                if let (Some(worst), Some(best_out)) = (worst, best_out) {
                    prop_assert!(worst > best_out, "layer {} head {}", l, h);
                }
            }
        }
    }

    /// Within a layer (Ada) or over all layers (global), a head above its floor gives way to nobody better.
    #[test]
    fn contests_keep_the_best_above_floors(mut case in cases(Just(1)), global in any::<bool>()) {
        case.config.heads = Heads::Ada { alpha: Fraction::ZERO, form: AdaForm::Floor };
        case.config.layers = if global { Layers::Global } else { Layers::Uniform };
        case.config.protect = Protect::default();
        let plan = case.plan(false).unwrap();
        let groups: Vec<Vec<usize>> = match global {
            true => vec![(0..case.heads.len()).collect()],
            false => (0..case.heads.len()).map(|l| vec![l]).collect(),
        };
        for group in groups {
            let entries = |kept: bool| {
                let mut out = Vec::new();
                for &l in &group {
                    for h in 0..plan.layers[l].rows() {
                        let row = plan.layers[l].row(h);
                        // A head's only slot is its floor: it did not have to win.
                        if kept && row.len() == 1 { continue }
                        for p in 0..case.tokens {
                            if row.binary_search(&Position(p)).is_ok() == kept {
                                out.push(rank(case.scores[l][h][p as usize]));
                            }
                        }
                    }
                }
                out
            };
            let worst = entries(true).into_iter().fold(f64::INFINITY, f64::min);
            let best = entries(false).into_iter().fold(f64::NEG_INFINITY, f64::max);
            prop_assert!(worst >= best, "kept {} though {} was there", worst, best);
        }
    }

    /// Same scores, same plan: whatever the number of threads.
    #[test]
    fn threads_do_not_matter(case in cases(Just(1)), threads in 1usize..4) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let here = case.plan(false).unwrap();
        prop_assert_eq!(here, pool.install(|| case.plan(false).unwrap()));
    }

    /// Apportionment: sums to the total within the bounds, and nobody between its bounds could have one more
    /// than its share rounded up.
    #[test]
    fn apportionment_is_exact(
        claims in prop::collection::vec((0u64..50, 0u64..20, 0u64..40), 1..12),
        at in 0u64..=100,
    ) {
        let claims: Vec<Claim> = claims
            .into_iter()
            .map(|(weight, floor, room)| Claim { weight, floor, cap: floor + room })
            .collect();
        let floors: u64 = claims.iter().map(|c| c.floor).sum();
        let caps: u64 = claims.iter().map(|c| c.cap).sum();
        let total = floors + (caps - floors) * at / 100;
        let shares = apportion(total, &claims).unwrap();
        prop_assert_eq!(shares.iter().sum::<u64>(), total);
        for (claim, &share) in claims.iter().zip(&shares) {
            prop_assert!(claim.floor <= share && share <= claim.cap);
        }
        // Two free claims: shares are in the ratio of weights, to within one slot each.
        for (a, &x) in claims.iter().zip(&shares) {
            for (b, &y) in claims.iter().zip(&shares) {
                if x > a.floor && y < b.cap && a.weight > 0 {
                    // Taking one from a and giving it to b must not look fairer by more than rounding.
                    let (x, y) = (x as f64 - 1.0, y as f64 + 1.0);
                    prop_assert!(x * b.weight as f64 <= y * a.weight as f64 + 1e-9);
                }
            }
        }
        prop_assert!(apportion(caps + 1, &claims).is_err());
        if floors > 0 {
            prop_assert!(apportion(floors - 1, &claims).is_err());
        }
    }

    /// Highest averages are a selection under a total order: what claims win is what the largest averages are, and the first of them
    /// win no more when others come.
    #[test]
    fn highest_averages_are_the_largest(
        claims in prop::collection::vec((prop_oneof![weights(), (0u8..4).prop_map(f64::from)], 0u64..30), 1..9),
        at in 0u64..=100,
    ) {
        let total = claims.iter().map(|c| c.1).sum::<u64>() * at / 100;
        let shares = highest_averages(total, &claims).unwrap();
        let mut averages = Vec::new();
        for (i, &(weight, cap)) in claims.iter().enumerate() {
            let (mut last, mut place) = (f64::NAN, 0);
            for n in 1..=cap {
                let average = weight / n as f64;
                place = if average == last { place + 1 } else { 0 };
                last = average;
                averages.push((average, place, i));
            }
        }
        averages.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut want = vec![0; claims.len()];
        averages[..total as usize].iter().for_each(|(_, _, i)| want[*i] += 1);
        prop_assert_eq!(&shares, &want);
        for seen in 1..claims.len() {
            let room = claims[..seen].iter().map(|c| c.1).sum::<u64>();
            let before = highest_averages(total.min(room), &claims[..seen]).unwrap();
            prop_assert!(before.iter().zip(&shares).all(|(before, now)| before >= now));
        }
        let room = claims.iter().map(|c| c.1).sum::<u64>();
        prop_assert!(highest_averages(room + 1, &claims).is_err());
    }

    /// Planning a batch is planning each sequence.
    #[test]
    fn batches_are_independent(case in cases(Just(1)), lens in prop::collection::vec(1u32..40, 1..4)) {
        let mut config = case.config.clone();
        config.scorer = ScorerConfig::Streaming(Streaming {});
        // It says nothing of how attention spreads.
        prop_assume!(!matches!(config.layers, Layers::Preference(_)));
        let policy = config.build::<Cpu>().unwrap();
        let (cpu, geometry) = (Cpu::new(), case.geometry());
        let memory = vec![0f32; (3 * 40 * DIM) as usize];
        let plans = |lens: &[u32]| {
            let mut planner = Planner::new(&cpu, &policy, &geometry, case.budget, lens).unwrap();
            for (l, shape) in geometry.layers().iter().enumerate() {
                let view = |&n: &u32| {
                    let memory = HostSlice::F32(&memory);
                    let rows = Rows::heads_first(memory, case.heads[l], n, DIM).unwrap();
                    LayerView::new(*shape, n, rows, rows).unwrap()
                };
                planner.push(&lens.iter().map(view).collect::<Vec<_>>()).unwrap();
            }
            planner.finish().unwrap()
        };
        let alone: Vec<Plan> = lens.iter().flat_map(|&n| plans(&[n])).collect();
        prop_assert_eq!(plans(&lens), alone);
    }

    /// JSON there and back.
    #[test]
    fn plans_survive_json(case in cases(Just(1))) {
        let plan = case.plan(false).unwrap();
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
        let config = serde_json::to_string(&case.config).unwrap();
        prop_assert_eq!(serde_json::from_str::<PolicyConfig>(&config).unwrap(), case.config);
    }
}

fn plain_case() -> Case {
    let score = |l: u32, h: u32, t: u32| ((l + h + 7 * t) % 11) as f32;
    let head = |l, h| (0..20).map(|t| score(l, h, t)).collect::<Vec<_>>();
    let layer = |l| (0..3).map(|h| head(l, h)).collect::<Vec<_>>();
    Case {
        tokens: 20,
        heads: vec![3, 3],
        scores: (0..2).map(layer).collect(),
        spread: vec![[1.0; 2]; 2],
        config: PolicyConfig {
            heads: Heads::Ada { alpha: Fraction::new(1, 5).unwrap(), form: AdaForm::Floor },
            protect: Protect { sinks: 1, recent: 2, ..Protect::default() },
            ..PolicyConfig::new("test", ScorerConfig::Streaming(Streaming {}))
        },
        budget: Budget::keep(1, 4).unwrap(),
    }
}

/// Every way to break a plan is noticed, and named.
#[test]
fn the_checker_notices_each_broken_promise() {
    let case = plain_case();
    let plan = case.plan(false).unwrap();
    let geometry = case.geometry();
    let promise = case.promise(&plan);
    plan.check(&geometry, &promise).unwrap();
    let broken = |change: &dyn Fn(&mut Plan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan.check(&geometry, &promise).unwrap_err()
    };
    let with_row = |plan: &mut Plan, f: &dyn Fn(&mut Vec<Position>)| {
        let mut rows: Vec<Vec<Position>> = plan.layers[1].iter().map(<[_]>::to_vec).collect();
        f(&mut rows[2]);
        plan.layers[1] = rows.into_iter().collect();
    };
    let row_error = |f: &dyn Fn(&mut Vec<Position>)| broken(&|plan| with_row(plan, f));
    assert!(matches!(broken(&|p| drop(p.layers.pop())), CheckError::Layers { .. }));
    let fewer =
        |p: &mut Plan| p.layers[0] = p.layers[0].iter().take(2).map(<[_]>::to_vec).collect();
    assert!(matches!(broken(&fewer), CheckError::Heads { .. }));
    assert!(matches!(row_error(&|r| r.reverse()), CheckError::Order { .. }));
    assert!(matches!(row_error(&|r| r[1] = r[0]), CheckError::Order { .. }));
    assert!(matches!(row_error(&|r| r.push(Position(20))), CheckError::NotHeld { .. }));
    assert!(matches!(row_error(&|r| _ = r.remove(0)), CheckError::Unprotected { .. }));
    assert!(matches!(row_error(&|r| _ = r.remove(1)), CheckError::Sum { what: "slots", .. }));
    assert!(matches!(broken(&|p| p.bytes += 1), CheckError::Sum { what: "bytes", .. }));
    let over = |p: &mut Plan| {
        let missing = (0..20).map(Position).find(|x| !p.layers[1].row(2).contains(x)).unwrap();
        with_row(p, &|r| {
            r.push(missing);
            r.sort();
        });
        p.slots += 1;
        p.bytes += u64::from(2 * DIM * 4);
    };
    assert!(matches!(broken(&over), CheckError::Budget { .. }));
    let paged = Promise { unit: 4, ..promise.clone() };
    assert!(matches!(plan.check(&geometry, &paged), Err(CheckError::SplitUnit { .. })));
    let held: Vec<Ragged<Position>> =
        plan.layers.iter().map(|l| l.iter().map(|r| r[1..].to_vec()).collect()).collect();
    let held = Promise { held: Some(&held), ..promise.clone() };
    assert!(matches!(plan.check(&geometry, &held), Err(CheckError::NotHeld { .. })));
    let empty = broken(&|p| {
        // Moves a head's slots to another one: the sums stay right.
        let mut rows: Vec<Vec<Position>> = p.layers[0].iter().map(<[_]>::to_vec).collect();
        let total = p.layers[0].total() as u32;
        rows[0].clear();
        rows[1] = (20 - total / 2..20).map(Position).chain([Position(0)]).collect();
        rows[1].sort();
        let rest = total as usize - rows[1].len();
        rows[2] = (0..rest as u32 - 2).chain(18..20).map(Position).collect();
        p.layers[0] = rows.into_iter().collect();
        p.report.protection_cut = 1;
    });
    assert!(matches!(empty, CheckError::EmptyHead { .. }), "{empty}");
}

/// The documented rule for budgets below what is protected.
#[test]
fn scarce_budgets_keep_newest_then_sinks() {
    let mut case = plain_case();
    let kept = |case: &Case| {
        let plan = case.plan(false).unwrap();
        plan.check(&case.geometry(), &case.promise(&plan)).unwrap();
        let row: Vec<u32> = plan.layers[0].row(0).iter().map(|p| p.0).collect();
        (row, plan.report.protection_cut)
    };
    case.config.protect = Protect { sinks: 2, recent: 3, ..Protect::default() };
    case.budget = Budget::TokensPerHead(1);
    assert_eq!(kept(&case), (vec![19], 6 * 4));
    case.budget = Budget::TokensPerHead(3);
    assert_eq!(kept(&case), (vec![0, 1, 19], 6 * 2));
    case.budget = Budget::TokensPerHead(4);
    assert_eq!(kept(&case), (vec![0, 1, 18, 19], 6));
    case.budget = Budget::TokensPerHead(5);
    assert_eq!(kept(&case), (vec![0, 1, 17, 18, 19], 0));
    case.budget = Budget::Slots(0);
    assert_eq!(kept(&case).0, Vec::<u32>::new());
}

/// CAKE's shares: above the window of each, layers get slots in proportion to what they prefer, to the slot.
#[test]
fn layers_share_by_preference() {
    let mut case = plain_case();
    let taus = Preference { tau1: 1.0, tau2: 2.0 };
    case.config.layers = Layers::Preference(taus);
    case.config.heads = Heads::Uniform;
    case.config.protect = Protect { recent: 32, ..Protect::default() };
    case.tokens = 600;
    case.heads = vec![1; 4];
    case.scores = vec![vec![vec![0.0; 600]]; 4];
    // Entropy times the root of the variance: 4, 2, 1, 1.
    case.spread = vec![[2.0, 4.0], [0.5, 16.0], [1.0, 1.0], [4.0, 0.0625]];
    case.budget = Budget::Slots(1024 + 4 * 32);
    let lens = |case: &Case| -> Vec<usize> {
        let plan = case.plan(true).unwrap();
        plan.check(&case.geometry(), &case.promise(&plan)).unwrap();
        plan.layers.iter().map(Ragged::total).collect()
    };
    assert_eq!(lens(&case), [512, 256, 128, 128].map(|n| n + 32));
    // What a layer has no room for goes to the others, and first to those that want something.
    case.budget = Budget::Slots(1100 + 4 * 32);
    case.spread[3] = [f32::NAN, 1.0];
    assert_eq!(lens(&case), [568, 355, 177, 0].map(|n| n + 32));
    case.budget = Budget::Slots(1800 + 4 * 32);
    assert_eq!(lens(&case), [568, 568, 568, 96].map(|n| n + 32));
    // Nobody wants anything: all the same.
    case.spread = vec![[0.0; 2]; 4];
    case.budget = Budget::Slots(102 + 4 * 32);
    assert_eq!(lens(&case), [26, 26, 25, 25].map(|n| n + 32));
}

/// What cannot be shared by preference is said.
#[test]
fn preferences_that_are_not_there_are_errors() {
    let mut case = plain_case();
    case.config.layers = Layers::Preference(Preference::default());
    let cascade = case.plan(true).unwrap_err();
    assert!(matches!(cascade, Error::Unsupported { what: "the cascade of this policy", .. }));
    case.config.heads = Heads::Preference { alpha: Fraction::ZERO };
    let both = case.plan(false).unwrap_err();
    assert!(matches!(both, Error::Unsupported { what: "layers and heads by preference", .. }));
    case.config.heads = Heads::Uniform;
    case.config.layers = Layers::Preference(Preference { tau1: 0.0, tau2: 1.0 });
    let tau = case.plan(false).unwrap_err();
    assert!(matches!(tau, Error::Parameter { name: "tau1", .. }), "{tau}");
    // Scores of which nobody says how they spread.
    case.config.layers = Layers::Preference(Preference::default());
    let policy = case.config.build::<Cpu>().unwrap();
    let (cpu, geometry) = (Cpu::new(), case.geometry());
    let memory = vec![0f32; 3 * 20 * DIM as usize];
    let rows = Rows::heads_first(HostSlice::F32(&memory), 3, 20, DIM).unwrap();
    let view = [LayerView::new(geometry.layers()[0], 20, rows, rows).unwrap()];
    let mut planner = Planner::new(&cpu, &policy, &geometry, case.budget, &[20u32]).unwrap();
    let missing = planner.push(&view).unwrap_err();
    assert!(matches!(missing, Error::Missing { method: "layers by preference", .. }), "{missing}");
    for lens in [&[2u32, 2][..], &[2, 2, 1]] {
        let scores = cpu.zeros(&[20; 3]).unwrap();
        let spread = Some(cpu.zeros(lens).unwrap());
        let scored = Scored { spread, ..Scored::from(scores) };
        let refused = planner.push_scored(&view, scored).unwrap_err();
        assert!(matches!(refused, Error::Shape { .. }), "{refused}");
    }
}

/// A compressed cache is planned again: positions stay logical, what was lost stays lost.
#[test]
fn recompression_keeps_logical_positions() {
    let case = plain_case();
    let first = case.plan(false).unwrap();
    let held: Vec<Vec<Vec<Position>>> =
        first.layers.iter().map(|l| l.iter().map(<[_]>::to_vec).collect()).collect();
    let per_layer: Vec<&[Vec<Position>]> = held.iter().map(Vec::as_slice).collect();
    // Five tokens later, with the same fraction of a longer sequence, the budget does not compound.
    let tokens = 20;
    let (cpu, geometry) = (Cpu::new(), case.geometry());
    let policy = {
        let mut config = case.config.clone();
        config.scorer = ScorerConfig::Streaming(Streaming {});
        config.build::<Cpu>().unwrap()
    };
    let sequence = Sequence { tokens, held: Some(&per_layer), spans: None };
    let plan = |budget| {
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[sequence]).unwrap();
        let memory = vec![0f32; 400];
        for (l, shape) in geometry.layers().iter().enumerate() {
            let lens: Vec<u32> = held[l].iter().map(|r| r.len() as u32).collect();
            let starts: Vec<u64> = (0..3).map(|h| h * 20).collect();
            let rows = Rows::ragged(HostSlice::F32(&memory), DIM, &starts, &lens).unwrap();
            let view = LayerView::new(*shape, tokens, rows, rows).unwrap();
            planner.push(&[view.with_positions(&held[l]).unwrap()]).unwrap();
        }
        planner.finish().unwrap().remove(0)
    };
    let same = plan(Budget::keep(1, 4).unwrap());
    assert_eq!(same.layers, first.layers, "the same budget keeps all that is left");
    let half = plan(Budget::keep(1, 8).unwrap());
    assert_eq!(half.slots, 2 * 3 * 20 / 8);
    let promise = Promise { held: Some(&first.layers), ..Promise::default() };
    half.check(&geometry, &promise).unwrap();
    assert_eq!(half.report.available_slots, first.slots);
}

/// Wrong views are refused with what was expected and what came, and the planner goes on.
#[test]
fn wrong_views_are_errors() {
    let case = plain_case();
    let (cpu, geometry, policy) = (Cpu::new(), case.geometry(), case.policy());
    let mut planner = Planner::new(&cpu, &policy, &geometry, case.budget, &[20u32]).unwrap();
    let memory = vec![0f32; 1000];
    let view = |heads: u32, tokens: u32, dim: u32| {
        let rows = Rows::heads_first(HostSlice::F32(&memory), heads, tokens, dim).unwrap();
        LayerView::new(LayerShape::new(2 * heads, heads, dim).unwrap(), tokens, rows, rows).unwrap()
    };
    assert!(matches!(planner.push(&[]), Err(Error::Shape { what: "views of a layer", .. })));
    assert!(matches!(planner.push(&[view(2, 20, 2)]), Err(Error::Shape { what: "kv heads", .. })));
    assert!(matches!(planner.push(&[view(3, 19, 2)]), Err(Error::Shape { what: "tokens", .. })));
    assert!(matches!(planner.push(&[view(3, 20, 4)]), Err(Error::Shape { what: "head dim", .. })));
    planner.push(&[view(3, 20, 2)]).unwrap();
    planner.push(&[view(3, 20, 2)]).unwrap();
    assert!(matches!(planner.push(&[view(3, 20, 2)]), Err(Error::LayerOrder { .. })));
    assert_eq!(planner.finish().unwrap().remove(0), case.plan(false).unwrap());

    let unfinished = Planner::new(&cpu, &policy, &geometry, case.budget, &[20u32]).unwrap();
    assert!(matches!(unfinished.finish(), Err(Error::LayerOrder { expected: 0, .. })));
}

/// NaN is an error unless the policy ranks it.
#[test]
fn nan_is_refused_by_default() {
    let mut case = plain_case();
    case.scores[1][0][3] = f32::NAN;
    assert_eq!(case.plan(false).unwrap_err(), Error::NanScores { layer: LayerId(1), count: 1 });
    case.config.allow_nan = true;
    assert_eq!(case.plan(false).unwrap().report.nan_scores, 1);
}

#[test]
fn hostile_plans_are_refused() {
    let good = serde_json::to_value(plain_case().plan(false).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = good.clone();
        change(&mut value);
        serde_json::from_value::<Plan>(value).unwrap_err().to_string()
    };
    assert!(refused(&|v| v["format"] = "other".into()).contains("kvbudget-plan"));
    assert!(refused(&|v| v["version"] = 2.into()).contains("version 1"));
    assert!(refused(&|v| v["extra"] = 1.into()).contains("unknown field"));
    assert!(refused(&|v| v["budget"] = "150%".into()).contains("150%"));
    assert!(refused(&|v| v["layers"][0]["heads"][0]["kept"][0] = (-1).into()).contains("-1"));
    assert!(refused(&|v| v["layers"] = "none".into()).contains("sequence"));
}

#[test]
fn budgets_are_read_exactly() {
    let geometry = Geometry::uniform(1, LayerShape::new(1, 1, 64).unwrap(), Dtype::F16).unwrap();
    let slots = |text: &str, tokens| text.parse::<Budget>().unwrap().resolve(&geometry, tokens);
    // A float would keep 199 and 0 here.
    assert_eq!(slots("20%", 1000), 200);
    assert_eq!(slots("0.1", 10), 1);
    assert_eq!(slots("1/3", 10), 3);
    assert_eq!(slots("12.5%", 1000), 125);
    assert_eq!(slots("100%", 77), 77);
    assert_eq!(slots("128/head", 1000), 128);
    assert_eq!(slots("5000 slots", 1000), 1000);
    assert_eq!(slots("1 KiB", 1000), 4);
    for bad in [
        "",
        "%",
        "-1%",
        "101%",
        "1/0",
        "nan",
        "1e3",
        "20 percent",
        "5 TB",
        "9999999999999999999999",
    ] {
        let error = bad.parse::<Budget>().unwrap_err();
        assert!(error.to_string().contains(bad), "{bad}: {error}");
    }
    for text in ["20%", "1/3", "128/head", "5000 slots", "1024 B"] {
        assert_eq!(text.parse::<Budget>().unwrap().to_string(), text);
    }
}

#[test]
fn triggers_fire_by_tokens_and_by_slots() {
    let every = Trigger::every(8).unwrap();
    assert!(!every.due(7, u64::MAX) && every.due(8, 0));
    let above = Trigger::above(100);
    assert!(!above.due(u32::MAX, 100) && above.due(0, 101));
    let either = every.or_above(100);
    assert!(either.due(8, 0) && either.due(0, 101) && !either.due(7, 100));
    assert_eq!(Trigger::every(0), Err(Error::Zero { what: "tokens between compressions" }));
}

/// A pool passed by value does the work.
#[test]
fn a_pool_of_ones_own() {
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    let cpu = Cpu::with_pool(pool);
    let rows = cpu.zeros(&[3, 0, 2]).unwrap();
    assert_eq!(cpu.to_host(&rows).unwrap().lens().collect::<Vec<_>>(), [3, 0, 2]);
}
