//! One plan over one dump: layer after layer, timed without the reading, checked before anyone sees it.

use std::io::{Read, Seek};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvbudget::backend::cpu::Cpu;
use kvbudget::plan::Promise;
use kvbudget::{Budget, Geometry, Plan, Planner, Policy, PolicyConfig, Spans};

use crate::dump::Dump;

/// A checked plan and the time the planner took.
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// Scoring and selection; reading the dump is not in it.
    pub time: Duration,
}

/// Plans the dump's sequence. `tick` is called after every layer.
pub fn plan<R: Read + Seek>(
    cpu: &Cpu,
    dump: &mut Dump<R>,
    config: &PolicyConfig,
    budget: Budget,
    mut tick: impl FnMut(),
) -> Result<Planned> {
    let policy: Policy<Cpu> = config.build()?;
    let geometry = dump.geometry().clone();
    let start = Instant::now();
    let mut planner = Planner::new(cpu, &policy, &geometry, budget, &[dump.sequence()])?;
    let mut time = start.elapsed();
    for l in 0..geometry.layers().len() {
        let layer = dump.layer(l, false)?;
        let start = Instant::now();
        planner.push(&[layer.view()?]).with_context(|| format!("layer {l}"))?;
        time += start.elapsed();
        tick();
    }
    let start = Instant::now();
    let plan = planner.finish()?.remove(0);
    time += start.elapsed();
    verify(&plan, &geometry, config, budget, dump.header().spans.as_ref())?;
    Ok(Planned { plan, time })
}

/// Scores one layer, to learn early whether the dump holds what the policy needs.
pub fn probe<R: Read + Seek>(
    cpu: &Cpu,
    dump: &mut Dump<R>,
    config: &PolicyConfig,
    budget: Budget,
) -> Result<()> {
    let policy: Policy<Cpu> = config.build()?;
    let geometry = dump.geometry().clone();
    let mut planner = Planner::new(cpu, &policy, &geometry, budget, &[dump.sequence()])?;
    planner.push(&[dump.layer(0, false)?.view()?])?;
    Ok(())
}

/// What the policy promised must hold, and the budget must be met to the slot. Published codes in
/// reference mode round as they please: their plans are held to their own sums.
fn verify(
    plan: &Plan,
    geometry: &Geometry,
    config: &PolicyConfig,
    budget: Budget,
    spans: Option<&Spans>,
) -> Result<()> {
    let exact = budget.resolve(geometry, u64::from(plan.tokens));
    let promise = match config.reference {
        Some(_) => Promise { budget: Some(Budget::Slots(plan.slots)), ..Promise::default() },
        None => Promise {
            budget: Some(budget),
            protected: protected(config, geometry, exact, plan.tokens, spans),
            unit: config.align.unit,
            held: None,
        },
    };
    plan.check(geometry, &promise)
        .with_context(|| format!("the plan of {} is wrong", config.name))?;
    ensure!(
        plan.slots == exact || config.reference.is_some() || config.align.unit > 1,
        "the plan of {} keeps {} slots, the budget is {exact}",
        config.name,
        plan.slots
    );
    Ok(())
}

/// Position ranges that the policy protects.
fn protected(
    config: &PolicyConfig,
    geometry: &Geometry,
    slots: u64,
    tokens: u32,
    spans: Option<&Spans>,
) -> Vec<Range<u32>> {
    let protect = config.protect.for_budget(slots / geometry.heads() as u64);
    protect.for_spans(spans.unwrap_or(&Spans::default())).positions(tokens)
}
