//! The instructions that only compute: registers in, one register out.
//!
//! One table says what is supported. A row of it is a list of forms, each an opcode with its modifiers as PTX text has
//! them, the operand types, and the function of one lane:
//!
//! ```text
//! "add.s32", "add.u32" => (a: U32, b: U32) -> U32 { a.wrapping_add(b) }
//! ```
//!
//! From a row come the parser's lookup, the signature operands are checked against, and the loop over the lanes. The
//! loop is compiled for AVX2, with a scalar one for CPUs without it; rare forms have only that. The result never depends
//! on which one runs.
//!
//! What the PTX ISA leaves open is decided here: integer division by zero gives all ones, as does its remainder; a NaN
//! computed in f32 is 0x7fffffff, in a 16-bit float 0x7fff, in f64 0xfff8000000000000, whatever NaN came in; `neg` and
//! `abs` of a NaN change the sign bit only.
#![allow(
    unsafe_code,
    reason = "loops compiled for CPU features, and 64-bit registers read as pairs of rows"
)]

mod bits;
mod convert;
mod float;
mod half;
mod integer;
mod lanes;
mod select;
#[cfg(test)]
mod tests;
mod types;

use std::collections::HashMap;
use std::fmt;
use std::sync::{LazyLock, OnceLock};

pub use lanes::{wide, wide_mut};
pub use types::{Signature, Ty};

use super::registers::{Registers, Slot};
use lanes::{Lane, Sources};

/// What a launch chooses about arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Env {
    /// A seed, if results of approximate functions are to be moved within their documented error.
    pub perturb: Option<u64>,
}

/// A register-to-register instruction: a row of the table.
#[derive(Clone, Copy)]
pub struct Alu(&'static Entry);

impl Alu {
    /// The instruction of a form such as `fma.rn.f32`; None if there is none.
    pub fn parse(form: &str) -> Option<Self> {
        static ENTRIES: LazyLock<HashMap<&str, Alu>> = LazyLock::new(|| {
            entries().flat_map(|e| e.forms.iter().map(move |form| (*form, Alu(e)))).collect()
        });
        ENTRIES.get(form).copied()
    }

    /// Every form, sorted.
    #[cfg(test)]
    pub fn forms() -> &'static [&'static str] {
        static FORMS: LazyLock<Vec<&str>> = LazyLock::new(|| {
            let mut forms: Vec<_> = entries().flat_map(|e| e.forms.iter().copied()).collect();
            forms.sort_unstable();
            forms
        });
        &FORMS
    }

    /// What its operands are.
    pub fn signature(self) -> &'static Signature {
        &self.0.signature
    }

    /// Executes the lanes in `mask`; the others keep what `dst` holds. Sources beyond the signature's are not read;
    /// each may be the destination.
    pub fn run(self, r: &mut Registers, mask: u32, dst: Slot, src: [Slot; 4], env: &Env) {
        self.0.run[level()](r, mask, dst, src, env);
    }
}

impl PartialEq for Alu {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Alu {}

impl fmt::Debug for Alu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.forms[0])
    }
}

/// A row of the table.
struct Entry {
    forms: &'static [&'static str],
    signature: Signature,
    /// By [`level`].
    run: [Run; 2],
}

type Run = fn(&mut Registers, u32, Slot, [Slot; 4], &Env);

fn entries() -> impl Iterator<Item = &'static Entry> {
    [integer::TABLES, bits::TABLES, select::TABLES, float::TABLES, half::TABLES, convert::TABLES]
        .into_iter()
        .flatten()
        .copied()
        .flatten()
}

/// What a row computes, for one lane.
trait Form {
    /// Whether `lane` asks the [`Env`].
    const APPROXIMATE: bool;
    type Destination: Lane;
    type Sources: Sources;
    fn lane(
        sources: <Self::Sources as Sources>::Values,
        env: &Env,
    ) -> <Self::Destination as Lane>::Value;
}

