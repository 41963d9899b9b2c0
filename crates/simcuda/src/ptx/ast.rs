//! Parsed PTX, names not yet resolved.

/// Where an instruction came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// 1-based line of the PTX text.
    pub line: u32,
    /// `.file` number and line of the CUDA source; 0 if the PTX has no `.loc`.
    pub source: (u32, u32),
}

/// State space of a declared variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// Size and kind of a register or an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Type {
    pub kind: Kind,
    /// 1 for predicates.
    pub bytes: u32,
}

/// What a type's bits mean to the operand check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Predicate,
    /// Untyped.
    Bits,
    Signed,
    Unsigned,
    Float,
}

impl Type {
    /// `pred`, `b32`, `f16x2`, … without the dot.
    pub fn parse(name: &str) -> Option<Self> {
        let kind = match name {
            "pred" => return Some(Self { kind: Kind::Predicate, bytes: 1 }),
            // Packed halves live in untyped registers.
            "f16x2" | "bf16x2" => return Some(Self { kind: Kind::Bits, bytes: 4 }),
            "bf16" => return Some(Self { kind: Kind::Float, bytes: 2 }),
            _ => match name.chars().next()? {
                'b' => Kind::Bits,
                's' => Kind::Signed,
                'u' => Kind::Unsigned,
                'f' => Kind::Float,
                _ => return None,
            },
        };
        let bits: u32 = name[1..].parse().ok()?;
        [8, 16, 32, 64].contains(&bits).then_some(Self { kind, bytes: bits / 8 })
    }
}

/// An operand as written.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// Register, special register, variable, label or function.
    Name(String),
    /// A variable's address and a constant.
    Offset(String, i64),
    Int(i128),
    F32(u32),
    F64(u64),
    /// `[base+offset]`; no base for an absolute address.
    Address(Option<String>, i64),
    /// `{a, b, …}`.
    Vector(Vec<Operand>),
    /// `a|b`.
    Pair(String, String),
    /// `!p`.
    Not(String),
    /// `(a, b)`, of a call.
    List(Vec<Operand>),
}

/// `@p` or `@!p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    pub register: String,
    pub negate: bool,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq)]
pub struct Instruction {
    pub guard: Option<Guard>,
    /// With all modifiers.
    pub opcode: String,
    pub operands: Vec<Operand>,
    pub place: Place,
}

/// A variable declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    pub space: Space,
    pub name: String,
    pub align: u32,
    /// 0 for `name[]`, the dynamic shared memory.
    pub bytes: u32,
    pub extern_: bool,
    pub init: Vec<u8>,
    /// Addresses of other variables in the initialiser: byte offset and name.
    pub init_names: Vec<(u32, String)>,
}

/// A statement of a body. Scopes are braces, in which names may be declared anew.
#[derive(Debug, Clone, PartialEq)]
pub enum Statement {
    Instruction(Instruction),
    Label(String),
    Registers(Type, Vec<String>),
    Variable(Variable),
    Open,
    Close,
}

/// `.entry` or `.func`.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    pub entry: bool,
    pub name: String,
    pub results: Vec<Variable>,
    pub params: Vec<Variable>,
    pub max_threads: Option<[u32; 3]>,
    /// None for a declaration, such as that of `vprintf`.
    pub body: Option<Vec<Statement>>,
    pub line: u32,
}

/// A PTX file.
#[derive(Debug, Clone, Default)]
pub struct File {
    pub version: (u32, u32),
    pub target: u32,
    pub functions: Vec<Function>,
    pub variables: Vec<Variable>,
    /// `.file` numbers and names.
    pub sources: Vec<(u32, String)>,
}
