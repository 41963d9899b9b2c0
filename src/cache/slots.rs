//! The books of a cache: which positions each head holds, in which slots, and how many it may hold.
//!
//! Flat and paged caches differ in where a slot's row lies, and in nothing that is written here.

use super::buffer::{prefetch_all, reserved};
use crate::backend::cpu::{HostSlice, Streamed};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::geometry::MAX_LEN;
use crate::ids::{KvHead, LayerId, Position};
use crate::plan::CheckError;
use crate::ragged::Ragged;
use crate::view::{Rows, Storage};

/// Lengths and positions of the heads of one layer.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) dtype: Dtype,
    pub(super) dim: u32,
    /// Tokens seen: the position of the next one.
    pub(super) tokens: u32,
    /// Slots in use, by head.
    pub(super) lens: Vec<u32>,
    /// Slots reserved, by head.
    pub(super) capacity: Vec<u32>,
    /// Positions of the slots in use, ascending, by head; each list has room for the head's capacity.
    pub(super) positions: Vec<Vec<Position>>,
}

impl Slots {
    /// Heads that hold `kept`, with room for `slack` more slots each.
    pub(super) fn new(
        (dtype, dim): (Dtype, u32),
        tokens: u32,
        kept: &[&[Position]],
        slack: u32,
    ) -> Result<Self> {
        let capacity = with_slack(kept.iter().map(|row| row.len()), slack)?;
        let lens = kept.iter().map(|row| row.len() as u32).collect();
        let list = |(row, &capacity): (&&[Position], &u32)| {
            let mut positions = reserved(RESERVED, capacity.into())?;
            positions.extend_from_slice(row);
            Ok(positions)
        };
        let positions = kept.iter().zip(&capacity).map(list).collect::<Result<_>>()?;
        Ok(Self { dtype, dim, tokens, lens, capacity, positions })
    }

    /// No heads.
    pub(super) fn empty(dtype: Dtype, dim: u32) -> Self {
        let (lens, capacity, positions) = (Vec::new(), Vec::new(), Vec::new());
        Self { dtype, dim, tokens: 0, lens, capacity, positions }
    }

    /// Slots in use by all heads.
    pub(super) fn total(&self) -> u64 {
        self.lens.iter().map(|&n| u64::from(n)).sum()
    }

    /// Bytes of one row.
    pub(super) fn row_bytes(&self) -> usize {
        self.dim as usize * self.dtype.size()
    }

    /// Whether these heads can be thinned to `kept`.
    pub(super) fn check_kept(&self, kept: &Ragged<Position>) -> Result<()> {
        expect("heads of the kept positions", self.lens.len(), kept.rows())?;
        for (h, (held, row)) in self.positions.iter().zip(kept.iter()).enumerate() {
            Held::At(held).check(h, row, self.tokens)?;
        }
        Ok(())
    }

    /// Forgets all positions but `kept`, which was checked.
    pub(super) fn keep(&mut self, kept: &Ragged<Position>) {
        for (h, row) in kept.iter().enumerate() {
            self.lens[h] = row.len() as u32;
            // Fewer than there were: no allocation.
            self.positions[h].clear();
            self.positions[h].extend_from_slice(row);
        }
    }

    /// Forgets the positions from `tokens` on, and that they were seen.
    pub(super) fn truncate(&mut self, tokens: u32) -> Result<()> {
        if tokens > self.tokens {
            let (what, got, limit) = ("tokens to go back to", tokens.into(), self.tokens.into());
            return Err(Error::TooLarge { what, got, limit });
        }
        for (len, positions) in self.lens.iter_mut().zip(&mut self.positions) {
            positions.truncate(positions.partition_point(|p| p.0 < tokens));
            *len = positions.len() as u32;
        }
        self.tokens = tokens;
        Ok(())
    }

    /// Whether rows `[H, M, D]` of new tokens fit; `M`.
    pub(super) fn check_new(
        &self,
        k: &Rows<'_, HostSlice<'_>>,
        v: &Rows<'_, HostSlice<'_>>,
    ) -> Result<u32> {
        let new = new_rows((self.dtype, self.dim), self.lens.len(), k, v)?;
        let tokens = u64::from(self.tokens) + u64::from(new);
        if tokens > MAX_LEN {
            let (what, got) = ("tokens of a sequence", tokens);
            return Err(Error::TooLarge { what, got, limit: MAX_LEN });
        }
        for (h, (&len, &capacity)) in self.lens.iter().zip(&self.capacity).enumerate() {
            let (len, capacity, new) = (u64::from(len), u64::from(capacity), u64::from(new));
            if len + new > capacity {
                return Err(Error::CacheFull { head: KvHead(h as u32), len, capacity, new });
            }
        }
        Ok(new)
    }

    /// Enters `new` tokens, which were checked.
    pub(super) fn push(&mut self, new: u32) {
        let end = self.tokens + new;
        for (len, positions) in self.lens.iter_mut().zip(&mut self.positions) {
            *len += new;
            // Within what was reserved: no allocation.
            positions.extend((self.tokens..end).map(Position));
        }
        self.tokens = end;
    }
}

const RESERVED: &str = "slots reserved for a head";

/// Capacities of heads that hold `lens` slots and `slack` more.
pub(crate) fn with_slack(lens: impl Iterator<Item = usize>, slack: u32) -> Result<Vec<u32>> {
    let room = |len: usize| match len as u64 + u64::from(slack) {
        got if got > MAX_LEN => Err(Error::TooLarge { what: RESERVED, got, limit: MAX_LEN }),
        got => Ok(got as u32),
    };
    lens.map(room).collect()
}

