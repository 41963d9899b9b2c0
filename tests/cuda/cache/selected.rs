//! Caches that are filled and thinned by selections which the host never sees.

use kvbudget::Error;
use kvbudget::backend::Backend;
use kvbudget::backend::ops::{Contest, TopK};

use super::*;
use crate::device::policies;

/// The best of random scores over heads of `lens` slots, on both devices: a selection, its bounds, and its slots.
fn select(gpu: &Gpu, random: &mut Random, lens: &[u32]) -> (Selection, Vec<u32>, Ragged<u32>) {
    let mut row = |n: &u32| (0..*n).map(|_| random.below(1000) as f32).collect::<Vec<_>>();
    let scores: Ragged<f32> = lens.iter().map(&mut row).collect();
    let total: u64 = lens.iter().map(|&n| u64::from(n)).sum();
    let floors = lens.iter().map(|&n| u64::from(n.min(3))).collect();
    let contests = [Contest { segments: 0..lens.len(), budget: (total * 2 / 3).max(9), floors }];
    let protected = Ragged::filled(lens.iter().map(|_| 0), 0..0);
    let op = TopK { contests: &contests, protected: &protected };
    let slots = Cpu::new().top_k(&op, &[(&scores, 0..lens.len())]).unwrap();
    let scores = gpu.cuda.upload(scores).unwrap();
    let selection = gpu.cuda.top_k(&op, &[(&scores, 0..lens.len())]).unwrap();
    let bounds = selection.bounds().collect();
    (selection, bounds, slots)
}

fn positions(held: &[Vec<Position>], slots: &Ragged<u32>) -> Ragged<Position> {
    let rows = held.iter().zip(slots.iter());
    rows.map(|(held, slots)| slots.iter().map(|&s| held[s as usize]).collect()).collect()
}

pub fn selected(gpu: &Gpu, shape: Shape, page: Option<u32>) {
    let mut random = Random(11);
    let len = 150;
    let lens = vec![len; shape.heads as usize];
    let (selection, mut room, slots) = select(gpu, &mut random, &lens);
    let tensors = [(); 2].map(|()| shape.tensor(&mut random, shape.heads, len, Place::TokensFirst));
    let tensors = [&tensors[0], &tensors[1]];
    let all: Vec<Vec<Position>> = vec![(0..len).map(Position).collect(); shape.heads as usize];
    let kept = positions(&all, &slots);
    let host = with_rows(&Cpu::new(), &tensors, |rows| {
        let view = LayerView::new(shape.layer(), len, rows[0], rows[1]).unwrap();
        cache::FlatCache::gather(&view, &kept, 100).unwrap()
    });
    room.iter_mut().for_each(|n| *n += 20);
    let device = with_rows(gpu, &tensors, |rows| {
        let view = LayerView::new(shape.layer(), len, rows[0], rows[1]).unwrap();
        // Where a head keeps more than there is room for, it is empty, and that is said.
        let tight = vec![1; shape.heads as usize];
        let empty = FlatCache::gather_selected(&gpu.cuda, &view, &selection, 0, &tight).unwrap();
        let expected: Vec<u32> = slots.lens().map(|n| u32::from(n == 1)).collect();
        assert_eq!(empty.lens().unwrap(), expected);
        assert!(matches!(empty.check(), Err(Error::CacheFull { .. })));

        let wrong = FlatCache::gather_selected(&gpu.cuda, &view, &selection, 1, &room);
        assert!(matches!(wrong, Err(Error::Shape { what: "segments of a selection", .. })));
        match page {
            None => Cache::Flat(
                FlatCache::gather_selected(&gpu.cuda, &view, &selection, 0, &room).unwrap(),
            ),
            Some(page) => {
                let mut pool = PagePool::new(&gpu.cuda, shape.dtype, shape.dim, page, 400).unwrap();
                let cache =
                    PagedCache::gather_selected(&mut pool, &view, &selection, 0, &room).unwrap();
                Cache::Paged(cache, pool)
            }
        }
    });
    let mut twins = Twins { shape, device, host, ascending: true, engine: vec![] };
    twins.compare();
    for order in [Order::Ascending, Order::Any] {
        twins.append(gpu, &mut random, 7, Place::HeadsFirst);
        let lens = twins.host.lens().to_vec();
        let (selection, _, slots) = select(gpu, &mut random, &lens);
        twins.device.compact_selected(&selection, order).unwrap();
        let kept = positions(twins.host.positions(), &slots);
        twins.host.compact(&kept).unwrap();
        twins.ascending = order == Order::Ascending;
        twins.compare();
        twins.device.check().unwrap();
    }
    let (longer, ..) = select(gpu, &mut random, &vec![400; shape.heads as usize]);
    let error = twins.device.compact_selected(&longer, Order::Any).unwrap_err();
    assert!(matches!(error, Error::Shape { what: "slots of a selected segment", .. }));
    twins.compare();
}