/// All lanes by a loop of the form's own. Those not in `mask` are computed and dropped: that needs no branches.
fn vector<F: Form>(r: &mut Registers, mask: u32, dst: Slot, src: [Slot; 4], env: &Env) {
    if F::APPROXIMATE && env.perturb.is_some() {
        return scalar::<F>(r, mask, dst, src, env);
    }
    let mut out = [Default::default(); 32];
    let rows = F::Sources::rows(r, src);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `level` lets this function run where `has_avx2`.
    unsafe {
        fill_avx2::<F>(&mut out, rows);
    }
    #[cfg(not(target_arch = "x86_64"))]
    fill::<F>(&mut out, rows);
    F::Destination::write(r, dst, mask, &out);
}

/// A function of its own, because as a parameter `out` is known not to be part of `rows`.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
#[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
fn fill_avx2<F: Form>(
    out: &mut [<F::Destination as Lane>::Bits; 32],
    rows: <F::Sources as Sources>::Rows<'_>,
) {
    fill::<F>(out, rows);
}

#[inline(always)]
fn fill<F: Form>(
    out: &mut [<F::Destination as Lane>::Bits; 32],
    rows: <F::Sources as Sources>::Rows<'_>,
) {
    let env = &Env { perturb: None };
    for (lane, bits) in out.iter_mut().enumerate() {
        *bits = F::Destination::bits(F::lane(F::Sources::at(rows, lane), env), lane);
    }
}

/// Lane by lane, through a pointer: one loop for all forms of a signature.
fn scalar<F: Form>(r: &mut Registers, mask: u32, dst: Slot, src: [Slot; 4], env: &Env) {
    each_lane::<F::Destination, F::Sources>(r, mask, dst, src, env, F::lane);
}

#[inline(never)]
fn each_lane<D: Lane, S: Sources>(
    r: &mut Registers,
    mask: u32,
    dst: Slot,
    src: [Slot; 4],
    env: &Env,
    function: fn(S::Values, &Env) -> D::Value,
) {
    let rows = S::rows(r, src);
    let mut out = [Default::default(); 32];
    let mut rest = mask;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        out[lane] = D::bits(function(S::at(rows, lane), env), lane);
        rest &= rest - 1;
    }
    D::write(r, dst, mask, &out);
}

/// Which of an entry's loops this CPU runs: the vectorised one, except on an x86-64 without AVX2. There is no second
/// copy of a thousand loops for such a machine, and other architectures vectorise at their baseline.
fn level() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        static LEVEL: OnceLock<usize> = OnceLock::new();
        *LEVEL.get_or_init(|| usize::from(crate::num::has_avx2()))
    }
    #[cfg(not(target_arch = "x86_64"))]
    1
}

impl Entry {
    /// A row that kernels spend their time in.
    const fn common<F: Form>(forms: &'static [&'static str]) -> Self {
        Self { forms, signature: Self::signature::<F>(), run: [scalar::<F>, vector::<F>] }
    }

    /// A row not worth a loop of its own: there are a thousand, and each loop takes the compiler 20 ms.
    const fn rare<F: Form>(forms: &'static [&'static str]) -> Self {
        Self { forms, signature: Self::signature::<F>(), run: [scalar::<F>, scalar::<F>] }
    }

    const fn signature<F: Form>() -> Signature {
        Signature { destination: F::Destination::TY, sources: F::Sources::TYPES }
    }
}

/// Rows of the table, `common` or `rare`. A row whose function needs the [`Env`] names it after a semicolon.
macro_rules! forms {
    ($kind:ident: $(
        $($form:expr),+ => ($($arg:ident: $source:ty),+ $(; $env:ident)?) -> $destination:ty $body:block
    )*) => {
        &[$({
            struct Row;
            impl $crate::exec::alu::Form for Row {
                type Destination = $destination;
                type Sources = ($($source,)+);
                const APPROXIMATE: bool = false $(|| stringify!($env).len() > 0)?;
                #[inline(always)]
                fn lane(
                    ($($arg,)+): <Self::Sources as $crate::exec::alu::lanes::Sources>::Values,
                    _env: &$crate::exec::alu::Env,
                ) -> <$destination as $crate::exec::alu::lanes::Lane>::Value {
                    $(let $env = _env;)?
                    $body
                }
            }
            $crate::exec::alu::Entry::$kind::<Row>(&[$($form),+])
        }),*] as &[$crate::exec::alu::Entry]
    };
}
use forms;
