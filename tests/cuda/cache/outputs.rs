//! Attention into an engine's memory, in the engine's dtype: what f32 outputs are, rounded to nearest even.

use half::{bf16, f16};
use kvbudget::backend::Backend;
use kvbudget::backend::cuda::RowsMut;
use kvbudget::{Error, Storage};

use super::*;

const TOKENS: u32 = 2;
const OP: Attend = Attend { scale: 0.25 };

fn rounded(x: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.to_ne_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x).to_ne_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(x).to_ne_bytes().to_vec(),
    }
}

/// So many elements of all ones, which no output is.
fn blank(gpu: &Gpu, elements: usize, dtype: Dtype) -> cuda::Tensor {
    match dtype {
        Dtype::F32 => gpu.cuda.tensor(&vec![f32::from_bits(u32::MAX); elements]),
        Dtype::F16 => gpu.cuda.tensor(&vec![f16::from_bits(u16::MAX); elements]),
        Dtype::BF16 => gpu.cuda.tensor(&vec![bf16::from_bits(u16::MAX); elements]),
    }
    .unwrap()
}

#[allow(unsafe_code, reason = "the test's memory")]
fn written<'a>(rows: Rows<'a, DeviceSlice<'a>>) -> Result<RowsMut<'a>> {
    // SAFETY: tensors of the test, which nobody else uses while they are written.
    unsafe { RowsMut::new(rows) }
}

fn rounds(gpu: &Gpu, shape: Shape, page: Option<u32>) {
    let mut random = Random(51);
    let twins = Twins::new(gpu, shape, &mut random, (300, 90, 4), Place::TokensFirst, page);
    let (heads, dim) = (2 * shape.heads, shape.dim as usize);
    let q = shape.tensor(&mut random, heads, TOKENS, Place::TokensFirst);
    let bytes = twins.device.attend_bytes(heads as usize, TOKENS);
    let mut workspace = Workspace::new(&gpu.cuda, bytes).unwrap();
    let mut floats = gpu.cuda.zeros(&vec![TOKENS * shape.dim; heads as usize]).unwrap();
    with_rows(gpu, &[&q], |rows| {
        twins.device.attend(&OP, &rows[0], &mut floats, None, &mut workspace).unwrap();
        let want = gpu.cuda.to_host(&floats).unwrap();
        for dtype in DTYPES {
            // Heads first, tokens first, and tokens first with gaps.
            let wide = heads as usize * dim;
            for (head, row) in [(TOKENS as usize * dim, dim), (dim, wide), (dim, wide + 16)] {
                let elements = 1 + (heads as usize - 1) * head + (TOKENS as usize - 1) * row + dim;
                let tensor = blank(gpu, elements, dtype);
                let out =
                    Rows::strided(tensor.lend(), heads, TOKENS, shape.dim, head, row).unwrap();
                let out = written(out).unwrap();
                twins.device.attend(&OP, &rows[0], out, None, &mut workspace).unwrap();

                let mut want_bytes = vec![0xff; elements * dtype.size()];
                for h in 0..heads as usize {
                    for (i, &x) in want.row(h).iter().enumerate() {
                        let at = (h * head + i / dim * row + i % dim) * dtype.size();
                        want_bytes[at..at + dtype.size()].copy_from_slice(&rounded(x, dtype));
                    }
                }
                let mut got = vec![0; want_bytes.len()];
                gpu.cuda.synchronize().unwrap();
                read(tensor.lend().address(), &mut got);
                assert!(got == want_bytes, "{:?} to {dtype}, strides {head}, {row}", shape.dtype);
            }
        }
    });
}

#[test]
fn outputs_are_rounded_to_nearest_even() {
    rounds(&Gpu::new(), Shape { heads: 2, dim: 64, dtype: Dtype::BF16 }, None);
    rounds(&Gpu::new(), Shape { heads: 3, dim: 128, dtype: Dtype::F16 }, Some(16));
    rounds(&Gpu::new(), Shape { heads: 1, dim: 40, dtype: Dtype::F32 }, None);
}

#[test]
fn outputs_that_cannot_be_written() {
    let gpu = Gpu::new();
    let tensor = blank(&gpu, 1024, Dtype::F16);
    let strided = |heads, len, dim, head, row| {
        Rows::strided(tensor.lend(), heads, len, dim, head, row).and_then(written).map(drop)
    };
    let each_other = Error::Overlap { what: "rows of outputs", with: "each other" };
    for (head, row) in [(0, 64), (64, 64), (32, 256), (256, 32), (128, 128), (64, 192)] {
        assert_eq!(strided(4, 3, 64, head, row).unwrap_err(), each_other, "{head}, {row}");
    }
    for (head, row) in [(192, 64), (64, 256), (72, 288), (208, 72)] {
        strided(4, 3, 64, head, row).unwrap();
    }
    // Strides of one head, or of one row, mean nothing.
    strided(1, 3, 64, 0, 64).unwrap();
    strided(4, 1, 64, 64, 0).unwrap();
    assert!(matches!(strided(4, 3, 64, 64, 512), Err(Error::OutOfStorage { .. })));
    assert!(matches!(strided(2, 1, 12, 64, 16), Err(Error::Misaligned { .. })));
    assert!(matches!(strided(2, 2, 64, 64, 132), Err(Error::Misaligned { .. })));
    let ragged = Rows::ragged(tensor.lend(), 64, &[0], &[2]).and_then(written).map(drop);
    assert!(matches!(ragged, Err(Error::Unsupported { .. })));

    let shape = Shape { heads: 2, dim: 64, dtype: Dtype::F16 };
    for page in [None, Some(8)] {
        let mut random = Random(3);
        let twins = Twins::new(&gpu, shape, &mut random, (30, 100, 4), Place::HeadsFirst, page);
        let q = shape.tensor(&mut random, 4, 1, Place::HeadsFirst);
        let mut workspace = Workspace::new(&gpu.cuda, twins.device.attend_bytes(4, 1)).unwrap();
        with_rows(&gpu, &[&q], |rows| {
            let mut refused = |out: DeviceSlice<'_>, heads, len, dim| {
                let out = written(Rows::heads_first(out, heads, len, dim).unwrap()).unwrap();
                twins.device.attend(&OP, &rows[0], out, None, &mut workspace).unwrap_err()
            };
            let wrong = |what, expected, got| Error::Shape { what, expected, got };
            let heads = wrong("output rows (query heads)", 4, 3);
            assert_eq!(refused(tensor.lend(), 3, 1, 64), heads);
            assert_eq!(refused(tensor.lend(), 4, 2, 64), wrong("outputs of a query head", 1, 2));
            assert_eq!(refused(tensor.lend(), 4, 1, 56), wrong("head dim of outputs", 64, 56));
            let with = |with| Error::Overlap { what: "outputs", with };
            let (k, v) = match &twins.device {
                Cache::Flat(cache) => (cache.k(), cache.v()),
                Cache::Paged(_, pool) => (pool.k(), pool.v()),
            };
            assert_eq!(refused(rows[0].storage(), 4, 1, 64), with("queries"));
            assert_eq!(refused(k, 4, 1, 64), with("keys or values"));
            assert_eq!(refused(v, 4, 1, 64), with("keys or values"));
        });
        twins.compare();
    }
    let mut still = vec![0; 1024 * Dtype::F16.size()];
    gpu.cuda.synchronize().unwrap();
    read(tensor.lend().address(), &mut still);
    assert!(still.iter().all(|&byte| byte == 0xff), "nothing was written");
    assert_eq!(tensor.lend().elements(), 1024);
}
