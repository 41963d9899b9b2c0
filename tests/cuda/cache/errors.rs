//! Bad input is an error that names its cause, the host's error where there is one, and nothing has changed after it.

use kvbudget::plan::CheckError;
use kvbudget::{Error, KvHead, LayerId};

use super::*;

fn ragged(rows: &[&[u32]]) -> Ragged<Position> {
    rows.iter().map(|r| r.iter().copied().map(Position).collect::<Vec<_>>()).collect()
}

/// Two heads, all of 8 tokens, flat or paged.
fn small(gpu: &Gpu, page: Option<u32>) -> Twins {
    let shape = Shape { heads: 2, dim: 8, dtype: Dtype::BF16 };
    let mut twins = Twins::new(gpu, shape, &mut Random(1), (8, 100, 2), Place::TokensFirst, page);
    twins.append(gpu, &mut Random(2), 1, Place::HeadsFirst);
    twins
}

#[test]
fn bad_kept_positions_change_nothing() {
    let gpu = Gpu::new();
    let (layer, head) = (LayerId(0), KvHead(1));
    let order = CheckError::Order { layer, head, previous: Position(2), got: Position(1) };
    let missing = CheckError::NotHeld { layer, head, got: Position(9), tokens: 9 };
    let heads = |got| Error::Shape { what: "heads of the kept positions", expected: 2, got };
    let cases: [(Ragged<Position>, Error); 4] = [
        (ragged(&[]), heads(0)),
        (ragged(&[&[8], &[8], &[]]), heads(3)),
        (ragged(&[&[8], &[2, 1]]), order.into()),
        (ragged(&[&[8], &[8, 9]]), missing.into()),
    ];
    for page in [None, Some(4)] {
        let mut twins = small(&gpu, page);
        // Whatever `some_of` left: the newest token is in every head.
        for (kept, error) in &cases {
            if matches!(error, Error::Check(CheckError::Order { .. })) {
                assert!(twins.device.compact(kept, Order::Any).is_err());
            } else {
                assert_eq!(twins.device.compact(kept, Order::Ascending).unwrap_err(), *error);
            }
            twins.compare();
        }
    }
}

#[test]
fn bad_appends_change_nothing() {
    let gpu = Gpu::new();
    let mut random = Random(3);
    let mut tensor = |heads, dim, dtype, len, place| {
        Shape { heads, dim, dtype }.tensor(&mut random, heads, len, place)
    };
    let good = tensor(2, 8, Dtype::BF16, 1, Place::HeadsFirst);
    let typed = tensor(2, 8, Dtype::F32, 1, Place::HeadsFirst);
    let wide = tensor(2, 16, Dtype::BF16, 1, Place::HeadsFirst);
    let three = tensor(3, 8, Dtype::BF16, 1, Place::HeadsFirst);
    let longer = tensor(2, 8, Dtype::BF16, 2, Place::Paged { page: 1 });
    let dtype = |what| Error::Dtype { what, expected: Dtype::BF16, got: Dtype::F32 };
    let shape = |what, expected, got| Error::Shape { what, expected, got };
    let cases = [
        ([&typed, &good], dtype("new keys")),
        ([&good, &typed], dtype("new values")),
        ([&good, &three], shape("heads of new keys and values", 2, 3)),
        ([&wide, &good], shape("head dim of new keys and values", 8, 16)),
        ([&good, &longer], shape("new values of a head", 1, 2)),
    ];
    for page in [None, Some(3)] {
        let mut twins = small(&gpu, page);
        for (tensors, error) in &cases {
            with_rows(&gpu, tensors, |rows| {
                assert_eq!(twins.device.append(&rows[0], &rows[1]).unwrap_err(), *error);
            });
            twins.compare();
        }
        // No room: said by the counter, with the head that is full.
        with_rows(&gpu, &[&longer, &longer], |rows| {
            for _ in 0..9 {
                twins.device.append(&rows[0], &rows[1]).unwrap();
            }
        });
        let error = twins.device.check().unwrap_err();
        assert!(matches!(error, Error::CacheFull { .. }), "{error}");
    }
}

