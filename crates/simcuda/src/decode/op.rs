//! Decoded instructions: names are slots, labels are indices, modifiers are enums. What needs nothing but registers
//! is an [`Alu`] form; the rest is listed here.

use crate::counters::Kind;
use crate::exec::alu::Alu;
use crate::exec::registers::Slot;
use crate::memory::Scope;
use crate::num::mma::MmaKind;

/// No register: a sink, an absolute address, an unguarded instruction.
pub const NONE: Slot = Slot::MAX;

/// One decoded instruction.
#[derive(Debug, Clone, Copy)]
pub struct Inst {
    pub op: Op,
    /// Predicate, or [`NONE`].
    pub guard: Slot,
    pub negate: bool,
    /// What it counts as.
    pub kind: Kind,
}

impl Inst {
    /// Whether lanes must be together for it.
    pub fn synchronises(&self) -> bool {
        matches!(self.op, Op::Barrier { .. } | Op::LdMatrix { .. } | Op::Mma { .. })
            || self.member_mask().is_some()
    }

    /// The register that names the lanes of a `.sync` operation.
    pub fn member_mask(&self) -> Option<Slot> {
        match self.op {
            Op::WarpBarrier { mask }
            | Op::Shuffle { mask, .. }
            | Op::Vote { mask, .. }
            | Op::Match { mask, .. }
            | Op::Redux { mask, .. } => Some(mask),
            _ => None,
        }
    }
}

/// Where an access goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// `[base + offset]`.
#[derive(Debug, Clone, Copy)]
pub struct Address {
    pub base: Slot,
    /// The base is 64 bits wide.
    pub wide: bool,
    pub offset: i64,
}

/// What an access promises to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Semantics {
    /// None for a weak access.
    pub scope: Option<Scope>,
    pub acquire: bool,
    pub release: bool,
}

impl Semantics {
    /// Promises nothing.
    pub const WEAK: Self = Self { scope: None, acquire: false, release: false };
}

/// Registers of a vector access and what one element is.
#[derive(Debug, Clone, Copy)]
pub struct Elements {
    pub slots: [Slot; 4],
    pub count: u8,
    /// Bytes in memory.
    pub bytes: u8,
    pub signed: bool,
    /// 64-bit registers.
    pub wide: bool,
}

/// What an atomic does with the old value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rmw {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// Element of an atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    U32,
    S32,
    U64,
    S64,
    F32,
    F64,
    F16x2,
    Bf16x2,
}

impl Word {
    pub fn bytes(self) -> u8 {
        if matches!(self, Self::U64 | Self::S64 | Self::F64) { 8 } else { 4 }
    }
}

/// Boolean operator of `setp`, `vote` and barrier reductions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logic {
    And,
    Or,
    Xor,
}

/// A predicate operand, perhaps negated.
#[derive(Debug, Clone, Copy)]
pub struct Predicate {
    pub slot: Slot,
    pub negate: bool,
}

/// Where `shfl` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

/// What `vote` answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// What a barrier does besides waiting.
#[derive(Debug, Clone, Copy)]
pub enum BarrierKind {
    Sync,
    Arrive,
    /// Count of true predicates.
    Popc(Slot, Predicate),
    /// All or any.
    Reduce(Logic, Slot, Predicate),
}

/// Functions that the driver provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    Printf,
    AssertFail,
}

impl Op {
    /// What it counts as. Generic accesses count as global ones.
    pub fn kind(&self, opcode: &str) -> Kind {
        match self {
            Self::Alu { .. } | Self::Compare { .. } => arithmetic(opcode),
            Self::Pack { .. }
            | Self::Unpack { .. }
            | Self::Convert { .. }
            | Self::IsSpace { .. }
            | Self::Clock { .. } => Kind::Move,
            Self::Load { space, .. } => match space {
                Space::Generic | Space::Global => Kind::GlobalLoad,
                Space::Shared => Kind::SharedLoad,
                Space::Local => Kind::Local,
                Space::Const | Space::Param => Kind::Constant,
            },
            Self::Store { space, .. } => match space {
                Space::Shared => Kind::SharedStore,
                Space::Local => Kind::Local,
                _ => Kind::GlobalStore,
            },
            Self::Atomic { .. } => Kind::Atomic,
            Self::Fence(_) | Self::Barrier { .. } | Self::WarpBarrier { .. } => Kind::Sync,
            Self::Shuffle { .. }
            | Self::Vote { .. }
            | Self::Match { .. }
            | Self::Redux { .. }
            | Self::ActiveMask { .. } => Kind::Warp,
            Self::CpAsync { .. } | Self::CpCommit | Self::CpWait(_) => Kind::Async,
            Self::LdMatrix { .. } => Kind::SharedLoad,
            Self::Mma { .. } => Kind::Mma,
            Self::Bra { .. } | Self::Exit | Self::Trap | Self::Call { .. } | Self::Nop => {
                Kind::Control
            }
        }
    }
}

