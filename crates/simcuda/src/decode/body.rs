//! Function bodies: scopes, registers, labels, inlined calls, and the instructions that are not memory or warp
//! operations.

use std::collections::HashMap;

use super::op::{Builtin, Inst, Logic, NONE, Op, Predicate, Space};
use super::operands::{B32, B64, Fit, declared};
use super::{Code, Constant, Result, Shared, Special, dynamic_start};
use crate::exec::alu::{Alu, Ty};
use crate::exec::registers::Slot;
use crate::ptx::LoadError;
use crate::ptx::ast::{
    File, Function, Instruction, Kind, Operand, Place, Space as Declared, Statement, Type, Variable,
};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binding {
    Register(Slot, Type),
    /// Offset in the simulated shared memory.
    Shared(u32),
    /// Dynamic shared memory.
    Dynamic,
    /// Offset in a thread's local memory; parameters of inlined calls live there too.
    Local(u32),
    /// Offset in the kernel's parameters.
    Param(u32),
    /// A module variable.
    Variable(usize),
}

/// A function being decoded, or one inlined into it.
struct Frame {
    labels: HashMap<String, u32>,
    /// Branches to patch: instruction, label, line.
    branches: Vec<(usize, String, u32)>,
    /// Returns to patch, if inlined.
    returns: Vec<usize>,
    inlined: bool,
    name: String,
}

pub(super) struct Decoder<'a> {
    file: &'a File,
    lines: &'a [&'a str],
    scopes: Vec<HashMap<String, Binding>>,
    frames: Vec<Frame>,
    code: Code,
    shared: Shared,
    constants: HashMap<(u64, bool, Option<Anchor>), Slot>,
    truth: Option<Slot>,
    dynamic: Vec<Slot>,
    place: Place,
}

/// What a constant's address depends on: a module variable, or (None) the dynamic shared memory.
type Anchor = Option<usize>;

/// Decodes an entry. `text` is the PTX, for reports.
pub fn decode(file: &File, function: &Function, lines: &[&str]) -> Result<(Code, Shared)> {
    let code = Code {
        insts: Vec::new(),
        places: Vec::new(),
        texts: Vec::new(),
        rows: 0,
        predicates: 0,
        truth: None,
        constants: Vec::new(),
        specials: Vec::new(),
        shared: Vec::new(),
        shared_end: 0,
        local_bytes: 0,
        sources: file.sources.iter().cloned().collect(),
    };
    let mut decoder = Decoder {
        file,
        lines,
        scopes: vec![HashMap::new()],
        frames: Vec::new(),
        code,
        shared: Shared::new(),
        constants: HashMap::new(),
        truth: None,
        dynamic: Vec::new(),
        place: Place { line: function.line, source: (0, 0) },
    };
    for (i, v) in file.variables.iter().enumerate() {
        let binding = match v.space {
            Declared::Global | Declared::Const => Binding::Variable(i),
            Declared::Shared if v.bytes == 0 => Binding::Dynamic,
            // Placed when first named: a kernel pays only for what it uses.
            Declared::Shared => continue,
            Declared::Local | Declared::Param => {
                return Err(decoder.wrong(&format!("`{}` inside a function", v.name)));
            }
        };
        decoder.scopes[0].insert(v.name.clone(), binding);
    }
    let mut offset = 0u32;
    for p in &function.params {
        offset = offset.next_multiple_of(p.align);
        decoder.scopes[0].insert(p.name.clone(), Binding::Param(offset));
        offset += p.bytes;
    }
    decoder.function(function, false)?;
    decoder.emit(Op::Exit, &None)?;
    let mut code = decoder.code;
    let start = dynamic_start(&decoder.shared);
    for c in &mut code.constants {
        if decoder.dynamic.contains(&c.slot) {
            c.bits += u64::from(start);
        }
    }
    code.shared.clone_from(&decoder.shared.ranges);
    code.shared_end = start;
    Ok((code, decoder.shared))
}