/// Checks rows `[H, M, D]` of new tokens for a cache of so many heads; `M`.
pub(crate) fn new_rows<S: Storage>(
    (dtype, dim): (Dtype, u32),
    heads: usize,
    k: &Rows<'_, S>,
    v: &Rows<'_, S>,
) -> Result<u32> {
    for (what, rows) in [("new keys", k), ("new values", v)] {
        if rows.dtype() != dtype {
            return Err(Error::Dtype { what, expected: dtype, got: rows.dtype() });
        }
        expect("heads of new keys and values", heads, rows.heads())?;
        expect("head dim of new keys and values", dim as usize, rows.dim())?;
    }
    let new = k.len(0);
    for h in 0..heads {
        expect("new keys of a head", new, k.len(h))?;
        expect("new values of a head", new, v.len(h))?;
    }
    Ok(new as u32)
}

/// Where a head's positions are to be found.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Held<'a> {
    /// Slot `s` has position `s`, up to a length.
    Dense(usize),
    /// Slot `s` has the position listed at `s`; ascending.
    At(&'a [Position]),
}

impl<'a> Held<'a> {
    /// Slot of a position, no earlier than slot `from`.
    fn find(self, position: Position, from: usize) -> Option<usize> {
        match self {
            Held::Dense(len) => Some(position.index()).filter(|&s| s < len),
            Held::At(held) => {
                let slot = from + held[from..].iter().position(|&p| p >= position)?;
                (held[slot] == position).then_some(slot)
            }
        }
    }

    fn holds(self, position: Position, slot: usize) -> bool {
        match self {
            Held::Dense(_) => position.index() == slot,
            Held::At(held) => held.get(slot) == Some(&position),
        }
    }

    /// Whether `kept` ascends and all of it is held.
    pub(crate) fn check(self, head: usize, kept: &[Position], tokens: u32) -> Result<()> {
        let (layer, head) = (LayerId(0), KvHead(head as u32));
        let mut next = 0;
        for (i, &got) in kept.iter().enumerate() {
            if i > 0 && got <= kept[i - 1] {
                return Err(CheckError::Order { layer, head, previous: kept[i - 1], got }.into());
            }
            let Some(slot) = self.find(got, next) else {
                return Err(CheckError::NotHeld { layer, head, got, tokens }.into());
            };
            next = slot + 1;
        }
        Ok(())
    }

    /// The moves that bring entries `first..end` of `kept`, which was checked, to slots of the same numbers.
    pub(crate) fn moves(self, kept: &'a [Position], first: usize, end: usize) -> Moves<'a> {
        let from = match self {
            Held::At(held) if first > 0 => held.partition_point(|p| *p < kept[first]),
            _ => 0,
        };
        Moves { held: self, kept: &kept[..end], from, to: first }
    }
}

/// `rows` rows that go from consecutive slots to consecutive slots; `to <= from`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: usize,
}

/// Moves with the start of those that come so much later that their rows should be asked for: what is kept lies too far apart for
/// the machine to foresee. Within a long move it does.
pub(super) fn with_next(moves: Moves<'_>) -> impl Iterator<Item = (Move, Option<Move>)> {
    const AHEAD: usize = 8;
    const ROWS: usize = 8;
    let later = moves.clone().skip(AHEAD);
    let mut later = later.map(|m| Move { rows: m.rows.min(ROWS), ..m });
    moves.map(move |m| (m, later.next()))
}

/// Longest possible [`Move`]s, ascending.
#[derive(Clone)]
pub(crate) struct Moves<'a> {
    held: Held<'a>,
    kept: &'a [Position],
    from: usize,
    to: usize,
}

impl Iterator for Moves<'_> {
    type Item = Move;

    fn next(&mut self) -> Option<Move> {
        let run = &self.kept[self.to..];
        let (from, to) = (self.held.find(*run.first()?, self.from)?, self.to);
        let rows = (from..).zip(run).take_while(|&(s, &p)| self.held.holds(p, s)).count();
        self.from = from + rows;
        self.to += rows;
        Some(Move { from, to, rows })
    }
}

/// Applies moves in place, in order. `at` tells the row of a slot and how many follow it there in one piece.
///
/// Why it is safe: destinations do not come after sources, and both ascend. A write thus covers rows that
/// were read before, or that nobody keeps. Pages change nothing: the argument is about slots, and a table
/// lists no page twice.
pub(super) fn slide(
    bytes: &mut [u8],
    row: usize,
    moves: Moves<'_>,
    at: impl Fn(usize) -> (usize, usize),
) {
    let mut bytes = Streamed::new(bytes);
    for (m, next) in with_next(moves).skip_while(|(m, _)| m.from == m.to) {
        if let Some(next) = next {
            let start = at(next.from).0 * row;
            prefetch_all(bytes.bytes(), start..start + row * next.rows);
        }
        let mut done = 0;
        while done < m.rows {
            let (from, source_piece) = at(m.from + done);
            let (to, piece) = at(m.to + done);
            let rows = (m.rows - done).min(source_piece).min(piece);
            bytes.slide(from * row..(from + rows) * row, to * row);
            done += rows;
        }
    }
}

/// The shape check of this module.
pub(crate) fn expect(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected as u64, got: got as u64 })
}
