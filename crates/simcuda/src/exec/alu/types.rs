//! Operand types, and which registers hold them.

/// The type of an operand, as the modifiers of an instruction give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ty {
    Pred,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    BF16,
    B32,
    U32,
    S32,
    F32,
    F16x2,
    BF16x2,
    B64,
    U64,
    S64,
    F64,
}

/// What tells registers of one size apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Predicate,
    Untyped,
    Integer,
    Float,
}

impl Ty {
    /// Its size; 1 for predicates.
    pub fn bits(self) -> u32 {
        match self {
            Self::Pred => 1,
            Self::B8 | Self::U8 | Self::S8 => 8,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::BF16 => 16,
            Self::B32 | Self::U32 | Self::S32 | Self::F32 | Self::F16x2 | Self::BF16x2 => 32,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 64,
        }
    }

    /// Whether a literal operand is a floating-point number: `0f…`, `0d…` or with a decimal point.
    pub fn is_float(self) -> bool {
        self.class() == Class::Float
    }

    fn class(self) -> Class {
        match self {
            Self::Pred => Class::Predicate,
            Self::B8 | Self::B16 | Self::B32 | Self::B64 => Class::Untyped,
            Self::F16 | Self::BF16 | Self::F32 | Self::F16x2 | Self::BF16x2 | Self::F64 => {
                Class::Float
            }
            _ => Class::Integer,
        }
    }

    /// Whether a register declared as `register` may be this operand: the same size, and the same kind unless one of
    /// the two is `.b`. The 16-bit floats also live in integer registers, as compilers of before their types put them.
    pub fn accepts(self, register: Self) -> bool {
        self.bits() == register.bits() && self.class_accepts(register)
    }

    /// The rule of `cvt`, `ld` and `st`: the register may also be wider. Rows hold narrow values in their low bits, so
    /// up to 32 bits nothing else changes; a 64-bit register needs a `cvt` of its own to or from a 32-bit row.
    pub fn accepts_wider(self, register: Self) -> bool {
        self.bits() <= register.bits() && self.class_accepts(register)
    }

    fn class_accepts(self, register: Self) -> bool {
        match (self.class(), register.class()) {
            (a, b) if a == b => true,
            (Class::Predicate, _) | (_, Class::Predicate) => false,
            (Class::Untyped, _) | (_, Class::Untyped) => true,
            _ => matches!(self, Self::F16 | Self::BF16 | Self::F16x2 | Self::BF16x2),
        }
    }
}

/// The operands of an instruction.
#[derive(Debug, PartialEq, Eq)]
pub struct Signature {
    /// Of the result.
    pub destination: Ty,
    /// Of the sources, in the order of the text.
    pub sources: &'static [Ty],
}
