//! GUI-KV: golden vectors of its parts, the whole against loops in f64, and screenshots that repeat each other.
#![allow(clippy::single_range_in_vec_init, reason = "one frame is a list of frames")]

use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::{Pool, Pooling, Reduce, Residuals, Saliency, WindowAttention};
use kvbudget::score::{GuiKv, Room, Scorer, Subspace};
use kvbudget::{
    Budget, Dtype, Error, Geometry, LayerShape, LayerView, Planner, PolicyConfig, Position, Ragged,
    Rows, Sequence, Span, SpanKind, Spans, preset,
};
use kvbudget_testkit::data::{Layer, Place, with_layers};
use kvbudget_testkit::generate::{Rng, Spec, window_head};
use kvbudget_testkit::naive::{self, Matrix};

fn frames(ranges: &[Range<u32>]) -> Spans {
    let span =
        |positions: &Range<u32>| Span { kind: SpanKind::Frame, positions: positions.clone() };
    Spans::new(ranges.iter().map(span).collect()).unwrap()
}

/// `ρ` of keys `[n, dim]` against a basis.
fn residuals(basis: Vec<f32>, keys: &[f32], dim: u32) -> Vec<f32> {
    let n = keys.len() as u32 / dim;
    let rows = Rows::heads_first(HostSlice::F32(keys), 1, n, dim).unwrap();
    let view = LayerView::new(LayerShape::new(1, 1, dim).unwrap(), n, rows, rows).unwrap();
    let (bases, slots) = (Ragged::from_iter([basis]), Ragged::from_iter([vec![0..n]]));
    let op = Residuals { bases: &bases, slots: &slots };
    let mut out = Cpu::new().zeros(&[n]).unwrap();
    Cpu::new().residual_norms(&op, &[view], &mut out).unwrap();
    out.row(0).iter().map(|x| -x).collect()
}

fn close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    let near = got.iter().zip(want).all(|(g, w)| (g - w).abs() <= tolerance);
    assert!(near, "got {got:?}, want {want:?}");
}

/// By hand: the first two keys span the plane, so that only the third coordinate is left.
#[test]
fn residuals_of_three_keys() {
    let current = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let earlier = [2.0, 1.0, 0.0, 0.0, 1.0, 3.0, 0.5, 0.0, 0.1];
    let basis = Subspace::First.basis(&current, 3, 2);
    close(&residuals(basis, &earlier, 3), &[0.0, 3.0, 0.1], 1e-6);
}

/// Norms 3, 5, 4 have the z-scores -1, 1, 0.
#[test]
fn saliency_of_three_tokens() {
    let (norms, keys) = ([3.0, 5.0, 4.0], [0.0; 3]);
    let rows = |data| Rows::heads_first(HostSlice::F32(data), 1, 3, 1).unwrap();
    let view = LayerView::new(LayerShape::new(1, 1, 1).unwrap(), 3, rows(&keys), rows(&keys));
    let view = view.and_then(|view| view.with_hidden_norms(rows(&norms))).unwrap();
    let mut out = Cpu::new().zeros(&[3]).unwrap();
    let op = Saliency { weight: 1.0, temperature: 3.5, stretches: &[0..3] };
    Cpu::new().saliency(&op, &[view], &mut out).unwrap();
    close(out.row(0), &[0.243813, 0.431742, 0.324445], 1e-5);
}

fn noise(rng: &mut Rng, n: u32, dim: u32) -> Vec<f32> {
    rng.matrix(n, dim).concat().into_iter().map(|x| x as f32).collect()
}

const SUBSPACES: [Subspace; 3] = [Subspace::First, Subspace::Pivoted, Subspace::Svd];

