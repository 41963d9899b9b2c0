//! Function bodies: scopes, labels, branches and inlined calls.

use std::collections::HashMap;

use super::op::{Builtin, Inst, NONE, Op, Predicate};
use super::operands::{B32, B64};
use super::{Code, Constant, Result, Shared, Special, dynamic_start};
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

    pub(super) fn register(&mut self, kind: Type) -> Slot {
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

    pub(super) fn guard(&mut self, i: &Instruction) -> Result<Option<Predicate>> {
        let Some(g) = &i.guard else { return Ok(None) };
        Ok(Some(Predicate { slot: self.predicate_register(&g.register)?, negate: g.negate }))
    }

    fn instruction(&mut self, i: &Instruction) -> Result<()> {
        let guard = self.guard(i)?;
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
