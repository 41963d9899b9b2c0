//! A CPU that errs once, on purpose: whatever the suite compares must notice.
//!
//! [`Tampered`] passes every call on, notes the bits of every result, and corrupts one of them by one element.
//! Without a corruption its notes tell whether two CPUs computed the same, to the bit.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::{
    Attend, AttentionSpread, ExpectedAttention, Lag, NormScale, Pool, Positional, Projection,
    Residuals, Saliency, TopK, ValueNorm, WindowAttention,
};
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{LayerView, Ragged, Result};

use crate::data::{Elements, TestDevice};
use crate::generate::Rng;

/// Ways to be wrong in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// A number is off by a hundredth of its row's largest.
    Nudge,
    /// A finite number is NaN.
    Nan,
    /// A NaN or an infinity is zero.
    Clear,
    /// A row lacks its last entry.
    Drop,
    /// A slot is kept that should not be, for one that should.
    Swap,
    /// Two kept slots are in the wrong order.
    Unsort,
    /// A count is one too large.
    Count,
    /// An error is not reported.
    Accept,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Nudge,
        Self::Nan,
        Self::Clear,
        Self::Drop,
        Self::Swap,
        Self::Unsort,
        Self::Count,
        Self::Accept,
    ];
}

/// The CPU with one corrupted result.
pub struct Tampered {
    cpu: Cpu,
    /// What to corrupt: this many results that could be, are spared before.
    target: Option<(Mutation, u64)>,
    chances: [AtomicU64; Mutation::ALL.len()],
    notes: Mutex<Vec<u64>>,
}

impl Tampered {
    /// Only takes notes.
    pub fn honest(cpu: Cpu) -> Self {
        Self { cpu, target: None, chances: Default::default(), notes: Mutex::default() }
    }

    /// Corrupts the result number `at` of those that `mutation` can corrupt.
    pub fn new(cpu: Cpu, mutation: Mutation, at: u64) -> Self {
        Self { target: Some((mutation, at)), ..Self::honest(cpu) }
    }

    /// Results so far that `mutation` could have corrupted.
    pub fn chances(&self, mutation: Mutation) -> u64 {
        self.chances[mutation as usize].load(Ordering::Relaxed)
    }

    /// Hashes of all results so far, in the order of the calls.
    pub fn notes(&self) -> Vec<u64> {
        self.notes.lock().expect("no panic while taking notes").clone()
    }

    fn note(&self, words: impl Iterator<Item = u64>) {
        let hash = words.fold(0, |hash, word| Rng::new(hash ^ word).bits());
        self.notes.lock().expect("no panic while taking notes").push(hash);
    }

    fn strikes(&self, mutation: Mutation) -> Option<Rng> {
        let n = self.chances[mutation as usize].fetch_add(1, Ordering::Relaxed);
        (self.target == Some((mutation, n))).then(|| Rng::new(n))
    }

    fn accepted<T>(&self, result: Result<T>, nonsense: T) -> Result<T> {
        result.or_else(|e| self.strikes(Mutation::Accept).map(|_| nonsense).ok_or(e))
    }

    fn in_place(&self, result: Result<()>, rows: &mut Ragged<f32>) -> Result<()> {
        if result.is_ok() {
            self.corrupt(rows);
        }
        self.accepted(result, ())
    }

    fn made(&self, result: Result<Ragged<f32>>) -> Result<Ragged<f32>> {
        let result = result.map(|mut rows| {
            self.corrupt(&mut rows);
            rows
        });
        self.accepted(result, Ragged::default())
    }

    fn corrupt(&self, rows: &mut Ragged<f32>) {
        self.note(rows.data().iter().map(|x| u64::from(x.to_bits())));
        let places = |wanted: fn(f32) -> bool| -> Vec<(usize, usize)> {
            let of_row = |r: usize| (0..rows.len(r)).map(move |c| (r, c));
            let all = (0..rows.rows()).flat_map(of_row);
            all.filter(|&(r, c)| wanted(rows.row(r)[c])).collect()
        };
        let (finite, other) = (places(f32::is_finite), places(|x| !x.is_finite()));
        let pick = |of: &[(usize, usize)], mut rng: Rng| of[rng.below(of.len() as u64) as usize];
        if finite.is_empty() && other.is_empty() {
            return;
        }
        if !finite.is_empty() {
            if let Some(rng) = self.strikes(Mutation::Nudge) {
                let (r, c) = pick(&finite, rng);
                let row = rows.row_mut(r);
                let sizes = row.iter().map(|x| x.abs()).filter(|x| x.is_finite());
                let largest = sizes.fold(0.0, f32::max);
                let up = if largest == 0.0 { 1.0 } else { largest / 100.0 };
                row[c] = if row[c] > 0.0 { row[c] - up } else { row[c] + up };
            }
            if let Some(rng) = self.strikes(Mutation::Nan) {
                let (r, c) = pick(&finite, rng);
                rows.row_mut(r)[c] = f32::NAN;
            }
        }
        if !other.is_empty()
            && let Some(rng) = self.strikes(Mutation::Clear)
        {
            let (r, c) = pick(&other, rng);
            rows.row_mut(r)[c] = 0.0;
        }
        if let Some(rng) = self.strikes(Mutation::Drop) {
            let all = [finite, other].concat();
            *rows = without_last(rows, pick(&all, rng).0);
        }
    }