impl Decoder<'_> {
    fn function(&mut self, function: &Function, inlined: bool) -> Result<()> {
        let body = function.body.as_ref().expect("callers look for a body");
        self.frames.push(Frame {
            labels: HashMap::new(),
            branches: Vec::new(),
            returns: Vec::new(),
            inlined,
            name: function.name.clone(),
        });
        self.scopes.push(HashMap::new());
        for statement in body {
            match statement {
                Statement::Open => self.scopes.push(HashMap::new()),
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Label(name) => {
                    let at = self.code.insts.len() as u32;
                    if let Some(frame) = self.frames.last_mut() {
                        frame.labels.insert(name.clone(), at);
                    }
                }
                Statement::Registers(kind, names) => {
                    for name in names {
                        let slot = self.register(*kind);
                        self.bind(name, Binding::Register(slot, *kind));
                    }
                }
                Statement::Variable(v) => self.variable(v)?,
                Statement::Instruction(i) => {
                    self.place = i.place;
                    self.instruction(i)?;
                }
            }
        }
        self.scopes.pop();
        let frame = self.frames.pop().expect("pushed above");
        for (at, label, line) in frame.branches {
            let target = *frame.labels.get(&label).ok_or_else(|| LoadError {
                line,
                message: format!("expected a label of {}, got `{label}`", frame.name),
            })?;
            self.code.insts[at].op = Op::Bra { target };
        }
        let end = self.code.insts.len() as u32;
        for at in frame.returns {
            self.code.insts[at].op = Op::Bra { target: end };
        }
        Ok(())
    }

    fn bind(&mut self, name: &str, binding: Binding) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), binding);
        }
    }

    fn register(&mut self, kind: Type) -> Slot {
        if kind.kind == Kind::Predicate {
            self.code.predicates += 1;
            return self.code.predicates - 1;
        }
        let slot = self.code.rows;
        self.code.rows += if kind.bytes == 8 { 2 } else { 1 };
        slot
    }

    fn variable(&mut self, v: &Variable) -> Result<()> {
        let binding = match v.space {
            Declared::Shared => Binding::Shared(self.shared.place(v)),
            Declared::Local | Declared::Param => {
                self.code.local_bytes = self.code.local_bytes.next_multiple_of(v.align.max(8));
                let at = self.code.local_bytes;
                self.code.local_bytes += v.bytes;
                Binding::Local(at)
            }
            Declared::Global | Declared::Const => {
                return Err(
                    self.unsupported(&format!("a variable inside a function, `{}`", v.name))
                );
            }
        };
        self.bind(&v.name, binding);
        Ok(())
    }

    pub(super) fn lookup(&mut self, name: &str) -> Option<Binding> {
        if let Some(binding) = self.scopes.iter().rev().find_map(|s| s.get(name)) {
            return Some(*binding);
        }
        let v = self.file.variables.iter().find(|v| v.name == name)?;
        let binding = Binding::Shared(self.shared.place(v));
        self.scopes[0].insert(name.to_owned(), binding);
        Some(binding)
    }

    pub(super) fn constant(&mut self, bits: u64, want: Type) -> Slot {
        let wide = want.bytes == 8;
        let bits = if wide { bits } else { bits & (u64::MAX >> (64 - 8 * want.bytes)) };
        self.constant_row(bits, wide, None)
    }

    pub(super) fn placed(&mut self, binding: Binding, offset: i64, want: Type) -> Slot {
        let variable = match binding {
            Binding::Variable(i) => Some(i),
            _ => None,
        };
        let slot = self.constant_row(offset as u64, want.bytes == 8, Some(variable));
        if variable.is_none() && !self.dynamic.contains(&slot) {
            self.dynamic.push(slot);
        }
        slot
    }

    fn constant_row(&mut self, bits: u64, wide: bool, place: Option<Anchor>) -> Slot {
        if let Some(&slot) = self.constants.get(&(bits, wide, place)) {
            return slot;
        }
        let slot = self.register(if wide { B64 } else { B32 });
        self.code.constants.push(Constant { slot, wide, bits, variable: place.flatten() });
        self.constants.insert((bits, wide, place), slot);
        slot
    }

    /// A predicate that is always true.
    pub(super) fn truth(&mut self) -> Slot {
        let next = self.code.predicates;
        let slot = *self.truth.get_or_insert(next);
        self.code.predicates = self.code.predicates.max(slot + 1);
        self.code.truth = Some(slot);
        slot
    }

    pub(super) fn special_slot(&mut self, special: Special) -> Slot {
        if let Some((_, slot)) = self.code.specials.iter().find(|(s, _)| *s == special) {
            return *slot;
        }
        let slot = self.register(B32);
        self.code.specials.push((special, slot));
        slot
    }

    pub(super) fn wrong(&self, expected: &str) -> LoadError {
        let text = self.lines.get(self.place.line as usize - 1).map_or("", |l| l.trim());
        LoadError { line: self.place.line, message: format!("expected {expected} in `{text}`") }
    }

    pub(super) fn unsupported(&self, what: &str) -> LoadError {
        let text = self.lines.get(self.place.line as usize - 1).map_or("", |l| l.trim());
        LoadError { line: self.place.line, message: format!("unsupported: {what} in `{text}`") }
    }

    pub(super) fn count(
        &self,
        i: &Instruction,
        expected: std::ops::RangeInclusive<usize>,
    ) -> Result<()> {
        if expected.contains(&i.operands.len()) {
            return Ok(());
        }
        Err(self.wrong(&format!("{expected:?} operands, got {}", i.operands.len())))
    }

    pub(super) fn emit(&mut self, op: Op, guard: &Option<Predicate>) -> Result<()> {
        let Predicate { slot, negate } = guard.unwrap_or(Predicate { slot: NONE, negate: false });
        let text = self.lines.get(self.place.line as usize - 1).map_or("", |l| l.trim());
        let opcode = text.split_whitespace().find(|w| !w.starts_with('@')).unwrap_or_default();
        let kind = op.kind(opcode.trim_end_matches(';'));
        self.code.insts.push(Inst { op, guard: slot, negate, kind });
        self.code.places.push(self.place);
        self.code.texts.push(text.to_owned());
        Ok(())
    }

    fn instruction(&mut self, i: &Instruction) -> Result<()> {
        let guard = match &i.guard {
            None => None,
            Some(g) => {
                Some(Predicate { slot: self.predicate_register(&g.register)?, negate: g.negate })
            }
        };
        let base = i.opcode.split('.').next().unwrap_or_default();
        let op = match base {
            "ld" | "ldu" | "st" | "atom" | "red" | "membar" | "fence" | "cp" | "ldmatrix" => {
                self.memory(base, i)?
            }
            "bar" | "barrier" | "shfl" | "vote" | "match" | "redux" | "activemask" | "mma" => {
                self.warp(base, i)?
            }
            "mov" => self.mov(i)?,
            "setp" => self.setp(i)?,
            "cvta" => self.cvta(i)?,
            "isspacep" => self.isspacep(i)?,
            "bra" => self.bra(i)?,
            "ret" => {
                let at = self.code.insts.len();
                let frame = self.frames.last_mut().expect("inside a function");
                if frame.inlined {
                    frame.returns.push(at);
                }
                Op::Exit
            }
            "exit" => Op::Exit,
            "trap" => Op::Trap,
            // Hints: no effect that a program could observe.
            "nanosleep" | "prefetch" | "prefetchu" => Op::Nop,
            "call" => match self.call(i, &guard)? {
                Some(op) => op,
                None => return Ok(()),
            },
            _ => self.alu(i)?,
        };
        self.emit(op, &guard)
    }

    fn alu(&mut self, i: &Instruction) -> Result<Op> {
        let alu = Alu::parse(&i.opcode)
            .ok_or_else(|| self.unsupported(&format!("the instruction `{}`", i.opcode)))?;
        let signature = alu.signature();
        self.count(i, signature.sources.len() + 1..=signature.sources.len() + 1)?;
        let fit = if i.opcode.starts_with("cvt.") { Fit::AtLeast } else { Fit::Exact };
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
    fn setp(&mut self, i: &Instruction) -> Result<Op> {
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

    fn mov(&mut self, i: &Instruction) -> Result<Op> {
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

    fn cvta(&mut self, i: &Instruction) -> Result<Op> {
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

    fn isspacep(&mut self, i: &Instruction) -> Result<Op> {
        self.count(i, 2..=2)?;
        let space = self.space(i.opcode.strip_prefix("isspacep.").unwrap_or_default())?;
        let dst = self.predicate(&i.operands[0])?.slot;
        Ok(Op::IsSpace { dst, src: self.source(&i.operands[1], B64, Fit::Exact)?, space })
    }

    fn bra(&mut self, i: &Instruction) -> Result<Op> {
        if !matches!(i.opcode.as_str(), "bra" | "bra.uni") {
            return Err(self.unsupported(&format!("the instruction `{}`", i.opcode)));
        }
        self.count(i, 1..=1)?;
        let Operand::Name(label) = &i.operands[0] else {
            return Err(self.wrong(&format!("a label, got {:?}", i.operands[0])));
        };
        let at = self.code.insts.len();
        let line = i.place.line;
        let frame = self.frames.last_mut().expect("inside a function");
        frame.branches.push((at, label.clone(), line));
        Ok(Op::Bra { target: u32::MAX })
    }

    /// `call.uni {(result),} function{, (params)}`: inlined, but for what the driver provides.
    fn call(&mut self, i: &Instruction, guard: &Option<Predicate>) -> Result<Option<Op>> {
        let (results, name, params): (&[Operand], _, &[Operand]) = match &i.operands[..] {
            [Operand::Name(name)] => (&[], name, &[]),
            [Operand::Name(name), Operand::List(params)] => (&[], name, params),
            [Operand::List(results), Operand::Name(name)] => (results, name, &[]),
            [Operand::List(results), Operand::Name(name), Operand::List(params)] => {
                (results, name, params)
            }
            _ => return Err(self.unsupported("a call that does not name its function")),
        };
        let mut local = |operands: &[Operand]| -> Result<Vec<u32>> {
            let local = operands.iter().map(|o| match o {
                Operand::Name(n) => match self.lookup(n) {
                    Some(Binding::Local(at)) => Ok(at),
                    _ => Err(self
                        .unsupported(&format!("`{n}` as an argument; expected a .param variable"))),
                },
                _ => Err(self.unsupported("a literal as an argument; expected a .param variable")),
            });
            local.collect()
        };
        let (results, params) = (local(results)?, local(params)?);
        let builtin = match name.as_str() {
            "vprintf" => Some(Builtin::Printf),
            "__assertfail" => Some(Builtin::AssertFail),
            _ => None,
        };
        if let Some(builtin) = builtin {
            let mut addresses = [0; 5];
            if params.len() > addresses.len() {
                return Err(self.wrong(&format!("at most five arguments, got {}", params.len())));
            }
            addresses[..params.len()].copy_from_slice(&params);
            let result = results.first().copied().unwrap_or(u32::MAX);
            return Ok(Some(Op::Call { builtin, result, params: addresses }));
        }
        let file = self.file;
        let callee = file.functions.iter().find(|f| f.name == *name && f.body.is_some());
        let callee = callee.ok_or_else(|| self.unsupported(&format!("the function `{name}`")))?;
        if self.frames.iter().any(|f| f.name == *name) {
            return Err(self.unsupported(&format!("recursion into `{name}`")));
        }
        if callee.params.len() != params.len() || callee.results.len() != results.len() {
            return Err(self.wrong(&format!(
                "{} results and {} arguments for `{name}`, got {} and {}",
                callee.results.len(),
                callee.params.len(),
                results.len(),
                params.len()
            )));
        }
        // Lanes whose guard is false go around the body.
        let around = self.code.insts.len();
        if let Some(g) = guard {
            self.emit(Op::Nop, &Some(Predicate { negate: !g.negate, ..*g }))?;
        }
        let formals = callee.params.iter().chain(&callee.results).map(|v| v.name.clone());
        let actuals = params.into_iter().chain(results).map(Binding::Local);
        // The callee sees the module's names and its own.
        let callers = self.scopes.split_off(1);
        self.scopes.push(formals.zip(actuals).collect());
        self.function(callee, true)?;
        self.scopes.truncate(1);
        self.scopes.extend(callers);
        if guard.is_some() {
            let target = self.code.insts.len() as u32;
            self.code.insts[around].op = Op::Bra { target };
        }
        Ok(None)
    }
}
