//! How tokens of a stretch stand out by the norms of their hidden rows: launches `kernels/saliency.cu`.

use bytemuck::{Pod, Zeroable};

use super::driver::Ptr;
use super::floats::Table;
use super::launch::{Grid, Kernel};
use super::views::{HeadRows, Heads, Positions};
use super::{Cuda, DeviceLayer, Floats, check};
use crate::backend::ops::Saliency;
use crate::error::Result;

/// Rows, stretches, norms of each view, pages, where each row's positions start, positions, weight, temperature.
type Arguments =
    (Ptr<Ptr<f32>>, Ptr<Stretch>, Ptr<HeadRows>, Ptr<u32>, Ptr<i64>, Ptr<u32>, f32, f32);
const SALIENCY: Kernel<Arguments> = Kernel::new("saliency", "saliency");

/// What a row gets. The twin of `Stretch` in `kernels/saliency.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Stretch {
    view: u32,
    begin: u32,
    count: u32,
    first: u32,
    slots: u32,
}

pub(super) fn run(
    cuda: &Cuda,
    op: &Saliency<'_>,
    layers: &[DeviceLayer<'_>],
    rows: &mut Floats,
) -> Result<()> {
    check::saliency(op, layers, rows)?;
    let mut norms = Heads::default();
    let mut stretches = Vec::with_capacity(rows.lens().len());
    let mut views = 0;
    for (layer, stretch) in layers.iter().zip(op.stretches) {
        for head in 0..layer.shape().kv_heads() {
            let before = |position| layer.slots_before(head, position) as u32;
            let (first, end) = (before(stretch.start), before(stretch.end));
            stretches.push(Stretch {
                view: views,
                begin: stretch.start,
                count: stretch.len() as u32,
                first,
                slots: end.saturating_sub(first),
            });
        }
        if !stretch.is_empty() {
            norms.push_scalars("hidden norms", layer.hidden_norms("saliency")?)?;
            views += 1;
        }
    }
    let mut table = Table::default();
    let norms = norms.into_table(&mut table);
    let positions = Positions::new(layers).into_table(&mut table);
    let stretches = table.push(&stretches);
    let sent = table.send(cuda)?;
    let arguments = (
        rows.rows(),
        sent.at(stretches),
        sent.at(norms.rows),
        sent.at(norms.pages),
        sent.at(positions.starts),
        sent.at(positions.all),
        op.weight,
        op.temperature,
    );
    SALIENCY.launch(&cuda.driver, "", Grid::new(rows.lens().len(), 1, 256), arguments)
}

#[cfg(test)]
pub(super) fn signatures() -> Vec<super::ptx::tests::Signature> {
    vec![(&SALIENCY).into()]
}
