//! Decoding of barriers, warp operations and `mma`.

use super::Result;
use super::body::Decoder;
use super::op::{BarrierKind, Logic, NONE, Op, Rmw, Shuffle, Vote};
use super::operands::{B32, B64, Fit};
use crate::exec::registers::Slot;
use crate::num::mma::MmaKind;
use crate::ptx::ast::{Instruction, Kind, Operand, Type};

impl Decoder<'_> {
    pub(super) fn warp(&mut self, base: &str, i: &Instruction) -> Result<Op> {
        match base {
            "shfl" => self.shfl(i),
            "vote" => self.vote(i),
            "match" => self.match_(i),
            "redux" => self.redux(i),
            "activemask" => {
                self.count(i, 1..=1)?;
                Ok(Op::ActiveMask { dst: self.destination(&i.operands[0], B32, Fit::Exact)? })
            }
            "mma" => self.mma(i),
            _ => self.barrier(i),
        }
    }

    fn unknown<T>(&self, i: &Instruction) -> Result<T> {
        Err(self.unsupported(&format!("the instruction `{}`", i.opcode)))
    }

    fn barrier(&mut self, i: &Instruction) -> Result<Op> {
        let words: Vec<&str> =
            i.opcode.split('.').skip(1).filter(|w| !matches!(*w, "cta" | "aligned")).collect();
        let (kind, operands) = match words[..] {
            ["warp", "sync"] => {
                self.count(i, 1..=1)?;
                return Ok(Op::WarpBarrier { mask: self.source(&i.operands[0], B32, Fit::Exact)? });
            }
            ["sync"] => (BarrierKind::Sync, &i.operands[..]),
            ["arrive"] => (BarrierKind::Arrive, &i.operands[..]),
            ["red", op, ty] => {
                self.count(i, 3..=4)?;
                let (last, rest) = i.operands[1..].split_last().expect("three or four operands");
                let predicate = self.predicate(last)?;
                let kind = match (op, ty) {
                    ("popc", "u32") => BarrierKind::Popc(
                        self.destination(&i.operands[0], B32, Fit::Exact)?,
                        predicate,
                    ),
                    ("and" | "or", "pred") => {
                        let logic = if op == "and" { Logic::And } else { Logic::Or };
                        BarrierKind::Reduce(logic, self.predicate(&i.operands[0])?.slot, predicate)
                    }
                    _ => return self.unknown(i),
                };
                (kind, rest)
            }
            _ => return self.unknown(i),
        };
        if operands.is_empty() || operands.len() > 2 {
            return Err(
                self.wrong(&format!("a barrier and perhaps a count, got {}", operands.len()))
            );
        }
        let id = self.source(&operands[0], B32, Fit::Exact)?;
        let count = match operands.get(1) {
            Some(count) => self.source(count, B32, Fit::Exact)?,
            None if matches!(kind, BarrierKind::Arrive) => {
                return Err(self.wrong("a thread count with `arrive`"));
            }
            None => NONE,
        };
        Ok(Op::Barrier { kind, id, count })
    }

    /// A destination, and the predicate after `|` if there is one.
    fn pair(&mut self, operand: &Operand) -> Result<(Slot, Slot)> {
        match operand {
            Operand::Pair(d, p) => {
                let dst = self.destination(&Operand::Name(d.clone()), B32, Fit::Exact)?;
                Ok((dst, self.predicate_register(p)?))
            }
            one => Ok((self.destination(one, B32, Fit::Exact)?, NONE)),
        }
    }

    fn shfl(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 5..=5)?;
        let mode = match i.opcode.as_str() {
            "shfl.sync.up.b32" => Shuffle::Up,
            "shfl.sync.down.b32" => Shuffle::Down,
            "shfl.sync.bfly.b32" => Shuffle::Bfly,
            "shfl.sync.idx.b32" => Shuffle::Idx,
            _ => return self.unknown(i),
        };
        let (dst, valid) = self.pair(&i.operands[0])?;
        Ok(Op::Shuffle {
            mode,
            dst,
            valid,
            src: self.source(&i.operands[1], B32, Fit::Exact)?,
            lane: self.source(&i.operands[2], B32, Fit::Exact)?,
            clamp: self.source(&i.operands[3], B32, Fit::Exact)?,
            mask: self.source(&i.operands[4], B32, Fit::Exact)?,
        })
    }

    fn vote(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 3..=3)?;
        let vote = match i.opcode.as_str() {
            "vote.sync.all.pred" => Vote::All,
            "vote.sync.any.pred" => Vote::Any,
            "vote.sync.uni.pred" => Vote::Uni,
            "vote.sync.ballot.b32" => Vote::Ballot,
            _ => return self.unknown(i),
        };
        let dst = match vote {
            Vote::Ballot => self.destination(&i.operands[0], B32, Fit::Exact)?,
            _ => self.predicate(&i.operands[0])?.slot,
        };
        let src = self.predicate(&i.operands[1])?;
        Ok(Op::Vote { vote, dst, src, mask: self.source(&i.operands[2], B32, Fit::Exact)? })
    }

    fn match_(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 3..=3)?;
        let (all, wide) = match i.opcode.as_str() {
            "match.any.sync.b32" => (false, false),
            "match.any.sync.b64" => (false, true),
            "match.all.sync.b32" => (true, false),
            "match.all.sync.b64" => (true, true),
            _ => return self.unknown(i),
        };
        let (dst, valid) = self.pair(&i.operands[0])?;
        let src = self.source(&i.operands[1], if wide { B64 } else { B32 }, Fit::Exact)?;
        let mask = self.source(&i.operands[2], B32, Fit::Exact)?;
        Ok(Op::Match { all, dst, valid, src, wide, mask })
    }

    fn redux(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 3..=3)?;
        let words: Vec<&str> = i.opcode.split('.').collect();
        let ["redux", "sync", op, ty] = words[..] else { return self.unknown(i) };
        let (rmw, signed) = match (op, ty) {
            ("add", "u32" | "s32") => (Rmw::Add, false),
            ("min", "u32" | "s32") => (Rmw::Min, ty == "s32"),
            ("max", "u32" | "s32") => (Rmw::Max, ty == "s32"),
            ("and", "b32") => (Rmw::And, false),
            ("or", "b32") => (Rmw::Or, false),
            ("xor", "b32") => (Rmw::Xor, false),
            _ => return self.unknown(i),
        };
        Ok(Op::Redux {
            rmw,
            signed,
            dst: self.destination(&i.operands[0], B32, Fit::Exact)?,
            src: self.source(&i.operands[1], B32, Fit::Exact)?,
            mask: self.source(&i.operands[2], B32, Fit::Exact)?,
        })
    }

    fn mma(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 4..=4)?;
        let kind = match i.opcode.as_str() {
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => MmaKind::BF16,
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" => MmaKind::F16,
            _ => return self.unknown(i),
        };
        let float = Type { kind: Kind::Float, bytes: 4 };
        Ok(Op::Mma {
            kind,
            d: self.fragment(&i.operands[0], float, true)?,
            a: self.fragment(&i.operands[1], B32, false)?,
            b: self.fragment(&i.operands[2], B32, false)?,
            c: self.fragment(&i.operands[3], float, false)?,
        })
    }

    fn fragment<const N: usize>(
        &mut self,
        operand: &Operand,
        ty: Type,
        write: bool,
    ) -> Result<[Slot; N]> {
        let Operand::Vector(parts) = operand else {
            return Err(self.wrong(&format!("a fragment in braces, got {operand:?}")));
        };
        if parts.len() != N {
            return Err(self.wrong(&format!("a fragment of {N} registers, got {}", parts.len())));
        }
        let mut slots = [NONE; N];
        for (slot, part) in slots.iter_mut().zip(parts) {
            *slot = match write {
                true => self.destination(part, ty, Fit::Exact)?,
                false => self.source(part, ty, Fit::Exact)?,
            };
        }
        Ok(slots)
    }
}
