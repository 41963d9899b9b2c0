//! How many entries carry the mass that is needed, and how much is free: launches `kernels/mass_count.cu`.

use std::ops::Range;

use super::driver::Ptr;
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::selection::Span;
use super::{Cuda, Floats, check};
use crate::error::Result;
use crate::ragged::Ragged;

/// Rows, lengths, thresholds, caps, counts.
const MASS_COUNT: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<i64>, Ptr<u32>, Ptr<u32>)> =
    Kernel::new("mass_count", "mass_count");

/// Rows, lengths, spans, where each row's spans start, masses.
const FREE_MASS: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<Span>, Ptr<u32>, Ptr<u64>)> =
    Kernel::new("mass_count", "free_mass");

const THREADS: u32 = 1024;
/// Fixed-point unit of attention mass.
const MASS_ONE: f64 = (1u64 << 40) as f64;

pub(super) fn run(
    cuda: &Cuda,
    thresholds: &[f32],
    caps: &[u32],
    mass: &Floats,
) -> Result<Vec<u32>> {
    check::mass_count(thresholds, caps, mass)?;
    let fixed = |&threshold: &f32| (f64::from(threshold) * MASS_ONE).round() as i64;
    let thresholds: Vec<i64> = thresholds.iter().map(fixed).collect();
    let mut table = Table::default();
    let (thresholds, limits) = (table.push(&thresholds), table.push(caps));
    let counts = table.push(&vec![0u32; caps.len()]);
    let sent = table.send(cuda)?;
    let arguments =
        (mass.rows(), mass.lengths(), sent.at(thresholds), sent.at(limits), sent.at(counts));
    MASS_COUNT.launch(&cuda.driver, "", Grid::new(1, caps.len(), THREADS), arguments)?;
    sent.read(counts, caps.len())
}

pub(super) fn free_mass(
    cuda: &Cuda,
    protected: &Ragged<Range<u32>>,
    rows: &Floats,
) -> Result<Vec<u64>> {
    check::free_mass(protected, rows)?;
    let spans: Vec<Span> = protected.data().iter().cloned().map(Span::from).collect();
    let firsts: Vec<u32> = protected.offsets().iter().map(|&at| at as u32).collect();
    let count = rows.lens().len();
    let mut table = Table::default();
    let (spans, firsts) = (table.push(&spans), table.push(&firsts));
    let masses = table.push(&vec![0u64; count]);
    let sent = table.send(cuda)?;
    let arguments = (rows.rows(), rows.lengths(), sent.at(spans), sent.at(firsts), sent.at(masses));
    FREE_MASS.launch(&cuda.driver, "", Grid::new(1, count, THREADS), arguments)?;
    sent.read(masses, count)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&MASS_COUNT).into(), (&FREE_MASS).into()]
}
