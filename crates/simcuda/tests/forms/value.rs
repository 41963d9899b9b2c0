//! Typed values of the tables: how they are written, how they lie in memory, when two of them agree.

use half::{bf16, f16};

/// A PTX type of an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Pred,
    Int { bits: u32, signed: bool },
    F16,
    Bf16,
    F32,
    F64,
}

impl Type {
    pub fn parse(name: &str) -> Option<Self> {
        let int = |bits, signed| Some(Type::Int { bits, signed });
        match name {
            "pred" => Some(Type::Pred),
            "u8" | "b8" => int(8, false),
            "u16" | "b16" => int(16, false),
            "u32" | "b32" | "f16x2" | "bf16x2" => int(32, false),
            "u64" | "b64" => int(64, false),
            "s8" => int(8, true),
            "s16" => int(16, true),
            "s32" => int(32, true),
            "s64" => int(64, true),
            "f16" => Some(Type::F16),
            "bf16" => Some(Type::Bf16),
            "f32" => Some(Type::F32),
            "f64" => Some(Type::F64),
            _ => None,
        }
    }

    /// Bits of it in memory; a predicate is stored as a word.
    pub fn bits(self) -> u32 {
        match self {
            Type::Int { bits, .. } => bits,
            Type::F16 | Type::Bf16 => 16,
            Type::Pred | Type::F32 => 32,
            Type::F64 => 64,
        }
    }

    pub fn bytes(self) -> usize {
        self.bits() as usize / 8
    }

    /// The type under which compilers declare such a register, load and store it.
    pub fn register(self) -> String {
        match self {
            Type::F32 => "f32".into(),
            Type::F64 => "f64".into(),
            other => format!("b{}", other.bits()),
        }
    }

    fn is_float(self) -> bool {
        matches!(self, Type::F16 | Type::Bf16 | Type::F32 | Type::F64)
    }

    /// `0x...` gives the bits of any type; otherwise an integer, or a float with `inf`, `nan` and decimals.
    pub fn value(self, text: &str) -> Result<u64, String> {
        let bits = match text.strip_prefix("0x") {
            Some(digits) => u128::from_str_radix(digits, 16).ok(),
            None if self.is_float() => text.parse::<f64>().ok().map(|f| self.encode(text, f)),
            None => text.parse::<i128>().ok().and_then(|int| self.wrap(int)),
        };
        bits.filter(|bits| bits >> self.bits() == 0)
            .map(|bits| bits as u64)
            .ok_or_else(|| format!("{text:?} is no {self:?}"))
    }

    fn encode(self, text: &str, float: f64) -> u128 {
        match self {
            Type::F16 => f16::from_f64(float).to_bits().into(),
            Type::Bf16 => bf16::from_f64(float).to_bits().into(),
            Type::F32 => text.parse::<f32>().expect("it parsed as f64").to_bits().into(),
            _ => float.to_bits().into(),
        }
    }

    fn wrap(self, int: i128) -> Option<u128> {
        let bits = if self == Type::Pred { 1 } else { self.bits() };
        let (low, high) = match self {
            Type::Int { signed: true, .. } => (-(1 << (bits - 1)), 1 << (bits - 1)),
            _ => (0, 1 << bits),
        };
        (low..high).contains(&int).then_some(int as u128 & ((1 << bits) - 1))
    }

    fn float(self, bits: u64) -> f64 {
        match self {
            Type::F16 => f16::from_bits(bits as u16).to_f64(),
            Type::Bf16 => bf16::from_bits(bits as u16).to_f64(),
            Type::F32 => f32::from_bits(bits as u32).into(),
            Type::F64 => f64::from_bits(bits),
            _ => f64::NAN,
        }
    }

    /// The distance from a float's magnitude to the next larger one.
    fn ulp(self, bits: u64) -> f64 {
        let magnitude = bits & !(1 << (self.bits() - 1));
        self.float(magnitude + 1) - self.float(magnitude)
    }

    /// For messages: hex, and the number.
    pub fn show(self, bits: u64) -> String {
        let hex = format!("{bits:#0width$x}", width = self.bytes() * 2 + 2);
        match self {
            _ if self.is_float() => format!("{hex} ({:e})", self.float(bits)),
            Type::Int { bits: size, signed: true } => {
                format!("{hex} ({})", (bits << (64 - size)) as i64 >> (64 - size))
            }
            _ => hex,
        }
    }
}

/// How far an approximate result may lie from the exact one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// Units in the last place of the exact result, with its sign.
    Ulp(f64),
    Absolute(f64),
    Relative(f64),
}

