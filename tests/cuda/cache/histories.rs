//! Random histories, over dtypes, row lengths, borrowed layouts and page sizes. After each step contents are compared
//! bit for bit.

use super::*;
use crate::device::policies;

const PLACES: [Place; 6] = [
    Place::HeadsFirst,
    Place::TokensFirst,
    Place::Gapped,
    Place::Ragged { slack: 2 },
    Place::Paged { page: 4 },
    Place::Paged { page: 5 },
];

/// Steps on one cache, for as many shapes and layouts as there are seeds.
fn history(gpu: &Gpu, shape: Shape, seed: u64, page: Option<u32>) {
    let mut random = Random(seed);
    let place = |random: &mut Random| PLACES[random.below(6) as usize];
    let from = place(&mut random);
    let size = (40 + random.below(120) as u32, 60, 20);
    let mut twins = Twins::new(gpu, shape, &mut random, size, from, page);
    for _ in 0..8 {
        match random.below(6) {
            0 | 1 => {
                let (new, place) = (random.below(9) as u32, place(&mut random));
                twins.append(gpu, &mut random, new, place);
            }
            2 => twins.compact(&mut random, 70, Order::Ascending),
            3 => twins.compact(&mut random, 80, Order::Any),
            4 => match &mut twins.device {
                Cache::Flat(cache) => cache.repack(random.below(30) as u32).unwrap(),
                Cache::Paged(cache, pool) => {
                    // Beyond what was booked it is an error, and nothing changes.
                    let taken = pool.pages() - pool.free_pages();
                    if cache.reserve(pool, random.below(30) as u32).is_err() {
                        assert_eq!(pool.pages() - pool.free_pages(), taken);
                    }
                }
            },
            _ => regather(gpu, &mut twins, &mut random, page),
        }
        twins.compare();
    }
    if let Cache::Paged(mut cache, mut pool) = twins.device {
        cache.release(&mut pool).unwrap();
        assert_eq!(pool.free_pages(), pool.pages());
    }
}

/// Gathers some of a cache into another one: its view is as good as an engine's.
fn regather(gpu: &Gpu, twins: &mut Twins, random: &mut Random, page: Option<u32>) {
    let kept = some_of(random, twins.host.positions(), 70);
    let next = {
        let snapshot = twins.device.read();
        let view = snapshot.view(twins.shape.layer());
        if !twins.ascending {
            assert!(view.is_err(), "slots in no order are not lent for scoring");
            return;
        }
        Cache::gather(&gpu.cuda, &view.unwrap(), &kept, 25, page).unwrap()
    };
    twins.device = next;
    twins.host.compact(&kept).unwrap();
}

fn histories(dim: u32, dtype: Dtype) {
    let policies = policies();
    let shape = Shape { heads: 3, dim, dtype };
    for (seed, page) in [(1, None), (2, Some(4)), (3, None), (4, Some(16)), (5, None), (6, Some(7))]
    {
        let policy = policies[seed as usize % policies.len()];
        history(&Gpu::under(policy), shape, seed * 1000 + u64::from(dim), page);
    }
}

#[test]
fn rows_of_64() {
    DTYPES.into_iter().for_each(|dtype| histories(64, dtype));
}

#[test]
fn rows_of_128() {
    DTYPES.into_iter().for_each(|dtype| histories(128, dtype));
}

#[test]
fn odd_multiples_of_16_bytes() {
    [(4, Dtype::F32), (12, Dtype::F32), (24, Dtype::BF16), (40, Dtype::F16), (200, Dtype::F32)]
        .into_iter()
        .for_each(|(dim, dtype)| histories(dim, dtype));
}

/// More tiles than a warp looks back over, and the edges of tiles.
#[test]
fn many_tiles() {
    let shape = Shape { heads: 2, dim: 256, dtype: Dtype::F32 };
    for (i, policy) in policies().into_iter().enumerate() {
        let gpu = Gpu::under(policy);
        let mut random = Random(7);
        for (order, page) in [(Order::Ascending, None), (Order::Any, Some(32))] {
            let len = 700 + i as u32;
            let mut twins =
                Twins::new(&gpu, shape, &mut random, (len, 95, 40), Place::TokensFirst, page);
            twins.compact(&mut random, 90, order);
            twins.append(&gpu, &mut random, 33, Place::HeadsFirst);
            twins.compare();
        }
    }
}