/// Orthonormal rows; of the directions of a rank, the principal ones leave least; the first pivot is the longest key.
#[test]
fn subspaces_are_what_they_are_called() {
    let rng = &mut Rng::new(4);
    let (dim, rank) = (8, 3);
    let keys = noise(rng, 50, dim);
    let left = SUBSPACES.map(|subspace| {
        let basis = subspace.basis(&keys, dim as usize, rank);
        assert_eq!(basis.len(), rank * dim as usize, "{subspace}");
        for (i, a) in basis.chunks(8).enumerate() {
            for (j, b) in basis.chunks(8).enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                assert!(
                    (dot - f32::from(u8::from(i == j))).abs() < 1e-6,
                    "{subspace} {i} {j} {dot}"
                );
            }
        }
        residuals(basis, &keys, dim)
    });
    let squares = left.each_ref().map(|left| left.iter().map(|x| x * x).sum::<f32>());
    assert!(squares[2] < squares[0] && squares[2] < squares[1], "{squares:?}");
    close(&left[0][..rank], &[0.0; 3], 1e-6);
    let norms = residuals(Vec::new(), &keys, dim);
    let longest = (0..50).max_by(|&a, &b| norms[a].total_cmp(&norms[b])).unwrap();
    assert!(left[1][longest] < 1e-6 && left[1].iter().filter(|x| **x < 1e-6).count() == rank);
}

/// Keys that span less than the rank have that subspace, whichever way it is found; keys of nothing have none.
#[test]
fn dependent_keys_have_fewer_directions() {
    let rng = &mut Rng::new(5);
    let (a, b) = (noise(rng, 1, 16), noise(rng, 1, 16));
    let of = |t: usize| (0..16).map(move |d| (t, d));
    let keys: Vec<f32> =
        (0..9).flat_map(of).map(|(t, d)| a[d] * (t % 3) as f32 + b[d] * (t % 2) as f32).collect();
    let others = noise(rng, 20, 16);
    let of_first = residuals(Subspace::First.basis(&keys, 16, 9), &others, 16);
    for subspace in SUBSPACES {
        let basis = subspace.basis(&keys, 16, 9);
        assert_eq!(basis.len(), 2 * 16, "{subspace}");
        close(&residuals(basis, &others, 16), &of_first, 1e-5);
        assert!(subspace.basis(&[0.0; 32], 16, 9).is_empty(), "{subspace}");
        assert!(subspace.basis(&[], 16, 9).is_empty(), "{subspace}");
        let nan = subspace.basis(&[[1.0; 16], [f32::NAN; 16]].concat(), 16, 9);
        assert!(residuals(nan, &others, 16).iter().all(|x| x.is_nan()), "{subspace}");
    }
}

/// `⌊(1 - C/n)·m⌋`, in integers.
#[test]
fn drops_follow_the_budget() {
    let dropped = |slots_per_head, len, redundant| {
        let room = Room { tokens: 1000, slots_per_head, recent: 8 };
        Scorer::<Cpu>::dropped(&GuiKv::default(), &room, len, redundant)
    };
    assert_eq!(dropped(100, 1000, 300), 270);
    assert_eq!(dropped(999, 1000, 300), 0);
    assert_eq!(dropped(1000, 1000, 300), 0);
    assert_eq!(dropped(2000, 1000, 300), 0);
    assert_eq!(dropped(0, 1000, 300), 300);
    assert_eq!(dropped(1, 3, 2), 1);
    assert_eq!(dropped(5, 0, 0), 0);
}

