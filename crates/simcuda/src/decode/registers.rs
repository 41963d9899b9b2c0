//! Decoding of what needs nothing but registers: table entries, comparisons, moves and address conversions.

use super::Result;
use super::body::Decoder;
use super::op::{Logic, NONE, Op, Space};
use super::operands::{B32, B64, Fit, declared};
use crate::exec::alu::{Alu, Ty};
use crate::exec::registers::Slot;
use crate::ptx::ast::{Instruction, Kind, Operand, Type};

impl Decoder<'_> {
    pub(super) fn alu(&mut self, i: &Instruction) -> Result<Op> {
        let alu = Alu::parse(&i.opcode)
            .ok_or_else(|| self.unsupported(&format!("the instruction `{}`", i.opcode)))?;
        let signature = alu.signature();
        self.count(i, signature.sources.len() + 1..=signature.sources.len() + 1)?;
        if i.opcode.starts_with("cvt.") {
            return self.cvt(i, alu);
        }
        let fit = Fit::Exact;
        let dst = if signature.destination == Ty::Pred {
            match &i.operands[0] {
                Operand::Name(name) => self.predicate_register(name)?,
                other => return Err(self.wrong(&format!("a predicate, got {other:?}"))),
            }
        } else {
            self.destination(&i.operands[0], declared(signature.destination), fit)?
        };
        if dst == NONE {
            return Ok(Op::Nop);
        }
        let src = self.sources(alu, &i.operands[1..], fit)?;
        Ok(Op::Alu { alu, dst, src })
    }

    /// `cvt` takes registers wider than its types. Up to 32 bits a row holds both alike; a 64-bit register is cut or
    /// extended on the way.
    fn cvt(&mut self, i: &Instruction, alu: Alu) -> Result<Op> {
        let signature = alu.signature();
        let unary = |form: &str, dst: Slot, src: Slot| {
            let alu = Alu::parse(form).expect("a conversion between integers");
            Op::Alu { alu, dst, src: [src, NONE, NONE, NONE] }
        };
        let wide = |ty: Option<Type>| ty.is_some_and(|ty| ty.bytes == 8);
        let guard = self.guard(i)?;
        let mut src = self.sources(alu, &i.operands[1..], Fit::AtLeast)?;
        for ((src, ty), operand) in src.iter_mut().zip(signature.sources).zip(&i.operands[1..]) {
            if ty.bits() < 64 && wide(self.register_type(operand)) {
                let narrow = self.register(B32);
                self.emit(unary("cvt.u32.u64", narrow, *src), &guard)?;
                *src = narrow;
            }
        }
        let want = declared(signature.destination);
        let dst = self.destination(&i.operands[0], want, Fit::AtLeast)?;
        if dst == NONE {
            return Ok(Op::Nop);
        }
        if want.bytes < 8 && wide(self.register_type(&i.operands[0])) {
            let narrow = self.register(B32);
            self.emit(Op::Alu { alu, dst: narrow, src }, &guard)?;
            let extend = if want.kind == Kind::Signed { "cvt.s64.s32" } else { "cvt.u64.u32" };
            return Ok(unary(extend, dst, narrow));
        }
        Ok(Op::Alu { alu, dst, src })
    }

    fn sources(&mut self, alu: Alu, operands: &[Operand], fit: Fit) -> Result<[Slot; 4]> {
        let mut src = [NONE; 4];
        for ((slot, operand), ty) in src.iter_mut().zip(operands).zip(alu.signature().sources) {
            *slot = if *ty == Ty::Pred {
                let p = self.predicate(operand)?;
                if p.negate { self.negated(p.slot)? } else { p.slot }
            } else {
                self.source(operand, declared(*ty), fit)?
            };
        }
        Ok(src)
    }

    /// A predicate register that holds the opposite.
    fn negated(&mut self, slot: Slot) -> Result<Slot> {
        let dst = self.register(Type { kind: Kind::Predicate, bytes: 1 });
        let alu = Alu::parse("not.pred").ok_or_else(|| self.unsupported("`not.pred`"))?;
        self.emit(Op::Alu { alu, dst, src: [slot, NONE, NONE, NONE] }, &None)?;
        Ok(dst)
    }

    /// `setp.lt{.and}.f32 p{|q}, a, b{, {!}c}`.
    pub(super) fn setp(&mut self, i: &Instruction) -> Result<Op> {
        let mut parts: Vec<&str> = i.opcode.split('.').collect();
        let logic = match parts.get(2) {
            Some(&"and") => Some(Logic::And),
            Some(&"or") => Some(Logic::Or),
            Some(&"xor") => Some(Logic::Xor),
            _ => None,
        };
        if logic.is_some() {
            parts.remove(2);
        }
        let alu = Alu::parse(&parts.join("."))
            .ok_or_else(|| self.unsupported(&format!("the instruction `{}`", i.opcode)))?;
        let operands = 3 + usize::from(logic.is_some());
        self.count(i, operands..=operands)?;
        let (dst, inverse) = match &i.operands[0] {
            Operand::Name(p) => (self.predicate_register(p)?, NONE),
            Operand::Pair(p, q) => (self.predicate_register(p)?, self.predicate_register(q)?),
            other => return Err(self.wrong(&format!("a predicate, got {other:?}"))),
        };
        let src = self.sources(alu, &i.operands[1..3], Fit::Exact)?;
        if logic.is_none() && inverse == NONE && dst != NONE {
            return Ok(Op::Alu { alu, dst, src });
        }
        let combine = match logic {
            Some(logic) => Some((logic, self.predicate(&i.operands[3])?)),
            None => None,
        };
        Ok(Op::Compare { alu, src, dst, inverse, combine })
    }

    pub(super) fn mov(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let ty = i.opcode.strip_prefix("mov.").and_then(Type::parse);
        let ty = ty.ok_or_else(|| self.unsupported(&format!("the instruction `{}`", i.opcode)))?;
        match (&i.operands[0], &i.operands[1]) {
            (dst, Operand::Vector(parts)) => {
                let (parts, count, bytes) = self.parts(parts, ty, false)?;
                Ok(Op::Pack { dst: self.destination(dst, ty, Fit::Exact)?, parts, count, bytes })
            }
            (Operand::Vector(parts), src) => {
                let (parts, count, bytes) = self.parts(parts, ty, true)?;
                Ok(Op::Unpack { src: self.source(src, ty, Fit::Exact)?, parts, count, bytes })
            }
            (dst, Operand::Name(name))
                if name == "%clock" || name == "%clock64" || name == "%globaltimer" =>
            {
                let want = if name == "%clock" { B32 } else { B64 };
                Ok(Op::Clock { dst: self.destination(dst, want, Fit::Exact)?, wide: want == B64 })
            }
            _ => self.alu(i),
        }
    }

    fn parts(
        &mut self,
        parts: &[Operand],
        whole: Type,
        write: bool,
    ) -> Result<([Slot; 4], u8, u8)> {
        let part = Type { kind: Kind::Bits, bytes: whole.bytes / parts.len().max(1) as u32 };
        if !matches!(parts.len(), 2 | 4) || part.bytes < 1 {
            return Err(self.wrong(&format!("two or four parts, got {}", parts.len())));
        }
        let mut slots = [NONE; 4];
        for (slot, operand) in slots.iter_mut().zip(parts) {
            *slot = match write {
                true => self.destination(operand, part, Fit::Exact)?,
                false => self.source(operand, part, Fit::Exact)?,
            };
        }
        Ok((slots, parts.len() as u8, part.bytes as u8))
    }

    fn space(&self, name: &str) -> Result<Space> {
        Ok(match name {
            "global" => Space::Global,
            "const" => Space::Const,
            "shared" | "shared::cta" => Space::Shared,
            "local" => Space::Local,
            "param" => Space::Param,
            _ => return Err(self.unsupported(&format!("state space `{name}`"))),
        })
    }

    pub(super) fn cvta(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let mut parts: Vec<&str> = i.opcode.split('.').skip(1).collect();
        let to = parts.first() == Some(&"to");
        if to {
            parts.remove(0);
        }
        let [space, ty] = parts[..] else {
            return Err(self.unsupported(&format!("the instruction `{}`", i.opcode)));
        };
        let ty = if ty == "u64" { B64 } else { B32 };
        Ok(Op::Convert {
            dst: self.destination(&i.operands[0], ty, Fit::Exact)?,
            src: self.source(&i.operands[1], ty, Fit::Exact)?,
            space: self.space(space)?,
            to,
            wide: ty == B64,
        })
    }

    pub(super) fn isspacep(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let space = self.space(i.opcode.strip_prefix("isspacep.").unwrap_or_default())?;
        let dst = self.predicate(&i.operands[0])?.slot;
        Ok(Op::IsSpace { dst, src: self.source(&i.operands[1], B64, Fit::Exact)?, space })
    }
}