    fn corrupt_selection(&self, selection: &mut Ragged<u32>, lens: &[usize]) {
        self.note(selection.iter().flat_map(|row| {
            [row.len() as u64].into_iter().chain(row.iter().map(|&slot| u64::from(slot)))
        }));
        let rows = |wanted: &dyn Fn(usize) -> bool| -> Vec<usize> {
            (0..selection.rows()).filter(|&s| wanted(s)).collect()
        };
        let some = rows(&|s| selection.len(s) > 0);
        let several = rows(&|s| selection.len(s) > 1);
        let partial = rows(&|s| selection.len(s) > 0 && selection.len(s) < lens[s]);
        let pick = |of: &[usize], rng: &mut Rng| of[rng.below(of.len() as u64) as usize];
        if !partial.is_empty()
            && let Some(mut rng) = self.strikes(Mutation::Swap)
        {
            let s = pick(&partial, &mut rng);
            let mut slots = selection.row(s).to_vec();
            let spared: Vec<u32> = (0..lens[s] as u32).filter(|t| !slots.contains(t)).collect();
            let out = rng.below(slots.len() as u64) as usize;
            slots[out] = spared[rng.below(spared.len() as u64) as usize];
            slots.sort();
            selection.row_mut(s).copy_from_slice(&slots);
        }
        if !several.is_empty()
            && let Some(mut rng) = self.strikes(Mutation::Unsort)
        {
            let slots = selection.row_mut(pick(&several, &mut rng));
            let i = rng.below(slots.len() as u64 - 1) as usize;
            slots.swap(i, i + 1);
        }
        if !some.is_empty()
            && let Some(mut rng) = self.strikes(Mutation::Drop)
        {
            *selection = without_last(selection, pick(&some, &mut rng));
        }
    }

    fn counted<T: Copy + Into<u64> + std::ops::AddAssign + From<u8>>(
        &self,
        result: Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let result = result.map(|mut counts| {
            self.note(counts.iter().map(|&n| n.into()));
            if !counts.is_empty()
                && let Some(mut rng) = self.strikes(Mutation::Count)
            {
                let at = rng.below(counts.len() as u64) as usize;
                counts[at] += T::from(1);
            }
            counts
        });
        self.accepted(result, Vec::new())
    }
}

fn without_last<T: Copy>(rows: &Ragged<T>, short: usize) -> Ragged<T> {
    rows.iter()
        .enumerate()
        .map(|(r, row)| row[..row.len() - usize::from(r == short)].to_vec())
        .collect()
}

impl TestDevice for Tampered {
    type Backend = Self;
    type Memory = Elements;
    fn backend(&self) -> &Self {
        self
    }
    fn upload(&self, elements: &Elements) -> Elements {
        elements.clone()
    }
    fn lend<'a>(&self, memory: &'a Elements) -> HostSlice<'a> {
        self.cpu.lend(memory)
    }
}

type Layers<'a, 'b> = &'a [LayerView<'b, HostSlice<'b>>];

