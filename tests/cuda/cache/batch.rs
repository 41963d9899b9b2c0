//! Attention over several caches at once: the bits of one after the other, at every step of their lives.

use kvbudget::Error;
use kvbudget::backend::Backend;

use super::decode::{capture, gpu_on_a_stream};
use super::lent::Blocks;
use super::*;

const TOKENS: u32 = 2;
const OP: Attend = Attend { scale: 0.25 };

/// Queries, outputs and workspace of a batch.
struct Step {
    floats: [Floats; 2],
    workspace: Workspace,
}

impl Step {
    fn new(gpu: &Gpu, heads: usize, dim: u32, bytes: usize) -> Self {
        let zeros = |len| gpu.cuda.zeros(&vec![len; heads]).unwrap();
        let floats = [zeros(TOKENS * dim), zeros(TOKENS)];
        Self { floats, workspace: Workspace::new(&gpu.cuda, bytes).unwrap() }
    }

    fn bits(&self, gpu: &Gpu) -> [Vec<u32>; 2] {
        let bits = |rows: &Floats| {
            let rows = gpu.cuda.to_host(rows).unwrap();
            rows.data().iter().map(|x| x.to_bits()).collect()
        };
        self.floats.each_ref().map(bits)
    }
}

fn members(twins: &[Twins]) -> Vec<Member<'_>> {
    twins.iter().map(|twins| twins.device.member()).collect()
}

/// The queries of one sequence among those of all.
#[allow(unsafe_code, reason = "a part of a slice")]
fn of_one<'a>(q: &Rows<'a, DeviceSlice<'a>>, i: usize, heads: u32) -> Rows<'a, DeviceSlice<'a>> {
    let elements = (heads * TOKENS) as usize * q.dim();
    let address = q.storage().address() + (i * elements * q.dtype().size()) as u64;
    // SAFETY: elements of a slice.
    let part = unsafe { DeviceSlice::new(address, elements, q.dtype()) };
    Rows::heads_first(part, heads, TOKENS, q.dim() as u32).unwrap()
}

fn one_by_one(gpu: &Gpu, twins: &[Twins], q: &Rows<'_, DeviceSlice<'_>>) -> [Vec<u32>; 2] {
    let mut all = [vec![], vec![]];
    for (i, one) in twins.iter().enumerate() {
        let heads = 2 * one.shape.heads;
        let bytes = one.device.attend_bytes(heads as usize, TOKENS);
        let mut step = Step::new(gpu, heads as usize, one.shape.dim, bytes);
        let ([out, lse], workspace) = (&mut step.floats, &mut step.workspace);
        one.device.attend(&OP, &of_one(q, i, heads), out, Some(lse), workspace).unwrap();
        for (all, one) in all.iter_mut().zip(step.bits(gpu)) {
            all.extend(one);
        }
    }
    all
}

fn together(shape: Shape) {
    let (stream, gpu) = gpu_on_a_stream();
    let mut random = Random(61);
    let caches = [((90, 80, 40), None), ((30, 70, 40), Some(8)), ((300, 60, 40), Some(16))];
    let mut twins = caches
        .map(|(size, page)| Twins::new(&gpu, shape, &mut random, size, Place::TokensFirst, page));
    twins[2].move_to_engine(&gpu, Blocks::Apart);
    let heads = 2 * 3 * shape.heads;
    let q = shape.tensor(&mut random, heads, TOKENS, Place::HeadsFirst);
    let batch = Batch::new(&members(&twins)).unwrap();
    let bytes = batch.attend_bytes(heads as usize, TOKENS).unwrap();
    let mut step = Step::new(&gpu, heads as usize, shape.dim, bytes);
    with_rows(&gpu, &[&q], |rows| {
        let mut attend = |twins: &[Twins]| {
            let ([out, lse], workspace) = (&mut step.floats, &mut step.workspace);
            batch.attend(&members(twins), &OP, &rows[0], out, Some(lse), workspace).unwrap();
        };
        // Once without a graph: modules are loaded on first use.
        attend(&twins);
        let graph = capture(&stream, || attend(&twins));
        for round in 0..4 {
            for (i, twins) in twins.iter_mut().enumerate() {
                twins.append(&gpu, &mut random, 1 + i as u32 + round, Place::HeadsFirst);
                if round == 2 {
                    twins.compact(&mut random, 60, Order::Ascending);
                }
                if let (1, Cache::Paged(cache, pool)) = (round, &mut twins.device) {
                    cache.reserve(pool, 20).unwrap();
                }
            }
            graph.launch().unwrap();
            let got = step.bits(&gpu);
            assert!(got == one_by_one(&gpu, &twins, &rows[0]), "round {round}");
        }
    });
}

#[test]
fn a_batch_has_the_bits_of_its_sequences() {
    together(Shape { heads: 2, dim: 64, dtype: Dtype::BF16 });
    together(Shape { heads: 3, dim: 40, dtype: Dtype::F32 });
}

#[test]
fn batches_of_other_caches() {
    let gpu = Gpu::new();
    let shape = Shape { heads: 2, dim: 64, dtype: Dtype::F16 };
    let mut random = Random(67);
    let mut new =
        |shape, page| Twins::new(&gpu, shape, &mut random, (20, 100, 4), Place::HeadsFirst, page);
    assert!(matches!(Batch::new(&[]), Err(Error::Zero { what: "caches of a batch" })));
    let mut twins = [new(shape, None), new(shape, Some(8))];
    let typed = [new(shape, None), new(Shape { dtype: Dtype::BF16, ..shape }, None)];
    let wide = [new(shape, None), new(Shape { dim: 128, ..shape }, None)];
    let (expected, got) = (Dtype::F16, Dtype::BF16);
    let error = Batch::new(&members(&typed)).map(drop).unwrap_err();
    assert_eq!(error, Error::Dtype { what: "caches of a batch", expected, got });
    let error = Batch::new(&members(&wide)).map(drop).unwrap_err();
    assert_eq!(error, Error::Shape { what: "head dim of a batch", expected: 64, got: 128 });

    let batch = Batch::new(&members(&twins)).unwrap();
    assert!(matches!(batch.attend_bytes(6, 1), Err(Error::HeadsNotDivisible { .. })));
    let bytes = batch.attend_bytes(8, TOKENS).unwrap();
    let mut step = Step::new(&gpu, 8, 64, bytes);
    let q = shape.tensor(&mut Random(3), 8, TOKENS, Place::HeadsFirst);
    with_rows(&gpu, &[&q], |rows| {
        let mut attend = |members: &[Member<'_>]| {
            let ([out, _], workspace) = (&mut step.floats, &mut step.workspace);
            batch.attend(members, &OP, &rows[0], out, None, workspace)
        };
        let why = "it was made of other caches, or before one of them was repacked";
        let others = Error::Unsupported { what: "batch", why };
        let all = members(&twins);
        attend(&all).unwrap();
        assert_eq!(attend(&all[..1]).unwrap_err(), others);
        assert_eq!(attend(&[all[1], all[0]]).unwrap_err(), others);
        let Cache::Flat(cache) = &mut twins[0].device else { unreachable!() };
        cache.repack(4).unwrap();
        assert_eq!(attend(&members(&twins)).unwrap_err(), others);
    });
    twins.iter().for_each(Twins::compare);
}
