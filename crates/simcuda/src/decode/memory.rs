//! Decoding of loads, stores, atomics, fences, `cp.async` and `ldmatrix`: qualifiers are a set of words whose order
//! the grammar fixes and we need not.

use super::Result;
use super::body::{Binding, Decoder};
use super::op::{Elements, NONE, Op, Rmw, Semantics, Space, Word};
use super::operands::{B32, Fit};
use crate::memory::Scope;
use crate::ptx::ast::{Instruction, Kind, Operand, Type};

/// What the modifiers of a memory instruction say.
struct Qualifiers {
    space: Space,
    semantics: Semantics,
    vector: u8,
    ty: Option<Type>,
    ty_name: String,
    non_coherent: bool,
    /// What none of the above took.
    rest: Vec<String>,
}

impl Decoder<'_> {
    pub(super) fn memory(&mut self, base: &str, i: &Instruction) -> Result<Op> {
        match base {
            "ld" | "ldu" => self.load(i),
            "st" => self.store(i),
            "atom" | "red" => self.atomic(i, base == "atom"),
            "ldmatrix" => self.ldmatrix(i),
            "cp" => self.cp_async(i),
            _ => self.fence(i),
        }
    }

    fn qualifiers(&self, i: &Instruction) -> Qualifiers {
        let mut q = Qualifiers {
            space: Space::Generic,
            semantics: Semantics::WEAK,
            vector: 1,
            ty: None,
            ty_name: String::new(),
            non_coherent: false,
            rest: Vec::new(),
        };
        let mut scope = None;
        let mut strong = false;
        for word in i.opcode.split('.').skip(1) {
            match word {
                "global" => q.space = Space::Global,
                "shared" | "shared::cta" => q.space = Space::Shared,
                "local" => q.space = Space::Local,
                "const" => q.space = Space::Const,
                "param" => q.space = Space::Param,
                "v2" => q.vector = 2,
                "v4" => q.vector = 4,
                "nc" => q.non_coherent = true,
                "volatile" => {
                    strong = true;
                    scope = scope.or(Some(Scope::Device));
                }
                "relaxed" => strong = true,
                "acquire" => (strong, q.semantics.acquire) = (true, true),
                "release" => (strong, q.semantics.release) = (true, true),
                "acq_rel" => {
                    (strong, q.semantics.acquire, q.semantics.release) = (true, true, true);
                }
                "cta" => scope = Some(Scope::Block),
                "gpu" | "sys" => scope = Some(Scope::Device),
                // Cache hints and the default: nothing to observe.
                "weak"
                | "ca"
                | "cg"
                | "cs"
                | "lu"
                | "cv"
                | "wb"
                | "wt"
                | "L1::evict_last"
                | "L1::evict_first"
                | "L1::evict_normal"
                | "L1::evict_unchanged"
                | "L1::no_allocate"
                | "L2::64B"
                | "L2::128B"
                | "L2::256B" => {}
                _ => match Type::parse(word) {
                    Some(ty) if word != "pred" => {
                        q.ty = Some(ty);
                        word.clone_into(&mut q.ty_name);
                    }
                    _ => q.rest.push(word.to_owned()),
                },
            }
        }
        if strong {
            q.semantics.scope = Some(scope.unwrap_or(Scope::Device));
        }
        q
    }

    fn element(&self, q: &Qualifiers, i: &Instruction) -> Result<Type> {
        match (q.ty, q.rest.first()) {
            (_, Some(word)) => {
                Err(self.unsupported(&format!("the modifier `.{word}` of `{}`", i.opcode)))
            }
            (None, _) => Err(self.wrong("a type in the opcode")),
            (Some(ty), None) => Ok(ty),
        }
    }

    /// Parameters of inlined calls live in local memory.
    fn actual_space(&mut self, space: Space, operand: &Operand) -> Space {
        let Operand::Address(Some(name), _) = operand else { return space };
        match self.lookup(name) {
            Some(Binding::Local(_)) if space == Space::Param => Space::Local,
            // A generic access that names its variable.
            Some(Binding::Local(_)) if space == Space::Generic => Space::Local,
            Some(Binding::Shared(_) | Binding::Dynamic) if space == Space::Generic => Space::Shared,
            Some(Binding::Param(_)) if space == Space::Generic => Space::Param,
            _ => space,
        }
    }

    fn elements(
        &mut self,
        operand: &Operand,
        ty: Type,
        count: u8,
        write: bool,
    ) -> Result<Elements> {
        let list = match operand {
            Operand::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        if list.len() != usize::from(count) {
            return Err(self.wrong(&format!("{count} registers, got {}", list.len())));
        }
        let mut slots = [NONE; 4];
        let mut wide = None;
        for (slot, operand) in slots.iter_mut().zip(list) {
            let has = self.register_type(operand);
            // An access of 8 or 16 bits may name a 32- or 64-bit register; a float must not be an integer's.
            let want = has.map_or(ty, |has| Type {
                bytes: ty.bytes.max(1),
                kind: if has.bytes == ty.bytes { ty.kind } else { Kind::Bits },
            });
            *slot = match write {
                true => self.destination(operand, want, Fit::AtLeast)?,
                false => self.source(operand, want, Fit::AtLeast)?,
            };
            let bytes = has.map_or(ty.bytes, |t| t.bytes);
            if has.is_some_and(|h| {
                (h.kind == Kind::Float) != (ty.kind == Kind::Float)
                    && h.kind != Kind::Bits
                    && ty.kind != Kind::Bits
            }) {
                return Err(self.wrong(&format!("registers that fit the type, got {operand:?}")));
            }
            if *slot != NONE {
                if wide.is_some_and(|w| w != (bytes == 8)) {
                    return Err(self.wrong("registers of one width"));
                }
                wide = Some(bytes == 8);
            }
        }
        Ok(Elements {
            slots,
            count,
            bytes: ty.bytes as u8,
            signed: ty.kind == Kind::Signed,
            wide: wide.unwrap_or(ty.bytes == 8),
        })
    }

    fn load(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let q = self.qualifiers(i);
        let ty = self.element(&q, i)?;
        let space = self.actual_space(q.space, &i.operands[1]);
        Ok(Op::Load {
            space,
            address: self.address(&i.operands[1], space == Space::Shared)?,
            to: self.elements(&i.operands[0], ty, q.vector, true)?,
            semantics: q.semantics,
            non_coherent: q.non_coherent,
        })
    }

    fn store(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let q = self.qualifiers(i);
        let ty = self.element(&q, i)?;
        let space = self.actual_space(q.space, &i.operands[0]);
        if matches!(space, Space::Const | Space::Param) {
            return Err(self.wrong("a writable state space"));
        }
        Ok(Op::Store {
            space,
            address: self.address(&i.operands[0], space == Space::Shared)?,
            from: self.elements(&i.operands[1], ty, q.vector, false)?,
            semantics: q.semantics,
        })
    }

    fn atomic(&mut self, i: &Instruction, returns: bool) -> Result<Op> {
        let mut q = self.qualifiers(i);
        let rmw = q.rest.iter().find_map(|w| rmw(w));
        q.rest.retain(|w| self::rmw(w).is_none() && w != "noftz");
        let ty = self.element(&q, i)?;
        let rmw = rmw.ok_or_else(|| self.wrong("an operation such as `.add`"))?;
        let word = match q.ty_name.as_str() {
            "u32" | "b32" => Word::U32,
            "s32" => Word::S32,
            "u64" | "b64" => Word::U64,
            "s64" => Word::S64,
            "f32" => Word::F32,
            "f64" => Word::F64,
            "f16x2" => Word::F16x2,
            "bf16x2" => Word::Bf16x2,
            _ => return Err(self.unsupported(&format!("the instruction `{}`", i.opcode))),
        };
        let float = matches!(word, Word::F32 | Word::F64 | Word::F16x2 | Word::Bf16x2);
        let counts = matches!(rmw, Rmw::Inc | Rmw::Dec);
        if (float && rmw != Rmw::Add) || (counts && word != Word::U32) {
            return Err(self.unsupported(&format!("the instruction `{}`", i.opcode)));
        }
        let first = usize::from(returns);
        let operands = first + 2 + usize::from(rmw == Rmw::Cas);
        self.count(i, operands..=operands)?;
        if !matches!(q.space, Space::Generic | Space::Global | Space::Shared) {
            return Err(self.wrong("global or shared memory"));
        }
        let space = self.actual_space(q.space, &i.operands[first]);
        // Atomics without a qualifier are relaxed.
        let scope = q.semantics.scope.or_else(|| {
            let cta = i.opcode.split('.').any(|w| w == "cta");
            Some(if cta { Scope::Block } else { Scope::Device })
        });
        Ok(Op::Atomic {
            space,
            rmw,
            word,
            dst: if returns { self.destination(&i.operands[0], ty, Fit::Exact)? } else { NONE },
            address: self.address(&i.operands[first], space == Space::Shared)?,
            b: self.source(&i.operands[first + 1], ty, Fit::Exact)?,
            c: if rmw == Rmw::Cas {
                self.source(&i.operands[first + 2], ty, Fit::Exact)?
            } else {
                NONE
            },
            semantics: Semantics { scope, ..q.semantics },
        })
    }

    /// `membar.gl`, `fence.acq_rel.gpu`, …
    fn fence(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 0..=0)?;
        let scope = match i.opcode.as_str() {
            "membar.cta" | "fence.sc.cta" | "fence.acq_rel.cta" => Scope::Block,
            "membar.gl" | "membar.sys" | "fence.sc.gpu" | "fence.sc.sys" | "fence.acq_rel.gpu"
            | "fence.acq_rel.sys" | "fence.sc" | "fence.acq_rel" => Scope::Device,
            _ => return Err(self.unsupported(&format!("the instruction `{}`", i.opcode))),
        };
        Ok(Op::Fence(scope))
    }

    fn cp_async(&mut self, i: &Instruction) -> Result<Op> {
        let groups = |operand: Option<&Operand>| match operand {
            Some(Operand::Int(n)) => u32::try_from(*n).ok(),
            _ => None,
        };
        match i.opcode.as_str() {
            "cp.async.commit_group" => return self.count(i, 0..=0).map(|()| Op::CpCommit),
            "cp.async.wait_all" => return self.count(i, 0..=0).map(|()| Op::CpWait(None)),
            "cp.async.wait_group" => {
                let n =
                    groups(i.operands.first()).ok_or_else(|| self.wrong("a number of groups"))?;
                return Ok(Op::CpWait(Some(n)));
            }
            _ => {}
        }
        let mut words = i.opcode.split('.').skip(1);
        let known = words.next() == Some("async")
            && matches!(words.next(), Some("ca" | "cg"))
            && matches!(words.next(), Some("shared" | "shared::cta"))
            && words.next() == Some("global")
            && words.all(|w| matches!(w, "L2::64B" | "L2::128B" | "L2::256B"));
        if !known {
            return Err(self.unsupported(&format!("the instruction `{}`", i.opcode)));
        }
        self.count(i, 3..=4)?;
        let bytes = groups(i.operands.get(2)).filter(|b| matches!(b, 4 | 8 | 16));
        let bytes = bytes.ok_or_else(|| self.wrong("a size of 4, 8 or 16 bytes"))?;
        if i.opcode.contains(".cg.") && bytes != 16 {
            return Err(self.wrong("16 bytes with .cg"));
        }
        Ok(Op::CpAsync {
            dst: self.address(&i.operands[0], true)?,
            src: self.address(&i.operands[1], false)?,
            bytes: bytes as u8,
            size: match i.operands.get(3) {
                Some(size) => self.source(size, B32, Fit::Exact)?,
                None => NONE,
            },
        })
    }

    fn ldmatrix(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let mut count = 0;
        let (mut transposed, mut space) = (false, Space::Generic);
        for word in i.opcode.split('.').skip(1) {
            match word {
                "sync" | "aligned" | "m8n8" | "b16" => {}
                "x1" => count = 1,
                "x2" => count = 2,
                "x4" => count = 4,
                "trans" => transposed = true,
                "shared" | "shared::cta" => space = Space::Shared,
                _ => return Err(self.unsupported(&format!("the instruction `{}`", i.opcode))),
            }
        }
        let to = self.elements(&i.operands[0], B32, count, true)?;
        let address = self.address(&i.operands[1], true)?;
        Ok(Op::LdMatrix { dst: to.slots, count, transposed, address, space })
    }
}

fn rmw(word: &str) -> Option<Rmw> {
    Some(match word {
        "add" => Rmw::Add,
        "min" => Rmw::Min,
        "max" => Rmw::Max,
        "and" => Rmw::And,
        "or" => Rmw::Or,
        "xor" => Rmw::Xor,
        "exch" => Rmw::Exch,
        "cas" => Rmw::Cas,
        "inc" => Rmw::Inc,
        "dec" => Rmw::Dec,
        _ => return None,
    })
}
