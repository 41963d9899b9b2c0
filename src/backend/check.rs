//! What every backend refuses, said once: shapes that do not fit each other, and parameters without a meaning.

use std::ops::Range;

use super::AttendView;
use super::ops::{
    AttentionSpread, Lag, Pool, Projection, Residuals, Saliency, TopK, WindowAttention,
};
use crate::error::{Error, Result};
use crate::ragged::Ragged;
use crate::view::{LayerView, Storage};

/// Rows of whatever device: their number and lengths.
pub(super) trait Lens {
    fn rows(&self) -> usize;
    fn len(&self, row: usize) -> usize;
}

impl<T> Lens for Ragged<T> {
    fn rows(&self) -> usize {
        Ragged::rows(self)
    }
    fn len(&self, row: usize) -> usize {
        Ragged::len(self, row)
    }
}

/// Checks a number, usually of rows.
pub(super) fn expect(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected as u64, got: got as u64 })
}

/// Checks that something that ends at `end` stays within `len`.
pub(super) fn within(what: &'static str, len: usize, end: usize) -> Result<()> {
    expect(what, len.max(end), len)
}

/// Checks that `rows` has one row per segment of the views, each as long as the segment.
pub(super) fn segments<S: Storage>(layers: &[LayerView<'_, S>], rows: &impl Lens) -> Result<()> {
    let lens = layers.iter().flat_map(|l| (0..l.shape().kv_heads()).map(|h| l.k().len(h)));
    expect("score rows (segments)", lens.clone().count(), rows.rows())?;
    for (s, expected) in lens.enumerate() {
        expect("scores of a segment", expected, rows.len(s))?;
    }
    Ok(())
}

/// Checks that each of the first `lens[s]` entries exists.
fn prefixes(what: &'static str, lens: &[u32], rows: &impl Lens) -> Result<()> {
    expect(what, rows.rows(), lens.len())?;
    (0..lens.len()).try_for_each(|s| within(what, rows.len(s), lens[s] as usize))
}

fn odd(name: &'static str, kernel: u32) -> Result<()> {
    match kernel % 2 {
        1 => Ok(()),
        _ => Err(Error::Parameter { name, expected: "an odd number", got: kernel.to_string() }),
    }
}

pub(super) fn slice(range: &Range<usize>, rows: &impl Lens) -> Result<()> {
    within("rows of a slice", rows.rows(), range.end)
}

pub(super) fn window_attention<S: Storage>(
    op: &WindowAttention,
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
    mean: Option<&impl Lens>,
) -> Result<()> {
    if op.window == 0 {
        return Err(Error::Zero { what: "observation window" });
    }
    op.row_pool.map_or(Ok(()), |kernel| odd("row_pool", kernel))?;
    if op.gap > 0 && op.row_pool.is_some() {
        return Err(Error::Unsupported {
            what: "window attention with a gap and pooled rows",
            why: "the mass that a pooled row is scaled back to would depend on the gap",
        });
    }
    if op.gap > 0 && op.probe {
        return Err(Error::Unsupported {
            what: "window attention of a probe with a gap",
            why: "a probe's queries have no distance to a slot",
        });
    }
    segments(layers, out)?;
    mean.map_or(Ok(()), |mean| segments(layers, mean))
}

pub(super) fn projection<S: Storage>(
    op: &Projection<'_>,
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
) -> Result<()> {
    if op.window == 0 {
        return Err(Error::Zero { what: "observation window" });
    }
    op.row_pool.map_or(Ok(()), |kernel| odd("row_pool", kernel))?;
    segments(layers, out)?;
    expect("anchors", out.rows(), op.anchor.len())?;
    for (s, anchor) in op.anchor.iter().enumerate() {
        within("slots of an anchor", out.len(s), anchor.end.max(anchor.start) as usize)?;
        within("start of an anchor", anchor.end as usize, anchor.start as usize)?;
    }
    Ok(())
}

pub(super) fn attention_spread<S: Storage>(
    op: AttentionSpread,
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
    sums: &impl Lens,
) -> Result<()> {
    if op.window == 0 {
        return Err(Error::Zero { what: "observation window" });
    }
    if !op.gamma.is_finite() {
        let got = op.gamma.to_string();
        return Err(Error::Parameter { name: "gamma", expected: "a finite number", got });
    }
    segments(layers, out)?;
    expect("rows of sums (segments)", out.rows(), sums.rows())?;
    (0..sums.rows()).try_for_each(|s| expect("sums of a segment", 2, sums.len(s)))
}

pub(super) fn expected_attention<S: Storage>(
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
) -> Result<()> {
    layers.iter().try_for_each(|layer| layer.expected("expected attention").map(drop))?;
    segments(layers, out)
}

pub(super) fn pool(op: &Pool<'_>, rows: &impl Lens) -> Result<()> {
    odd("kernel", op.kernel)?;
    prefixes("pooled slots of a segment", op.lens, rows)
}

pub(super) fn lag<S: Storage>(
    op: &Lag,
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
) -> Result<()> {
    if op.lag == 0 {
        return Err(Error::Zero { what: "lag" });
    }
    segments(layers, out)
}

/// Checks that each range ends within its segment's keys and is not reversed.
pub(super) fn keys<S: Storage>(slots: &[Range<u32>], layers: &[LayerView<'_, S>]) -> Result<()> {
    let lens: Vec<usize> =
        layers.iter().flat_map(|l| (0..l.shape().kv_heads()).map(|h| l.k().len(h))).collect();
    expect("slots whose keys are read (segments)", lens.len(), slots.len())?;
    for (range, len) in slots.iter().zip(lens) {
        within("keys of a segment", len, range.end as usize)?;
        within("start of the keys of a segment", range.end as usize, range.start as usize)?;
    }
    Ok(())
}

pub(super) fn residual_norms<S: Storage>(
    op: &Residuals<'_>,
    layers: &[LayerView<'_, S>],
    out: &impl Lens,
) -> Result<()> {
    segments(layers, out)?;
    expect("bases of the segments", out.rows(), op.bases.rows())?;
    let dims = layers.iter().flat_map(|l| (0..l.shape().kv_heads()).map(|_| l.k().dim()));
    for (basis, dim) in op.bases.iter().zip(dims) {
        expect("elements of a basis", basis.len().next_multiple_of(dim), basis.len())?;
        within("vectors of a basis", dim, basis.len() / dim)?;
    }
    ranges("measured ranges", op.slots, out)
}

pub(super) fn saliency<S: Storage>(
    op: &Saliency<'_>,
    layers: &[LayerView<'_, S>],
    rows: &impl Lens,
) -> Result<()> {
    segments(layers, rows)?;
    let positive = op.temperature > 0.0 && op.temperature.is_finite();
    if !positive {
        let (expected, got) = ("a positive number", op.temperature.to_string());
        return Err(Error::Parameter { name: "temperature", expected, got });
    }
    expect("stretches of the views", layers.len(), op.stretches.len())?;
    for (layer, stretch) in layers.iter().zip(op.stretches) {
        within("positions of a stretch", layer.tokens() as usize, stretch.end as usize)?;
        if !stretch.is_empty() {
            layer.hidden_norms("saliency")?;
        }
    }
    Ok(())
}

pub(super) fn floor_at_mean(lens: &[u32], rows: &impl Lens) -> Result<()> {
    prefixes("floored slots of a segment", lens, rows)
}

pub(super) fn weigh(rows: &impl Lens, norms: &impl Lens) -> Result<()> {
    expect("value norms", rows.rows(), norms.rows())?;
    (0..rows.rows()).try_for_each(|s| expect("value norms of a segment", rows.len(s), norms.len(s)))
}

pub(super) fn raise(by: &impl Lens, rows: &impl Lens) -> Result<()> {
    expect("rows to raise by", rows.rows(), by.rows())?;
    (0..rows.rows()).try_for_each(|s| within("entries to raise by", by.len(s), rows.len(s)))
}

pub(super) fn mass_count(thresholds: &[f32], caps: &[u32], mass: &impl Lens) -> Result<()> {
    expect("caps of the mass count", mass.rows(), caps.len())?;
    expect("thresholds of the mass count", mass.rows(), thresholds.len())
}

/// Of [`Backend::pin_top`](super::Backend::pin_top) and [`Backend::drop_top`](super::Backend::drop_top).
pub(super) fn marked_top(counts: &[u32], by: &impl Lens, rows: &impl Lens) -> Result<()> {
    expect("marked rows", rows.rows(), by.rows())?;
    expect("counts of marked slots", rows.rows(), counts.len())?;
    for (s, &count) in counts.iter().enumerate() {
        expect("scores of a segment to mark by", rows.len(s), by.len(s))?;
        within("marked slots of a segment", by.len(s), count as usize)?;
    }
    Ok(())
}

pub(super) fn rank(
    protected: &Ragged<Range<u32>>,
    weights: &[f32],
    rows: &impl Lens,
) -> Result<()> {
    expect("weights of the rows", rows.rows(), weights.len())?;
    ranges("protected ranges", protected, rows)
}

pub(super) fn free_mass(protected: &Ragged<Range<u32>>, rows: &impl Lens) -> Result<()> {
    ranges("protected ranges", protected, rows)
}

/// Checks that ranges ascend, are disjoint and lie within their segments.
fn ranges(name: &'static str, all: &Ragged<Range<u32>>, rows: &impl Lens) -> Result<()> {
    expect(name, rows.rows(), all.rows())?;
    for (s, ranges) in all.iter().enumerate() {
        let mut end = 0;
        for range in ranges {
            let len = rows.len(s);
            if range.start < end || range.end < range.start || range.end as usize > len {
                return Err(Error::Parameter {
                    name,
                    expected: "ascending, disjoint and within the segment",
                    got: format!("{range:?} in segment {s} of {len} slots"),
                });
            }
            end = range.end;
        }
    }
    Ok(())
}

pub(super) fn share_heads(heads: &[usize], rows: &impl Lens) -> Result<()> {
    expect("heads of the views", heads.iter().sum(), rows.rows())?;
    let mut first = 0;
    for &n in heads {
        for s in first..first + n {
            expect("length of heads that share a selection", rows.len(first), rows.len(s))?;
        }
        first += n;
    }
    Ok(())
}

pub(super) fn coarsen(units: &Ragged<Range<u32>>, rows: &impl Lens) -> Result<()> {
    expect("units", rows.rows(), units.rows())?;
    for (s, units) in units.iter().enumerate() {
        for unit in units {
            within("slots of a unit", rows.len(s), unit.end.max(unit.start) as usize)?;
            within("start of a unit", unit.end as usize, unit.start as usize)?;
        }
    }
    Ok(())
}

pub(super) fn pick(slots: &Ragged<u32>, rows: &impl Lens) -> Result<()> {
    expect("picked segments", rows.rows(), slots.rows())?;
    for (s, slots) in slots.iter().enumerate() {
        let end = slots.iter().max().map_or(0, |&slot| slot as usize + 1);
        within("picked slots of a segment", rows.len(s), end)?;
    }
    Ok(())
}

/// Checks a selection over segments of `rows`.
pub(super) fn top_k(op: &TopK<'_>, rows: &impl Lens) -> Result<()> {
    ranges("protected ranges", op.protected, rows)?;
    let mut next = 0;
    for contest in op.contests {
        if contest.segments.start != next || contest.segments.end < next {
            return Err(Error::Parameter {
                name: "contests",
                expected: "consecutive segments from 0",
                got: format!("{:?} after segment {next}", contest.segments),
            });
        }
        next = contest.segments.end;
        within("segments of the contests", rows.rows(), next)?;
        expect("floors of a contest", contest.segments.len(), contest.floors.len())?;
        let held = || contest.segments.clone().map(|s| rows.len(s) as u64);
        let caps = held().sum();
        let floors = contest.floors.iter().fold(0u64, |a, &f| a.saturating_add(f));
        let over = held().zip(&contest.floors).any(|(len, &floor)| floor > len);
        if over || floors > contest.budget || contest.budget > caps {
            return Err(Error::Apportion { total: contest.budget, floors, caps });
        }
    }
    expect("segments of the contests", rows.rows(), next)
}

pub(super) fn attend<S: Storage>(
    sequences: &[AttendView<'_, S>],
    out: &impl Lens,
    lse: Option<&impl Lens>,
) -> Result<()> {
    let rows = sequences.iter().map(|s| s.q.heads()).sum();
    expect("output rows (query heads)", rows, out.rows())?;
    if let Some(lse) = lse {
        expect("log-sum-exp rows (query heads)", rows, lse.rows())?;
    }
    let mut row = 0;
    for AttendView { q, k, v } in sequences {
        if k.heads() == 0 || q.heads() == 0 || !q.heads().is_multiple_of(k.heads()) {
            return Err(Error::HeadsNotDivisible {
                query_heads: q.heads() as u32,
                kv_heads: k.heads() as u32,
            });
        }
        expect("head dim of queries", k.dim(), q.dim())?;
        expect("head dim of values", k.dim(), v.dim())?;
        expect("value heads", k.heads(), v.heads())?;
        for h in 0..k.heads() {
            expect("value rows of a head", k.len(h), v.len(h))?;
        }
        for hq in 0..q.heads() {
            expect("query rows of a head", q.len(0), q.len(hq))?;
            expect("output elements of a query head", q.len(hq) * q.dim(), out.len(row))?;
            if let Some(lse) = lse {
                expect("log-sum-exp of a query head", q.len(hq), lse.len(row))?;
            }
            row += 1;
        }
    }
    Ok(())
}