/// Passes calls on: `in_place` ones may spoil their last argument, `made` and `counted` ones what they return.
macro_rules! pass_on {
    ($($how:ident $name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        $(pass_on! { @ $how $name($($arg: $type),*) -> $out })*
    };
    (@ in_place $name:ident($($arg:ident: $type:ty),*) -> $out:ty) => {
        fn $name(&self, $($arg: $type,)* rows: &mut Ragged<f32>) -> $out {
            self.in_place(self.cpu.$name($($arg,)* rows), rows)
        }
    };
    (@ $how:ident $name:ident($($arg:ident: $type:ty),*) -> $out:ty) => {
        fn $name(&self, $($arg: $type),*) -> $out {
            self.$how(self.cpu.$name($($arg),*))
        }
    };
}

impl Backend for Tampered {
    type Storage<'a> = HostSlice<'a>;
    type Floats = Ragged<f32>;
    type Selection = Ragged<u32>;
    type Counts = Vec<u64>;

    pass_on! {
        made zeros(lens: &[u32]) -> Result<Ragged<f32>>;
        made slice(rows: &Ragged<f32>, range: Range<usize>) -> Result<Ragged<f32>>;
        made coarsen(units: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Ragged<f32>>;
        made pick(slots: &Ragged<u32>, rows: &Ragged<f32>) -> Result<Ragged<f32>>;
        counted count_nan(rows: &Ragged<f32>) -> Result<Vec<u64>>;
        counted mass_count(thresholds: &[f32], caps: &[u32], mass: &Ragged<f32>) -> Result<Vec<u32>>;
        counted free_mass(protected: &Ragged<Range<u32>>, rows: &Ragged<f32>) -> Result<Vec<u64>>;
        counted selected(selection: &Ragged<u32>) -> Result<Vec<u32>>;
        in_place pool(op: &Pool<'_>) -> Result<()>;
        in_place projection(op: &Projection<'_>, layers: Layers<'_, '_>) -> Result<()>;
        in_place expected_attention(op: ExpectedAttention, layers: Layers<'_, '_>) -> Result<()>;
        in_place value_norm(op: ValueNorm, layers: Layers<'_, '_>) -> Result<()>;
        in_place scale_norms(op: NormScale, layers: Layers<'_, '_>) -> Result<()>;
        in_place key_norm(layers: Layers<'_, '_>) -> Result<()>;
        in_place key_diff(layers: Layers<'_, '_>) -> Result<()>;
        in_place lag(op: &Lag, layers: Layers<'_, '_>) -> Result<()>;
        made keys(slots: &[Range<u32>], layers: Layers<'_, '_>) -> Result<Ragged<f32>>;
        in_place residual_norms(op: &Residuals<'_>, layers: Layers<'_, '_>) -> Result<()>;
        in_place saliency(op: &Saliency<'_>, layers: Layers<'_, '_>) -> Result<()>;
        in_place positional(op: Positional, layers: Layers<'_, '_>) -> Result<()>;
        in_place floor_at_mean(lens: &[u32]) -> Result<()>;
        in_place weigh(epsilon: f32, scores: &Ragged<f32>) -> Result<()>;
        in_place raise(by: &Ragged<f32>) -> Result<()>;
        in_place pin_top(counts: &[u32], by: &Ragged<f32>) -> Result<()>;
        in_place drop_top(counts: &[u32], by: &Ragged<f32>) -> Result<()>;
        in_place rank(protected: &Ragged<Range<u32>>, weights: &[f32]) -> Result<()>;
        in_place share_heads(heads: &[usize]) -> Result<()>;
    }

    fn lens(&self, rows: &Ragged<f32>) -> Vec<u32> {
        self.cpu.lens(rows)
    }
    fn to_host(&self, rows: &Ragged<f32>) -> Result<Ragged<f32>> {
        self.cpu.to_host(rows)
    }
    fn counts_to_host(&self, counts: &Vec<u64>) -> Result<Vec<u64>> {
        self.cpu.counts_to_host(counts)
    }
    fn upload(&self, rows: Ragged<f32>) -> Result<Ragged<f32>> {
        Backend::upload(&self.cpu, rows)
    }
    fn selection_to_host(&self, selection: &Ragged<u32>) -> Result<Ragged<u32>> {
        self.cpu.selection_to_host(selection)
    }

    fn window_attention(
        &self,
        op: &WindowAttention,
        layers: Layers<'_, '_>,
        out: &mut Ragged<f32>,
        mut mean: Option<&mut Ragged<f32>>,
    ) -> Result<()> {
        let result = self.cpu.window_attention(op, layers, out, mean.as_deref_mut());
        match mean {
            Some(mean) => self.in_place(self.in_place(result, out), mean),
            None => self.in_place(result, out),
        }
    }

    fn attention_spread(
        &self,
        op: AttentionSpread,
        layers: Layers<'_, '_>,
        out: &mut Ragged<f32>,
        sums: &mut Ragged<f32>,
    ) -> Result<()> {
        let result = self.cpu.attention_spread(op, layers, out, sums);
        self.in_place(self.in_place(result, out), sums)
    }

    fn attend(
        &self,
        op: &Attend,
        sequences: &[AttendView<'_, HostSlice<'_>>],
        out: &mut Ragged<f32>,
        mut lse: Option<&mut Ragged<f32>>,
    ) -> Result<()> {
        let result = self.cpu.attend(op, sequences, out, lse.as_deref_mut());
        match lse {
            Some(lse) => self.in_place(self.in_place(result, out), lse),
            None => self.in_place(result, out),
        }
    }

    fn top_k(&self, op: &TopK<'_>, parts: &[(&Ragged<f32>, Range<usize>)]) -> Result<Ragged<u32>> {
        let result = self.cpu.top_k(op, parts).map(|mut selection| {
            let rows = |(part, rows): &(&Ragged<f32>, Range<usize>)| -> Vec<usize> {
                rows.clone().map(|r| part.len(r)).collect()
            };
            self.corrupt_selection(
                &mut selection,
                &parts.iter().flat_map(rows).collect::<Vec<_>>(),
            );
            selection
        });
        self.accepted(result, Ragged::default())
    }
}
