//! The independent checker: does a plan keep its promises?
//!
//! It shares no code with the planners: plain loops over plain data, so that a bug in selection or
//! apportionment cannot hide itself here. It proves that
//!
//! 1. the plan fits the geometry, and its own sums of slots and bytes are right;
//! 2. positions strictly ascend, lie below the token count, and were held before;
//! 3. the slots are exactly `min(budget, available)`; with units (pages, chunks) never more, and no further
//!    whole unit would have fitted (partly filled units counted as whole ones);
//! 4. every head keeps a slot, unless the budget is smaller than the number of heads that hold any;
//! 5. what is protected is kept, unless the report says that the budget was too small for it;
//! 6. units are kept or freed whole.
//!
//! It does not judge whether the kept slots are the best ones: that is the oracle's work in the tests.

use std::ops::Range;

use super::Plan;
use crate::budget::Budget;
use crate::geometry::Geometry;
use crate::ids::{KvHead, LayerId, Position};
use crate::ragged::Ragged;

/// What a plan must hold to, beside its own words.
#[derive(Debug, Clone, Default)]
pub struct Promise<'a> {
    /// The budget; without one the plan's own is taken at its word.
    pub budget: Option<Budget>,
    /// Positions held before, per layer and head; without them all below the token count.
    pub held: Option<&'a [Ragged<Position>]>,
    /// Position ranges that every head must keep.
    pub protected: Vec<Range<u32>>,
    /// Positions per unit (page, chunk); 0 and 1 mean single tokens.
    pub unit: u32,
}

/// The first promise found broken, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Number of layers.
    #[error("expected {expected} layers, the plan has {got}")]
    Layers {
        /// Layers of the geometry.
        expected: usize,
        /// Layers of the plan.
        got: usize,
    },
    /// Number of heads of a layer.
    #[error("layer {layer}: expected {expected} heads, the plan has {got}")]
    Heads {
        /// The layer.
        layer: LayerId,
        /// Heads of the geometry.
        expected: usize,
        /// Heads of the plan.
        got: usize,
    },
    /// Positions that do not strictly ascend.
    #[error("layer {layer}, head {head}: position {got} does not come after {previous}")]
    Order {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
        /// The position before.
        previous: Position,
        /// The position that breaks the order.
        got: Position,
    },
    /// A position that the head did not hold.
    #[error(
        "layer {layer}, head {head}: position {got} is not among those held (tokens: {tokens})"
    )]
    NotHeld {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
        /// The position.
        got: Position,
        /// Tokens of the sequence.
        tokens: u32,
    },
    /// Sums that do not add up.
    #[error("{what}: the plan says {claimed}, its heads sum to {counted}")]
    Sum {
        /// Slots or bytes.
        what: &'static str,
        /// The plan's number.
        claimed: u64,
        /// The heads' sum.
        counted: u64,
    },
    /// A budget that is not met.
    #[error("the budget allows {budget} of {available} slots, the plan keeps {kept}")]
    Budget {
        /// Slots of the budget.
        budget: u64,
        /// Slots held before.
        available: u64,
        /// Slots kept.
        kept: u64,
    },
    /// A head without a slot.
    #[error("layer {layer}, head {head}: nothing kept, though the budget has a slot for each head")]
    EmptyHead {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
    },
    /// A protected position that was evicted.
    #[error("layer {layer}, head {head}: protected position {position} is not kept")]
    Unprotected {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
        /// The position.
        position: Position,
    },
    /// A unit kept in part.
    #[error("layer {layer}, head {head}: unit {unit} is kept in part ({kept} of {held} slots)")]
    SplitUnit {
        /// The layer.
        layer: LayerId,
        /// The head.
        head: KvHead,
        /// The unit: position / unit size.
        unit: u32,
        /// Slots kept of it.
        kept: usize,
        /// Slots held of it.
        held: usize,
    },
}