fn arithmetic(opcode: &str) -> Kind {
    let mut words = opcode.split('.');
    let base = words.next().unwrap_or_default();
    let ty = words.next_back().unwrap_or_default();
    match base {
        "mov" | "selp" | "cvt" => Kind::Move,
        "ex2" | "lg2" | "sin" | "cos" | "tanh" | "rsqrt" => Kind::Special,
        "rcp" | "sqrt" | "div" if opcode.contains(".approx") => Kind::Special,
        _ => match ty {
            "f32" => Kind::Float,
            "f64" => Kind::Double,
            "f16" | "f16x2" | "bf16" | "bf16x2" => Kind::Half,
            _ => Kind::Integer,
        },
    }
}

/// What an instruction does.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    Alu {
        alu: Alu,
        dst: Slot,
        src: [Slot; 4],
    },
    /// `setp` with a boolean operator or a second destination.
    Compare {
        alu: Alu,
        src: [Slot; 4],
        dst: Slot,
        inverse: Slot,
        combine: Option<(Logic, Predicate)>,
    },
    /// `dst = {parts}`, low part first; each part has `bytes`.
    Pack {
        dst: Slot,
        parts: [Slot; 4],
        count: u8,
        bytes: u8,
    },
    /// `{parts} = src`.
    Unpack {
        src: Slot,
        parts: [Slot; 4],
        count: u8,
        bytes: u8,
    },
    /// `cvta`: adds (or, `to`, takes away) the space's window.
    Convert {
        dst: Slot,
        src: Slot,
        space: Space,
        to: bool,
        wide: bool,
    },
    /// `isspacep`.
    IsSpace {
        dst: Slot,
        src: Slot,
        space: Space,
    },
    /// `%clock`, `%clock64`, `%globaltimer`: warp instructions so far.
    Clock {
        dst: Slot,
        wide: bool,
    },
    Load {
        space: Space,
        address: Address,
        to: Elements,
        semantics: Semantics,
        non_coherent: bool,
    },
    Store {
        space: Space,
        address: Address,
        from: Elements,
        semantics: Semantics,
    },
    /// `atom`, or `red` without `dst`. For `cas`, `b` is the expected value and `c` the new one.
    Atomic {
        space: Space,
        rmw: Rmw,
        word: Word,
        dst: Slot,
        address: Address,
        b: Slot,
        c: Slot,
        semantics: Semantics,
    },
    Fence(Scope),
    Barrier {
        kind: BarrierKind,
        id: Slot,
        count: Slot,
    },
    WarpBarrier {
        mask: Slot,
    },
    Shuffle {
        mode: Shuffle,
        dst: Slot,
        valid: Slot,
        src: Slot,
        lane: Slot,
        clamp: Slot,
        mask: Slot,
    },
    Vote {
        vote: Vote,
        dst: Slot,
        src: Predicate,
        mask: Slot,
    },
    /// `match.any`, or `match.all` with its predicate.
    Match {
        all: bool,
        dst: Slot,
        valid: Slot,
        src: Slot,
        wide: bool,
        mask: Slot,
    },
    Redux {
        rmw: Rmw,
        signed: bool,
        dst: Slot,
        src: Slot,
        mask: Slot,
    },
    ActiveMask {
        dst: Slot,
    },
    CpAsync {
        dst: Address,
        src: Address,
        bytes: u8,
        size: Slot,
    },
    CpCommit,
    /// Waits until at most this many of the thread's groups are outstanding; None: everything, committed or not.
    CpWait(Option<u32>),
    LdMatrix {
        dst: [Slot; 4],
        count: u8,
        transposed: bool,
        address: Address,
        space: Space,
    },
    Mma {
        kind: MmaKind,
        d: [Slot; 4],
        a: [Slot; 4],
        b: [Slot; 2],
        c: [Slot; 4],
    },
    Bra {
        target: u32,
    },
    Exit,
    Trap,
    /// Arguments are local addresses of parameters.
    Call {
        builtin: Builtin,
        result: u32,
        params: [u32; 5],
    },
    Nop,
}
