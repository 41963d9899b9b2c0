//! Operands to slots, each checked against the type its instruction gives it.

use super::body::{Binding, Decoder};
use super::op::{Address, NONE, Predicate};
use super::{Result, Special};
use crate::exec::alu::Ty;
use crate::exec::registers::Slot;
use crate::ptx::ast::{Kind, Operand, Type};

/// How strictly a register must fit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// The same size, and no mixing of integers with floats: arithmetic.
    Exact,
    /// At least as wide: `ld`, `st` and `cvt` may leave room.
    AtLeast,
}

/// A pointer or a full-width word.
pub(super) const B32: Type = Type { kind: Kind::Bits, bytes: 4 };
pub(super) const B64: Type = Type { kind: Kind::Bits, bytes: 8 };

impl Decoder<'_> {
    /// A source: register, literal, special register or a variable's address.
    pub(super) fn source(&mut self, operand: &Operand, want: Type, fit: Fit) -> Result<Slot> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Binding::Register(slot, has)) => {
                    self.fits(name, has, want, fit).map(|()| slot)
                }
                Some(binding) => self.address_of(binding, 0, want),
                None => self.special(name, want),
            },
            Operand::Offset(name, offset) => match self.lookup(name) {
                Some(Binding::Register(..)) | None => {
                    Err(self.wrong(&format!("a variable before `+`, got `{name}`")))
                }
                Some(binding) => self.address_of(binding, *offset, want),
            },
            Operand::Not(name) => Err(self.wrong(&format!("a register without `!`, got !{name}"))),
            _ => {
                let bits = self.literal(operand, want)?;
                Ok(self.constant(bits, want))
            }
        }
    }

    /// A destination register; `_` is a sink.
    pub(super) fn destination(&mut self, operand: &Operand, want: Type, fit: Fit) -> Result<Slot> {
        let Operand::Name(name) = operand else {
            return Err(self.wrong(&format!("a destination register, got {operand:?}")));
        };
        if name == "_" {
            return Ok(NONE);
        }
        match self.lookup(name) {
            Some(Binding::Register(slot, has)) => self.fits(name, has, want, fit).map(|()| slot),
            _ => Err(self.wrong(&format!("a declared register, got `{name}`"))),
        }
    }

    /// The declared type of a register operand.
    pub(super) fn register_type(&mut self, operand: &Operand) -> Option<Type> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Binding::Register(_, has)) => Some(has),
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn predicate(&mut self, operand: &Operand) -> Result<Predicate> {
        let (name, negate) = match operand {
            Operand::Name(name) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Int(value) => {
                return Ok(Predicate { slot: self.truth(), negate: *value == 0 });
            }
            _ => return Err(self.wrong(&format!("a predicate, got {operand:?}"))),
        };
        Ok(Predicate { slot: self.predicate_register(name)?, negate })
    }

    pub(super) fn predicate_register(&mut self, name: &str) -> Result<Slot> {
        match self.lookup(name) {
            Some(Binding::Register(slot, Type { kind: Kind::Predicate, .. })) => Ok(slot),
            _ if name == "_" => Ok(NONE),
            _ => Err(self.wrong(&format!("a predicate register, got `{name}`"))),
        }
    }

    /// `[base + offset]`. Shared addresses may be 32 or 64 bits wide, all others 64.
    pub(super) fn address(&mut self, operand: &Operand, shared: bool) -> Result<Address> {
        let Operand::Address(base, offset) = operand else {
            return Err(self.wrong(&format!("an address in brackets, got {operand:?}")));
        };
        let Some(name) = base else {
            return Ok(Address { base: NONE, wide: true, offset: *offset });
        };
        match self.lookup(name) {
            Some(Binding::Register(slot, has)) => {
                let wide = has.bytes == 8;
                let integer = !matches!(has.kind, Kind::Float | Kind::Predicate);
                if integer && (wide || (shared && has.bytes == 4)) {
                    return Ok(Address { base: slot, wide, offset: *offset });
                }
                Err(self.wrong(&format!("an address register, got `{name}` of {}", describe(has))))
            }
            Some(Binding::Variable(_) | Binding::Dynamic) => {
                let base = self.source(&Operand::Name(name.clone()), B64, Fit::Exact)?;
                Ok(Address { base, wide: true, offset: *offset })
            }
            Some(Binding::Shared(at) | Binding::Local(at) | Binding::Param(at)) => {
                Ok(Address { base: NONE, wide: true, offset: i64::from(at) + *offset })
            }
            None => Err(self.wrong(&format!("a declared name, got `{name}`"))),
        }
    }

    fn address_of(&mut self, binding: Binding, offset: i64, want: Type) -> Result<Slot> {
        if want.bytes < 4 || want.kind == Kind::Float {
            return Err(self.wrong("a register: an address does not fit here"));
        }
        Ok(match binding {
            Binding::Shared(at) | Binding::Local(at) | Binding::Param(at) => {
                self.constant((i64::from(at) + offset) as u64, want)
            }
            Binding::Variable(_) | Binding::Dynamic => self.placed(binding, offset, want),
            Binding::Register(slot, _) => slot,
        })
    }

    fn special(&mut self, name: &str, want: Type) -> Result<Slot> {
        let axis = |axis: &str| ["x", "y", "z"].iter().position(|a| *a == axis).map(|a| a as u8);
        let (base, part) = name.split_once('.').unwrap_or((name, ""));
        let special = match (base, axis(part)) {
            ("%tid", Some(a)) => Special::Tid(a),
            ("%ntid", Some(a)) => Special::Ntid(a),
            ("%ctaid", Some(a)) => Special::Ctaid(a),
            ("%nctaid", Some(a)) => Special::Nctaid(a),
            ("%laneid", _) => Special::LaneId,
            ("%warpid", _) => Special::WarpId,
            ("%nwarpid", _) => Special::NumWarps,
            ("%smid", _) => Special::SmId,
            ("%nsmid", _) => Special::NumSms,
            ("%gridid", _) => Special::GridId,
            ("%lanemask_eq", _) => Special::LaneMask(0),
            ("%lanemask_le", _) => Special::LaneMask(1),
            ("%lanemask_lt", _) => Special::LaneMask(2),
            ("%lanemask_ge", _) => Special::LaneMask(3),
            ("%lanemask_gt", _) => Special::LaneMask(4),
            ("%dynamic_smem_size", _) => Special::DynamicShared,
            ("%total_smem_size", _) => Special::TotalShared,
            _ => {
                return Err(
                    self.wrong(&format!("a declared name or known special register, got `{name}`"))
                );
            }
        };
        self.fits(name, Type { kind: Kind::Unsigned, bytes: 4 }, want, Fit::Exact)?;
        Ok(self.special_slot(special))
    }

    fn fits(&self, name: &str, has: Type, want: Type, fit: Fit) -> Result<()> {
        let float = |t: Type| t.kind == Kind::Float;
        let typed = |t: Type| t.kind != Kind::Bits;
        let kinds = match fit {
            Fit::Exact => !(typed(has) && typed(want)) || float(has) == float(want),
            // A 16-bit float is held in an untyped register or one of its own.
            Fit::AtLeast => true,
        };
        let predicates = (has.kind == Kind::Predicate) == (want.kind == Kind::Predicate);
        let size =
            if fit == Fit::Exact { has.bytes == want.bytes } else { has.bytes >= want.bytes };
        if kinds && predicates && size {
            return Ok(());
        }
        Err(self.wrong(&format!(
            "a register of {}, got `{name}` of {}",
            describe(want),
            describe(has)
        )))
    }

    /// The bits of a literal.
    fn literal(&self, operand: &Operand, want: Type) -> Result<u64> {
        let float = want.kind == Kind::Float;
        let integer = matches!(want.kind, Kind::Signed | Kind::Unsigned);
        Ok(match (operand, want.bytes) {
            (Operand::Int(value), _) if !float => *value as u64,
            (Operand::F32(bits), 4) if !integer => u64::from(*bits),
            (Operand::F64(bits), 8) if !integer => *bits,
            (Operand::F64(bits), 4) if float => u64::from((f64::from_bits(*bits) as f32).to_bits()),
            (Operand::F32(bits), 8) if float => f64::from(f32::from_bits(*bits)).to_bits(),
            _ => {
                return Err(
                    self.wrong(&format!("a literal of {}, got {operand:?}", describe(want)))
                );
            }
        })
    }
}

/// The register type of an operand type. Packed and 16-bit floats are also held in untyped registers.
pub(super) fn declared(ty: Ty) -> Type {
    let kind = match ty {
        Ty::Pred => Kind::Predicate,
        Ty::F16 | Ty::BF16 | Ty::F32 | Ty::F64 => Kind::Float,
        Ty::U8 | Ty::U16 | Ty::U32 | Ty::U64 => Kind::Unsigned,
        Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64 => Kind::Signed,
        _ => Kind::Bits,
    };
    Type { kind, bytes: ty.bits().div_ceil(8) }
}

/// `.f32` for messages.
pub(super) fn describe(t: Type) -> String {
    let kind = match t.kind {
        Kind::Predicate => return ".pred".to_owned(),
        Kind::Bits => 'b',
        Kind::Signed => 's',
        Kind::Unsigned => 'u',
        Kind::Float => 'f',
    };
    format!(".{kind}{}", t.bytes * 8)
}
