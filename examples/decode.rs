//! A decode loop on a budget: prefill, plan, compact, then append and attend token by token, and compress again
//! whenever the trigger fires. Random tensors stand in for a model; the bookkeeping is what an engine does.
//!
//! `cargo run --release --example decode`

use kvbudget::backend::Backend;
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::Attend;
use kvbudget::cache::FlatCache;
use kvbudget::{
    Budget, Dtype, Geometry, LayerShape, LayerView, Planner, Position, Result, Rows, Sequence,
    Trigger, preset,
};

const LAYERS: usize = 4;
const QUERY_HEADS: u32 = 8;
const KV_HEADS: u32 = 2;
const DIM: u32 = 64;
const PROMPT: u32 = 1000;
const WINDOW: u32 = 32;
const SLACK: u32 = 64;

/// Stands in for a model: keys, values or queries of `heads · tokens` rows.
fn tensor(state: &mut u64, heads: u32, tokens: u32) -> Vec<f32> {
    let mut next = || {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..heads * tokens * DIM).map(|_| next()).collect()
}

fn rows(data: &[f32], heads: u32) -> Result<Rows<'_, HostSlice<'_>>> {
    let len = data.len() as u32 / heads / DIM;
    Rows::heads_first(HostSlice::F32(data), heads, len, DIM)
}

fn main() -> Result<()> {
    let mut state = 1;
    let shape = LayerShape::new(QUERY_HEADS, KV_HEADS, DIM)?;
    let geometry = Geometry::uniform(LAYERS, shape, Dtype::F32)?;
    let budget: Budget = "20%".parse()?;
    let (cpu, policy) = (Cpu::new(), preset("ada-snapkv")?.build::<Cpu>()?);

    // Prefill: plan layer by layer; each layer's dense cache can go as soon as it is compacted.
    let mut planner = Planner::new(&cpu, &policy, &geometry, budget, &[PROMPT])?;
    let mut caches = Vec::new();
    for _ in 0..LAYERS {
        let (k, v) = (tensor(&mut state, KV_HEADS, PROMPT), tensor(&mut state, KV_HEADS, PROMPT));
        let q = tensor(&mut state, QUERY_HEADS, WINDOW);
        let view = LayerView::new(shape, PROMPT, rows(&k, KV_HEADS)?, rows(&v, KV_HEADS)?)?
            .with_queries(rows(&q, QUERY_HEADS)?)?;
        // A per-layer policy settles the layer at once; one over all layers needs `cascade` for that.
        for layer in planner.push(&[view])? {
            let kept = planner.held(0, layer).unwrap_or_default();
            caches.push(FlatCache::gather(&view, &kept, SLACK)?);
        }
    }
    let held = |caches: &[FlatCache]| -> u64 {
        caches.iter().flat_map(|c| c.lens()).map(|&n| u64::from(n)).sum()
    };
    println!("prefill: {} of {} slots", held(&caches), geometry.slots(PROMPT.into()));

    // Decode: the queries of the last W tokens are kept for scoring, oldest first, per layer.
    let trigger = Trigger::every(SLACK)?;
    let attend = Attend { scale: 1.0 / (DIM as f32).sqrt() };
    let mut out = cpu.zeros(&[DIM; QUERY_HEADS as usize])?;
    let mut recent: Vec<Vec<Vec<f32>>> = vec![Vec::new(); LAYERS];
    let mut since = 0;
    for tokens in PROMPT + 1..=PROMPT + 200 {
        for (cache, recent) in caches.iter_mut().zip(&mut recent) {
            let (k, v) = (tensor(&mut state, KV_HEADS, 1), tensor(&mut state, KV_HEADS, 1));
            let q = tensor(&mut state, QUERY_HEADS, 1);
            cache.append(&rows(&k, KV_HEADS)?, &rows(&v, KV_HEADS)?)?;
            cpu.attend(&attend, &[cache.attend_view(rows(&q, QUERY_HEADS)?)?], &mut out, None)?;
            recent.push(q);
            if recent.len() > WINDOW as usize {
                recent.remove(0);
            }
        }
        since += 1;
        if trigger.due(since, held(&caches)) {
            since = 0;
            compress(&cpu, &policy, &geometry, budget, tokens, &mut caches, &recent)?;
            println!("token {tokens}: compressed to {} slots", held(&caches));
        }
    }
    let newest = caches[0].positions()[0].last().copied();
    assert_eq!(newest, Some(Position(PROMPT + 199)), "positions stay logical");
    Ok(())
}

/// Plans what the caches hold and compacts them in place. Shares move between heads, so that one may have kept
/// all it had: repacking gives every head room again.
fn compress(
    cpu: &Cpu,
    policy: &kvbudget::Policy<Cpu>,
    geometry: &Geometry,
    budget: Budget,
    tokens: u32,
    caches: &mut [FlatCache],
    recent: &[Vec<Vec<f32>>],
) -> Result<()> {
    let held: Vec<&[Vec<Position>]> = caches.iter().map(FlatCache::positions).collect();
    let sequence = Sequence { tokens, held: Some(&held), spans: None };
    let mut planner = Planner::new(cpu, policy, geometry, budget, &[sequence])?;
    for ((cache, recent), shape) in caches.iter().zip(recent).zip(geometry.layers()) {
        // [W][Hq, 1, D] as the rows of [Hq, W, D].
        let all: Vec<f32> = recent.concat();
        let (dim, step) = (DIM as usize, (QUERY_HEADS * DIM) as usize);
        let count = recent.len() as u32;
        let q = Rows::strided(HostSlice::F32(&all), QUERY_HEADS, count, DIM, dim, step)?;
        planner.push(&[cache.view(*shape)?.with_queries(q)?])?;
    }
    let plan = planner.finish()?.remove(0);
    for (cache, kept) in caches.iter_mut().zip(&plan.layers) {
        cache.compact(kept)?;
        cache.repack(SLACK)?;
    }
    Ok(())
}