/// The method by its equations, in f64 loops: what each head keeps of `budget` slots.
fn oracle(layer: &Layer, spans: &Spans, method: &GuiKv, budget: usize) -> Vec<Vec<u32>> {
    let past = layer.tokens - method.window;
    let frames: Vec<Range<u32>> = spans.of(SpanKind::Frame).collect();
    let norms = layer.hidden_norms.as_ref().unwrap().head::<f64>(0).concat();
    let head = |(h, positions): (usize, Vec<u32>)| -> Vec<u32> {
        let attention = WindowAttention::plain(method.window, Reduce::Mean);
        let (mut scores, _) = naive::window_attention::<f64>(&attention, &window_head(layer, h));
        // The published sum over the window.
        scores.iter_mut().for_each(|x| *x *= f64::from(method.window));
        let before = positions.iter().filter(|&&p| p < past).count();
        let pool = Pool { kind: Pooling::Avg, kernel: method.kernel, lens: &[] };
        naive::pool(&pool, &mut scores[..before]);
        if let Some(current) = frames.last().filter(|current| current.start < past) {
            let stretch = current.start as usize..current.end.min(past) as usize;
            let shares = naive::saliency(method.temperature, &norms[stretch.clone()]);
            for (x, p) in scores.iter_mut().zip(&positions) {
                if stretch.contains(&(*p as usize)) {
                    *x += f64::from(method.saliency) * shares[*p as usize - stretch.start];
                }
            }
        }
        if let Some((current, earlier)) = frames.split_last() {
            let keys: Matrix<f64> = layer.k.head(h);
            let of = |range: &Range<u32>| -> Vec<usize> {
                (0..keys.len()).filter(|&t| range.contains(&positions[t])).collect()
            };
            let of_current: Vec<f32> =
                of(current).into_iter().flat_map(|t| keys[t].iter().map(|&x| x as f32)).collect();
            let dim = layer.shape.head_dim();
            let basis = method.subspace.basis(&of_current, dim, method.rank as usize);
            let basis: Matrix<f64> =
                basis.chunks(dim).map(|b| b.iter().map(|&x| f64::from(x)).collect()).collect();
            let left = naive::residual_norms(&basis, &keys);
            let earlier = earlier.iter().map(|frame| frame.start..frame.end.min(past));
            let mut redundant: Vec<usize> = earlier.flat_map(|frame| of(&frame)).collect();
            let count = redundant.len() * (positions.len() - budget) / positions.len();
            redundant.sort_by(|&a, &b| left[a].total_cmp(&left[b]));
            redundant[..count].iter().for_each(|&t| scores[t] = 0.0);
        }
        let mut order: Vec<usize> = (0..before).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut kept: Vec<u32> = positions[before..].to_vec();
        kept.extend(order[..budget - kept.len()].iter().map(|&t| positions[t]));
        kept.sort();
        kept
    };
    layer.slot_positions().into_iter().enumerate().map(head).collect()
}

fn config(method: &GuiKv) -> PolicyConfig {
    let mut config = preset("guikv").unwrap();
    for (key, value) in
        [("rank", method.rank.to_string()), ("subspace", method.subspace.to_string())]
    {
        config.set(key, &value).unwrap();
    }
    config
}

/// Frames of every kind, full and compressed caches in every layout and dtype, budgets from little to nearly all.
#[test]
fn plans_are_those_of_the_equations() {
    let places =
        [Place::TokensFirst, Place::Gapped, Place::Ragged { slack: 3 }, Place::Paged { page: 5 }];
    let base =
        Spec { tokens: 120, queries: 8, hidden_norms: Some(Place::HeadsFirst), ..Spec::default() };
    let full = places.map(|place| Spec { place, ..base.clone() });
    let compressed = [Place::Ragged { slack: 0 }, Place::Paged { page: 16 }].map(|place| Spec {
        place,
        kept: Some(vec![90, 90]),
        ..base.clone()
    });
    for (i, spec) in full.into_iter().chain(compressed).enumerate() {
        // The last 8 positions are those of the queries' own tokens: a compressed cache holds them as well.
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][i % 3];
        let mut layer = Spec { dtype, seed: i as u64, ..spec }.build();
        for row in layer.positions.iter_mut().flatten() {
            let n = row.len();
            (0..8).for_each(|j| row[n - 8 + j] = Position(112 + j as u32));
        }
        for spans in [
            frames(&[]),
            frames(&[30..70]),
            frames(&[5..40, 42..70, 75..110]),
            // Into the window, behind it, and one that lies in it together with part of the frame before.
            frames(&[5..60, 61..117]),
            frames(&[5..60, 61..115, 116..120]),
        ] {
            for subspace in SUBSPACES {
                for budget in [10, 25, 60, 89] {
                    let method = GuiKv { rank: 4, subspace, ..GuiKv::default() };
                    let policy = config(&method).build::<Cpu>().unwrap();
                    let geometry = Geometry::uniform(1, layer.shape, dtype).unwrap();
                    let held = layer.positions.as_ref().map(|p| [p.as_slice()]);
                    let sequence = Sequence {
                        tokens: 120,
                        held: held.as_ref().map(|h| h.as_slice()),
                        spans: Some(&spans),
                    };
                    let cpu = Cpu::new();
                    let budget_of = Budget::TokensPerHead(budget);
                    let mut planner =
                        Planner::new(&cpu, &policy, &geometry, budget_of, &[sequence]).unwrap();
                    with_layers(&cpu, std::slice::from_ref(&layer), |views| planner.push(views))
                        .unwrap();
                    let plan = planner.finish().unwrap().remove(0);
                    let got: Vec<Vec<u32>> = plan.layers[0]
                        .iter()
                        .map(|row| row.iter().map(|p| p.0).collect())
                        .collect();
                    let want = oracle(&layer, &spans, &method, budget as usize);
                    assert_eq!(got, want, "case {i} {spans} {subspace} {budget}");
                }
            }
        }
    }
}