impl Plan {
    /// Checks the plan against the geometry and the promises; the first one broken is the error.
    pub fn check(&self, geometry: &Geometry, promise: &Promise<'_>) -> Result<(), CheckError> {
        let shapes = geometry.layers();
        if self.layers.len() != shapes.len() {
            return Err(CheckError::Layers { expected: shapes.len(), got: self.layers.len() });
        }
        let unit = promise.unit.max(1);
        let (mut kept_slots, mut kept_bytes, mut available) = (0u64, 0u64, 0u64);
        let (mut kept_units, mut holding_heads, mut empty_head) = (0u64, 0u64, None);
        for (l, shape) in shapes.iter().enumerate() {
            let layer = LayerId(l as u32);
            let heads = &self.layers[l];
            if heads.rows() != shape.kv_heads() {
                return Err(CheckError::Heads {
                    layer,
                    expected: shape.kv_heads(),
                    got: heads.rows(),
                });
            }
            for h in 0..heads.rows() {
                let head = KvHead(h as u32);
                let held = match promise.held {
                    Some(held) => Held::Only(held[l].row(h)),
                    None => Held::AllBelow(self.tokens),
                };
                let kept = heads.row(h);
                self.check_head(layer, head, kept, held)?;
                if self.report.protection_cut == 0 {
                    check_protected(layer, head, kept, held, &promise.protected)?;
                }
                kept_units += check_units(layer, head, kept, held, unit)?;
                let slots = held.count(0..u32::MAX);
                if kept.is_empty() && slots > 0 {
                    empty_head.get_or_insert((layer, head));
                }
                holding_heads += u64::from(slots > 0);
                kept_slots += kept.len() as u64;
                kept_bytes += kept.len() as u64 * geometry.slot_bytes(layer);
                available += slots;
            }
        }
        let sums = [("slots", self.slots, kept_slots), ("bytes", self.bytes, kept_bytes)];
        for (what, claimed, counted) in sums {
            if claimed != counted {
                return Err(CheckError::Sum { what, claimed, counted });
            }
        }
        let budget = promise.budget.unwrap_or(self.budget);
        let budget = budget.resolve(geometry, u64::from(self.tokens)).min(available);
        let one_more = (kept_units + 1) * u64::from(unit);
        if kept_slots > budget || (one_more <= budget && kept_slots < available) {
            return Err(CheckError::Budget { budget, available, kept: kept_slots });
        }
        match empty_head {
            Some((layer, head)) if budget >= holding_heads * u64::from(unit) => {
                Err(CheckError::EmptyHead { layer, head })
            }
            _ => Ok(()),
        }
    }

    fn check_head(
        &self,
        layer: LayerId,
        head: KvHead,
        kept: &[Position],
        held: Held<'_>,
    ) -> Result<(), CheckError> {
        for pair in kept.windows(2) {
            if pair[1] <= pair[0] {
                return Err(CheckError::Order { layer, head, previous: pair[0], got: pair[1] });
            }
        }
        match kept.iter().find(|&&p| !held.contains(p)) {
            Some(&got) => Err(CheckError::NotHeld { layer, head, got, tokens: self.tokens }),
            None => Ok(()),
        }
    }
}

/// What a head held before; never a list as long as a claim in a plan.
#[derive(Clone, Copy)]
enum Held<'a> {
    AllBelow(u32),
    Only(&'a [Position]),
}

impl Held<'_> {
    fn contains(self, position: Position) -> bool {
        match self {
            Held::AllBelow(tokens) => position.0 < tokens,
            Held::Only(list) => list.binary_search(&position).is_ok(),
        }
    }

    /// Slots whose positions lie in the range.
    fn count(self, range: Range<u32>) -> u64 {
        match self {
            Held::AllBelow(tokens) => u64::from(range.end.min(tokens).saturating_sub(range.start)),
            Held::Only(list) => within(list, &range).len() as u64,
        }
    }
}

/// The positions of an ascending list that lie in the range.
fn within<'a>(list: &'a [Position], range: &Range<u32>) -> &'a [Position] {
    let below = |end: u32| list.partition_point(|p| p.0 < end);
    &list[below(range.start)..below(range.end.max(range.start))]
}

fn check_protected(
    layer: LayerId,
    head: KvHead,
    kept: &[Position],
    held: Held<'_>,
    protected: &[Range<u32>],
) -> Result<(), CheckError> {
    for range in protected {
        if within(kept, range).len() as u64 == held.count(range.clone()) {
            continue;
        }
        // One is missing, so the search ends within what is kept and one more.
        let missing = |p: &u32| held.contains(Position(*p)) && !kept.contains(&Position(*p));
        if let Some(position) = range.clone().find(missing).map(Position) {
            return Err(CheckError::Unprotected { layer, head, position });
        }
    }
    Ok(())
}

/// Number of units kept, if each is kept whole.
fn check_units(
    layer: LayerId,
    head: KvHead,
    kept: &[Position],
    held: Held<'_>,
    size: u32,
) -> Result<u64, CheckError> {
    let mut units = 0;
    let mut rest = kept;
    while let Some(first) = rest.first() {
        let unit = first.0 / size;
        let range = unit * size..(unit * size).saturating_add(size);
        let (kept, held) = (within(rest, &range).len(), held.count(range) as usize);
        if kept != held {
            return Err(CheckError::SplitUnit { layer, head, unit, kept, held });
        }
        rest = &rest[kept..];
        units += 1;
    }
    Ok(units)
}
