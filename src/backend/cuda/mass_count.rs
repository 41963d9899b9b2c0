//! How many entries carry the mass that is needed: launches `kernels/mass_count.cu`.

use super::driver::Ptr;
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::{Cuda, Floats, check};
use crate::error::Result;

/// Rows, lengths, thresholds, caps, counts.
const MASS_COUNT: Kernel<(Ptr<Ptr<f32>>, Ptr<u32>, Ptr<i64>, Ptr<u32>, Ptr<u32>)> =
    Kernel::new("mass_count", "mass_count");

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
    MASS_COUNT.launch(&cuda.driver, "", Grid::new(1, caps.len(), 1024), arguments)?;
    sent.read(counts, caps.len())
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&MASS_COUNT).into()]
}