/// Sequences that never saw a frame are planned as by SnapKV, and need no norms.
#[test]
fn without_frames_it_is_snapkv() {
    let layer = Spec { tokens: 90, queries: 8, ..Spec::default() }.build();
    let plan = |config: PolicyConfig, spans: &Spans| {
        let policy = config.build::<Cpu>().unwrap();
        let geometry = Geometry::uniform(1, layer.shape, Dtype::F32).unwrap();
        let (cpu, sequence) = (Cpu::new(), Sequence { tokens: 90, held: None, spans: Some(spans) });
        let budget = Budget::TokensPerHead(20);
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[sequence]).unwrap();
        with_layers(&cpu, std::slice::from_ref(&layer), |views| planner.push(views))?;
        planner.finish().map(|plans| plans[0].layers.clone())
    };
    let mut snapkv = preset("snapkv").unwrap();
    for (key, value) in [("window", "8"), ("kernel", "5"), ("pooling", "avg")] {
        snapkv.set(key, value).unwrap();
    }
    let none = Spans::default();
    assert_eq!(plan(preset("guikv").unwrap(), &none), plan(snapkv, &none));
    let missing = plan(preset("guikv").unwrap(), &frames(&[10..60])).unwrap_err();
    assert!(
        matches!(missing, Error::Missing { .. }) && missing.to_string().contains("hidden_norms")
    );
}

const DIM: u32 = 64;
const HEADS: u32 = 2;
/// Of a screenshot: what attracts attention, what is new, the rest. Then the text behind it, which asks.
const HOT: u32 = 10;
const NEW: u32 = 4;
const PATCHES: u32 = 40;
const TEXT: u32 = 8;
const STEP: u32 = PATCHES + TEXT;

/// Positions of a step's new patches.
fn new_patches(step: u32) -> Range<u32> {
    step * STEP + HOT..step * STEP + HOT + NEW
}

/// Keys `[head][position][D]` of several steps: patches that repeat with small changes, hot ones among them, and some that occur
/// once. The last channel is what all queries look for.
fn screens(steps: u32) -> Vec<Vec<Vec<f32>>> {
    let rng = &mut Rng::new(11);
    let head = |_| {
        let directions = rng.matrix(6, DIM);
        let mix = |rng: &mut Rng| -> Vec<f64> {
            let weights: Vec<f64> = (0..6).map(|_| rng.normal()).collect();
            (0..DIM as usize).map(|d| (0..6).map(|i| weights[i] * directions[i][d]).sum()).collect()
        };
        let screen: Vec<Vec<f64>> = (0..PATCHES).map(|_| mix(rng)).collect();
        let key = |(step, at): (u32, u32), rng: &mut Rng| -> Vec<f32> {
            let position = step * STEP + at;
            let mut key = match at {
                _ if at >= PATCHES || new_patches(step).contains(&position) => {
                    rng.matrix(1, DIM).remove(0).iter().map(|x| 2.0 * x).collect()
                }
                _ => {
                    screen[at as usize].iter().map(|x| x + 0.02 * rng.normal()).collect::<Vec<_>>()
                }
            };
            key[DIM as usize - 1] = match at {
                _ if at < HOT => 2.5,
                _ if new_patches(step).contains(&position) => 1.5,
                _ if at < PATCHES => 0.0,
                _ => -1.0,
            };
            key.into_iter().map(|x| x as f32).collect()
        };
        let all = (0..steps).flat_map(|step| (0..STEP).map(move |at| (step, at)));
        all.map(|at| key(at, rng)).collect()
    };
    (0..HEADS).map(head).collect()
}

