//! What seeded bugs of the caches' kernels are tried on.

use super::*;

const SHAPE: Shape = Shape { heads: 3, dim: 256, dtype: Dtype::F32 };

/// Tokens one by one and several tiles at once, until there is no room.
pub fn append(gpu: &Gpu) {
    let mut random = Random(21);
    let mut twins = Twins::new(gpu, SHAPE, &mut random, (20, 70, 60), Place::TokensFirst, None);
    for new in [1, 2, 37, 1, 30, 1] {
        twins.append(gpu, &mut random, new, Place::TokensFirst);
        twins.compare();
    }
}

fn compact(gpu: &Gpu, order: Order) {
    let mut random = Random(22);
    for page in [None, Some(16)] {
        let mut twins = Twins::new(gpu, SHAPE, &mut random, (330, 97, 0), Place::HeadsFirst, page);
        twins.compact(&mut random, 90, order);
        twins.compare();
    }
}

/// In place, in order: more tiles than a warp looks at together would be slow here, two dozen do.
pub fn slide(gpu: &Gpu) {
    compact(gpu, Order::Ascending);
}

/// In place, in any order.
pub fn fill(gpu: &Gpu) {
    compact(gpu, Order::Any);
}

/// Out of place, by the host's and by the device's choice.
pub fn gather(gpu: &Gpu) {
    let mut random = Random(23);
    drop(Twins::new(gpu, SHAPE, &mut random, (100, 60, 0), Place::Paged { page: 8 }, Some(8)));
    selected::selected(gpu, SHAPE, None);
}
