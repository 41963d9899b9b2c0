//! What a launch did, counted: instructions, memory transactions, bank conflicts, footprint.
//!
//! The numbers depend on the kernel, its input and the schedule, never on the machine, so tests hold them as golden
//! values. [`Counters`] is plain `u64` words, declared once by a macro that also writes the conversion to and from
//! the words that cross the C boundary: a field cannot be forgotten.

mod meter;

use std::fmt;

pub(crate) use meter::Meter;

/// Declares structs of `u64` (or of such structs), with their addition and their words.
macro_rules! words {
    ($($(#[$struct_meta:meta])* $struct:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$struct_meta])*
        #[derive(Default, Clone, Debug, PartialEq, Eq)]
        pub struct $struct { $($(#[$meta])* pub $field: $type,)* }

        impl Words for $struct {
            fn put(&self, words: &mut Vec<u64>) {
                $(self.$field.put(words);)*
            }
            fn take(words: &mut impl Iterator<Item = u64>) -> Option<Self> {
                Some(Self { $($field: Words::take(words)?,)* })
            }
            fn name(prefix: &str, names: &mut Vec<String>) {
                $(<$type>::name(&format!("{prefix} {}", stringify!($field)), names);)*
            }
        }
    )*};
}

/// A value that is a sequence of named words.
trait Words: Sized {
    fn put(&self, words: &mut Vec<u64>);
    fn take(words: &mut impl Iterator<Item = u64>) -> Option<Self>;
    fn name(prefix: &str, names: &mut Vec<String>);
}

impl Words for u64 {
    fn put(&self, words: &mut Vec<u64>) {
        words.push(*self);
    }
    fn take(words: &mut impl Iterator<Item = u64>) -> Option<Self> {
        words.next()
    }
    fn name(prefix: &str, names: &mut Vec<String>) {
        names.push(prefix.trim_start().replace('_', " "));
    }
}

/// Declares the classes of instructions: the enum that the executor names and the struct of their counts.
macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $kind:ident $field:ident,)*) => {
        /// What an instruction is counted as.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $($(#[doc = $doc])* $kind,)* }

        const KINDS: usize = [$(Kind::$kind),*].len();

        words! {
            /// Instructions by class.
            Instructions {
                /// Of every class.
                total: u64,
                $($(#[doc = $doc])* $field: u64,)*
            }
        }
    };
}

kinds! {
    /// Integer arithmetic, logic and comparison.
    Integer integer,
    /// f32 arithmetic and comparison.
    Float float,
    /// f64 arithmetic and comparison.
    Double double,
    /// f16 and bf16 arithmetic and comparison, packed or not.
    Half half,
    /// Approximate functions: `ex2`, `lg2`, `rcp`, `rsqrt`, `sin`...
    Special special,
    /// Moves, selections, conversions and `cvta`.
    Move moves,
    /// Loads from global memory, also through generic addresses.
    GlobalLoad global_load,
    /// Stores to global memory, also through generic addresses.
    GlobalStore global_store,
    /// Loads from shared memory, `ldmatrix` included.
    SharedLoad shared_load,
    /// Stores to shared memory.
    SharedStore shared_store,
    /// Loads from and stores to local memory.
    Local local,
    /// Loads from constant and parameter memory, stores of call arguments.
    Constant constant,
    /// `atom` and `red`.
    Atomic atomic,
    /// `cp.async` and its groups and waits.
    Async asynchronous,
    /// Barriers and fences.
    Sync sync,
    /// `shfl`, `vote`, `match`, `redux`, `activemask`.
    Warp warp,
    /// Matrix multiplications.
    Mma mma,
    /// Branches, calls, returns, exits, `nanosleep`.
    Control control,
}

words! {
    /// Accesses of warps to global memory.
    GlobalAccess {
        /// Warp instructions.
        requests: u64,
        /// 32-byte sectors, counted once per request: what moves between L1 and L2 if L1 never hits.
        sectors: u64,
        /// Distinct bytes that the lanes asked for, counted once per request.
        bytes: u64,
        /// Sectors that would have sufficed: the distinct bytes / 32, rounded up per request.
        ideal_sectors: u64,
    }
    /// Accesses of warps to shared memory.
    SharedAccess {
        /// Warp instructions.
        requests: u64,
        /// Passes through the 32 banks of 4 bytes: a warp takes at least one for 4-byte accesses, one per half warp for
        /// 8 bytes, one per quarter warp for 16 bytes and for `ldmatrix`, and one more for each further distinct word
        /// in the fullest bank. Lanes that read the same word share it.
        wavefronts: u64,
        /// Passes without bank conflicts; `wavefronts - ideal_wavefronts` is the excess.
        ideal_wavefronts: u64,
    }
    /// `atom` and `red`.
    Atomics {
        /// Warp instructions.
        requests: u64,
        /// Steps if lanes with the same address take turns: the largest number of lanes at one address, summed.
        serial: u64,
        /// 32-byte sectors, counted once per request; 0 for shared memory.
        sectors: u64,
    }
    /// What one launch did, or several.
    Counters {
        /// Thread blocks launched.
        blocks: u64,
        /// Threads launched.
        threads: u64,
        /// Bytes of shared memory of those blocks, all together, static and dynamic.
        shared_bytes: u64,
        /// Instructions issued by warps.
        warp_instructions: Instructions,
        /// The same, each times the lanes that execute it: active, and their guard true.
        thread_instructions: Instructions,
        /// Loads from global memory, the source side of `cp.async` included.
        global_load: GlobalAccess,
        /// Stores to global memory.
        global_store: GlobalAccess,
        /// Loads from shared memory, `ldmatrix` included.
        shared_load: SharedAccess,
        /// Stores to shared memory, the destination side of `cp.async` included.
        shared_store: SharedAccess,
        /// Atomics on global memory.
        global_atomic: Atomics,
        /// Atomics on shared memory.
        shared_atomic: Atomics,
        /// `cp.async` copies (warp instructions).
        cp_async: u64,
        /// `mma` (warp instructions).
        mma: u64,
        /// Multiplications and additions in them, each counted as one.
        mma_flops: u64,
        /// Arrivals of warps at block barriers.
        barriers: u64,
        /// Branches that parted a warp.
        divergent_branches: u64,
        /// 32-byte sectors of global memory that were read before this launch wrote them: what must come from outside.
        dram_read_sectors: u64,
        /// 32-byte sectors of global memory that were written.
        dram_write_sectors: u64,
    }
}

impl Counters {
    /// Adds the counts of another launch.
    pub fn add(&mut self, other: &Self) {
        let sum = self.to_words().into_iter().zip(other.to_words()).map(|(a, b)| a + b);
        *self = Self::take(&mut { sum }).expect("as many words as before");
    }

    /// The counters in order of declaration.
    pub fn to_words(&self) -> Vec<u64> {
        let mut words = Vec::new();
        self.put(&mut words);
        words
    }

    /// The inverse of [`Counters::to_words`]; none if the number of words is another.
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let mut iter = words.iter().copied();
        Self::take(&mut iter).filter(|_| iter.next().is_none())
    }
}

/// A table of the counters that are not zero.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = Vec::new();
        Self::name("", &mut names);
        for (name, count) in names.iter().zip(self.to_words()).filter(|(_, count)| *count > 0) {
            writeln!(f, "{name:<32} {count:>16}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
