//! Projections: what only the kernels refuse.

use kvbudget::Error;
use kvbudget::backend::Backend;
use kvbudget::backend::ops::Projection;
use kvbudget_testkit::data::{segment_lens, with_layers};
use kvbudget_testkit::generate::Spec;

use crate::device::Gpu;

#[test]
fn what_the_kernels_are_too_small_for() {
    let gpu = Gpu::new();
    let run = |kernel: u32, dim: u32| {
        let layers = [Spec { tokens: 40, queries: 8, dim, ..Spec::default() }.build()];
        let mut out = gpu.cuda.zeros(&segment_lens(&layers)).expect("rows");
        let op = Projection {
            window: 8,
            row_pool: Some(kernel),
            normalise: false,
            anchor: &[0..40, 0..40],
        };
        with_layers(&gpu, &layers, |views| gpu.cuda.projection(&op, views, &mut out))
    };
    run(17, 256).expect("the most");
    let what = "row pooling kernel of a projection on CUDA";
    assert_eq!(run(19, 16), Err(Error::TooLarge { what, got: 19, limit: 17 }));
    assert_eq!(
        run(7, 264),
        Err(Error::TooLarge { what: "head dim on CUDA", got: 264, limit: 256 })
    );
    assert_eq!(run(7, 6), Err(Error::Misaligned { what: "keys", got: 24, expected: 16 }));
}
