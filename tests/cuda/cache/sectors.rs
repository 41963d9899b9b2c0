//! How much memory the copies touch: of rows at multiples of 256 bytes, whole sectors and no other.

use super::*;

#[test]
fn sectors_are_used_whole() {
    let gpu = Gpu::new();
    if simcuda::install() == simcuda::Installed::RealDriver {
        return;
    }
    let shape = Shape { heads: 2, dim: 128, dtype: Dtype::BF16 };
    let mut random = Random(31);
    let mut twins = Twins::new(&gpu, shape, &mut random, (900, 90, 70), Place::TokensFirst, None);
    twins.append(&gpu, &mut random, 64, Place::HeadsFirst);
    twins.compact(&mut random, 90, Order::Ascending);
    twins.compact(&mut random, 90, Order::Any);
    twins.compare();
    for kernel in ["gather", "append", "slide", "fill"] {
        let counts = simcuda::counters(gpu.ordinal, kernel).1;
        for (what, n) in [("loads", counts.global_load), ("stores", counts.global_store)] {
            let ratio = n.sectors as f64 / n.ideal_sectors as f64;
            println!("{kernel}: {} {what}, {ratio:.3} of the ideal sectors", n.sectors);
            let most = match (kernel, what) {
                // Bisection reads words of the list of slots, which lie apart.
                ("fill", "loads") => 1.1,
                // Positions, four bytes each, go to holes, which lie apart.
                ("fill", "stores") => 1.03,
                _ => 1.02,
            };
            assert!(ratio <= most, "{kernel}: {ratio} of the ideal sectors of {what}");
        }
    }
}