/// What a policy still holds after each step: the cache is compressed to 40 slots per head whenever a screenshot has come.
fn steps(name: &str, steps: u32) -> Vec<Vec<Vec<Position>>> {
    let keys = screens(steps);
    let mut config = preset(name).unwrap();
    for (key, value) in [("window", "8"), ("kernel", "1")] {
        config.set(key, value).unwrap();
    }
    let policy = config.build::<Cpu>().unwrap();
    let shape = LayerShape::new(HEADS, HEADS, DIM).unwrap();
    let geometry = Geometry::uniform(1, shape, Dtype::F32).unwrap();
    let mut query = vec![0.0; DIM as usize];
    query[DIM as usize - 1] = f32::sqrt(DIM as f32);
    let queries = query.repeat((HEADS * TEXT) as usize);
    let mut held = vec![Vec::<Position>::new(); HEADS as usize];
    let mut after = Vec::new();
    for step in 0..steps {
        let tokens = (step + 1) * STEP;
        held.iter_mut().for_each(|row| row.extend((step * STEP..tokens).map(Position)));
        let spans: Vec<_> = (0..=step).map(|s| s * STEP..s * STEP + PATCHES).collect();
        let spans = frames(&spans);
        let rows =
            keys.iter().zip(&held).flat_map(|(keys, held)| held.iter().map(|p| &keys[p.index()]));
        let k: Vec<f32> = rows.flatten().copied().collect();
        let lens: Vec<u32> = held.iter().map(|row| row.len() as u32).collect();
        let starts = [0, u64::from(lens[0])];
        let k = Rows::ragged(HostSlice::F32(&k), DIM, &starts, &lens).unwrap();
        let q = Rows::heads_first(HostSlice::F32(&queries), HEADS, TEXT, DIM).unwrap();
        let norms = vec![1.0; tokens as usize];
        let norms = Rows::heads_first(HostSlice::F32(&norms), 1, tokens, 1).unwrap();
        let view = LayerView::new(shape, tokens, k, k)
            .and_then(|view| view.with_queries(q))
            .and_then(|view| view.with_hidden_norms(norms))
            .and_then(|view| view.with_positions(&held))
            .unwrap();
        let (cpu, of_layer) = (Cpu::new(), [held.as_slice()]);
        let sequence = Sequence { tokens, held: Some(&of_layer), spans: Some(&spans) };
        let budget = Budget::TokensPerHead(40);
        let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[sequence]).unwrap();
        planner.push(&[view]).unwrap();
        let plan = planner.finish().unwrap().remove(0);
        assert_eq!(plan.slots, 40 * u64::from(HEADS));
        held = plan.layers[0].iter().map(<[Position]>::to_vec).collect();
        after.push(held.clone());
    }
    after
}

/// As screenshots come, what they repeat of the earlier ones goes, further with every step; what occurred once stays. By attention
/// alone the copies stay, and what is new goes.
#[test]
fn redundant_history_goes_first() {
    let count = |held: &[Position], of: &mut dyn Iterator<Item = u32>| -> usize {
        of.filter(|&p| held.contains(&Position(p))).count()
    };
    let (guikv, snapkv) = (steps("guikv", 4), steps("snapkv", 4));
    for step in 1..4 {
        for head in 0..HEADS as usize {
            let new = |held: &[Position]| count(held, &mut (0..=step).flat_map(new_patches));
            let hot = |held: &[Position]| {
                count(held, &mut (0..step).flat_map(|s| s * STEP..s * STEP + HOT))
            };
            let (ours, theirs) = (&guikv[step as usize][head], &snapkv[step as usize][head]);
            assert_eq!(
                new(ours),
                ((step + 1) * NEW) as usize,
                "step {step}: everything new is there"
            );
            // 32 slots are left beside the window: SnapKV fills them with copies.
            let copies = (step * HOT) as usize;
            assert!(hot(theirs) >= copies.min(22), "step {step}: attention keeps copies");
            let gone = copies - hot(ours);
            assert!(gone >= copies * 2 / 5, "step {step}: {gone} of {copies} hot copies are gone");
            let current = step * STEP..step * STEP + HOT;
            assert_eq!(count(ours, &mut current.clone()), HOT as usize, "the screen is there");
        }
    }
    let left = |all: &[Vec<Vec<Position>>]| count(&all[3][0], &mut (0..4).flat_map(new_patches));
    assert!(left(&snapkv) < 4, "{} new patches survive by attention", left(&snapkv));
}