#[test]
fn device_selections_are_never_read_back() {
    for (i, policy) in policies().into_iter().enumerate() {
        let shape = Shape { heads: 3, dim: 64, dtype: DTYPES[i % 3] };
        selected(&Gpu::under(policy), shape, [None, Some(8)][i % 2]);
    }
}

/// Random scores of two heads, some of them NaN, half of which are kept.
fn select_with_nan(gpu: &Gpu, len: u32, nan: &[u32]) -> Selection {
    let score = |t| if nan.contains(&t) { f32::NAN } else { (t * 37 % 101) as f32 };
    let rows: Ragged<f32> = [0, 1].map(|_| (0..len).map(score).collect()).into_iter().collect();
    let contests =
        [Contest { segments: 0..2, budget: u64::from(len), floors: vec![u64::from(len / 3); 2] }];
    let spared = nan[2].min(len - 1);
    // The second head's third NaN is one of a slot that is kept anyhow.
    let protected: Ragged<_> = [0..1, spared..spared + 1].map(|r| vec![r]).into_iter().collect();
    let op = TopK { contests: &contests, protected: &protected };
    let rows = gpu.cuda.upload(rows).unwrap();
    gpu.cuda.top_k(&op, &[(&rows, 0..2)]).unwrap()
}

pub fn nan(gpu: &Gpu) {
    let shape = Shape { heads: 2, dim: 64, dtype: Dtype::F16 };
    let mut random = Random(5);
    let tensors = [(); 2].map(|()| shape.tensor(&mut random, 2, 90, Place::TokensFirst));
    let selection = select_with_nan(gpu, 90, &[3, 7, 50]);
    assert_eq!(selection.nan_scores().unwrap(), [3, 2]);
    for page in [None, Some(8)] {
        let mut pool = PagePool::new(&gpu.cuda, shape.dtype, shape.dim, 8, 100).unwrap();
        let mut cache = with_rows(gpu, &[&tensors[0], &tensors[1]], |rows| {
            let view = LayerView::new(shape.layer(), 90, rows[0], rows[1]).unwrap();
            match page {
                None => Cache::Flat(
                    FlatCache::gather_selected(&gpu.cuda, &view, &selection, 0, &[90; 2]).unwrap(),
                ),
                Some(_) => {
                    let cache =
                        PagedCache::gather_selected(&mut pool, &view, &selection, 0, &[90; 2]);
                    Cache::Paged(cache.unwrap(), pool)
                }
            }
        });
        assert_eq!(cache.read().nan_scores().unwrap(), 5);
        for (order, sum) in [(Order::Ascending, 10), (Order::Any, 15)] {
            let again = select_with_nan(gpu, 30, &[2, 9, 20]);
            cache.compact_selected(&again, order).unwrap();
            assert_eq!(cache.read().nan_scores().unwrap(), sum);
        }
        let clean = select_with_nan(gpu, 9, &[1000, 1001, 1002]);
        cache.compact_selected(&clean, Order::Any).unwrap();
        assert_eq!(cache.read().nan_scores().unwrap(), 15);
        cache.check().unwrap();
    }
}

#[test]
fn scores_of_nan_are_counted() {
    nan(&Gpu::new());
}