impl Tolerance {
    pub const EXACT: Self = Tolerance::Ulp(0.0);

    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ')? {
            ("ulp", n) => Some(Tolerance::Ulp(n.parse().ok()?)),
            ("abs", x) => Some(Tolerance::Absolute(x.parse().ok()?)),
            ("rel", x) => Some(Tolerance::Relative(x.parse().ok()?)),
            _ => None,
        }
    }
}

/// A result as the table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Bits(u64),
    /// `nan`: with any payload and sign.
    Nan,
    /// `_`: memory that the kernel must leave as it was.
    Untouched,
}

/// What output memory holds before the kernel runs.
pub const POISON: u8 = 0xcd;

impl Expected {
    pub fn parse(ty: Type, text: &str) -> Result<Self, String> {
        match text {
            "_" => Ok(Expected::Untouched),
            "nan" if ty.is_float() => Ok(Expected::Nan),
            _ => ty.value(text).map(Expected::Bits),
        }
    }

    pub fn admits(self, ty: Type, got: u64, tolerance: Tolerance) -> bool {
        let expected = match self {
            Expected::Nan => return ty.float(got).is_nan(),
            Expected::Untouched => {
                return got == u64::from_ne_bytes([POISON; 8]) >> (64 - ty.bits());
            }
            Expected::Bits(bits) => bits,
        };
        let (a, b) = (ty.float(expected), ty.float(got));
        if expected == got || !ty.is_float() || !a.is_finite() || !b.is_finite() {
            return expected == got;
        }
        match tolerance {
            Tolerance::Ulp(n) => {
                a.is_sign_negative() == b.is_sign_negative()
                    && (a - b).abs() <= n * ty.ulp(expected)
            }
            Tolerance::Absolute(limit) => (a - b).abs() <= limit,
            Tolerance::Relative(limit) => (a - b).abs() <= limit * a.abs(),
        }
    }

    pub fn show(self, ty: Type) -> String {
        match self {
            Expected::Bits(bits) => ty.show(bits),
            Expected::Nan => "nan".into(),
            Expected::Untouched => "untouched".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked_and_encoded() {
        let value = |ty, text| Type::parse(ty).unwrap().value(text);
        assert_eq!(value("s32", "-1"), Ok(0xffff_ffff));
        assert_eq!(value("u64", "0xffffffffffffffff"), Ok(u64::MAX));
        assert_eq!(value("f32", "-0.0"), Ok(0x8000_0000));
        assert_eq!(value("f16", "1"), Ok(0x3c00));
        assert_eq!(value("bf16", "0x7fff"), Ok(0x7fff));
        for (ty, text) in [("s32", "2147483648"), ("u16", "-1"), ("f16", "0x10000"), ("pred", "2")]
        {
            assert!(value(ty, text).is_err(), "{ty} {text}");
        }
        assert!(value("b32", "1.5").is_err());
    }

    #[test]
    fn results_agree_or_not() {
        let f32s = Type::F32;
        let one = Expected::parse(f32s, "1.0").unwrap();
        assert!(one.admits(f32s, 0x3f80_0000, Tolerance::EXACT));
        assert!(!one.admits(f32s, 0x3f80_0001, Tolerance::EXACT));
        assert!(one.admits(f32s, 0x3f7f_fffc, Tolerance::Ulp(2.0)));
        assert!(!one.admits(f32s, 0x3f7f_fffb, Tolerance::Ulp(2.0)));
        assert!(one.admits(f32s, 0x3f80_0002, Tolerance::Ulp(2.0)));
        assert!(!one.admits(f32s, 0x3f80_0003, Tolerance::Ulp(2.0)));
        assert!(one.admits(f32s, 0x3f80_0010, Tolerance::Absolute(2e-6)));
        assert!(!one.admits(f32s, 0x3f80_0020, Tolerance::Relative(2e-6)));
        let zero = Expected::parse(f32s, "0.0").unwrap();
        assert!(!zero.admits(f32s, 0x8000_0000, Tolerance::EXACT), "the sign of zero counts");
        assert!(zero.admits(f32s, 2, Tolerance::Ulp(2.0)));
        assert!(!zero.admits(f32s, 0x8000_0001, Tolerance::Ulp(2.0)));
        let nan = Expected::parse(f32s, "nan").unwrap();
        assert!(nan.admits(f32s, 0xffc0_0001, Tolerance::EXACT));
        assert!(!nan.admits(f32s, 0x7f80_0000, Tolerance::Ulp(9.0)));
        assert!(Expected::Untouched.admits(f32s, 0xcdcd_cdcd, Tolerance::EXACT));
        assert!(!Expected::Untouched.admits(f32s, 0xcdcd_cdcc, Tolerance::Ulp(9.0)));
    }
}