#[test]
fn rows_that_are_not_aligned_and_foreign_pools() {
    let gpu = Gpu::new();
    let mut random = Random(4);
    let odd = Shape { heads: 2, dim: 12, dtype: Dtype::F16 };
    let tensors = [(); 2].map(|()| odd.tensor(&mut random, 2, 5, Place::HeadsFirst));
    let kept = ragged(&[&[0, 3], &[1]]);
    with_rows(&gpu, &[&tensors[0], &tensors[1]], |rows| {
        let view = LayerView::new(odd.layer(), 5, rows[0], rows[1]).unwrap();
        let error = FlatCache::gather(&gpu.cuda, &view, &kept, 0).map(drop).unwrap_err();
        assert!(matches!(error, Error::Misaligned { .. }), "{error}");
    });
    assert!(matches!(
        PagePool::new(&gpu.cuda, Dtype::F16, 12, 4, 1).map(drop),
        Err(Error::Misaligned { .. })
    ));
    assert!(matches!(
        PagePool::new(&gpu.cuda, Dtype::F32, 0, 4, 1).map(drop),
        Err(Error::Zero { .. })
    ));
    assert!(matches!(
        PagePool::new(&gpu.cuda, Dtype::F32, 4, 0, 1).map(drop),
        Err(Error::Zero { .. })
    ));

    let shape = Shape { heads: 2, dim: 8, dtype: Dtype::F32 };
    let tensors = [(); 2].map(|()| shape.tensor(&mut random, 2, 5, Place::HeadsFirst));
    with_rows(&gpu, &[&tensors[0], &tensors[1]], |rows| {
        let view = LayerView::new(shape.layer(), 5, rows[0], rows[1]).unwrap();
        let pool = |dtype, dim, pages| PagePool::new(&gpu.cuda, dtype, dim, 2, pages).unwrap();
        let mut one = pool(Dtype::F32, 8, 9);
        let mut cache = PagedCache::gather(&mut one, &view, &kept, 2).unwrap();
        assert_eq!((cache.tables().concat().len(), one.free_pages()), (4, 5));
        let mut other = pool(Dtype::F32, 8, 1);
        let foreign =
            Error::Unsupported { what: "page pool", why: "the cache's pages are of another pool" };
        assert_eq!(cache.append(&mut other, &rows[0], &rows[1]).unwrap_err(), foreign);
        assert_eq!(cache.compact(&mut other, &kept, Order::Any).unwrap_err(), foreign);
        assert_eq!(cache.reserve(&mut other, 1).unwrap_err(), foreign);
        assert_eq!(cache.release(&mut other).unwrap_err(), foreign);
        let dry = PagedCache::gather(&mut other, &view, &kept, 0).map(drop).unwrap_err();
        assert_eq!(dry, Error::OutOfPages { needed: 2, free: 1 });
        let mut wide = pool(Dtype::F32, 16, 9);
        let error = PagedCache::gather(&mut wide, &view, &kept, 0).map(drop).unwrap_err();
        assert_eq!(error, Error::Shape { what: "head dim of a page pool", expected: 16, got: 8 });

        // Pages beyond what the slots need go back, and come again.
        cache.reserve(&mut one, 0).unwrap();
        assert_eq!((cache.capacity(), one.free_pages()), (&[2, 2][..], 7));
        assert!(matches!(cache.reserve(&mut one, 3), Err(Error::CacheFull { .. })));
        cache.reserve(&mut one, 2).unwrap();
        assert_eq!((cache.capacity(), one.free_pages()), (&[4, 3][..], 5));
        cache.release(&mut one).unwrap();
        assert_eq!((cache.lens().unwrap(), one.free_pages()), (vec![0, 0], 9));
    });
}
