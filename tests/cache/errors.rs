//! Bad input is an error that names its cause, and nothing has changed after it.

use kvbudget::backend::cpu::HostSlice;
use kvbudget::cache::{FlatCache, PagePool, PagedCache};
use kvbudget::plan::CheckError;
use kvbudget::{Dtype, Error, KvHead, LayerId, LayerShape, Position, Ragged, Rows};

use super::lent::{Borrow, Lent};
use super::model::{Model, Shape, free_list, rows_of, see_flat, see_paged};

/// A cache of two heads, `[0, 2, 5]` and `[1, 2, 3, 7]` of 8 tokens, and its pool.
fn small() -> (Shape, FlatCache, PagedCache, PagePool) {
    let shape = Shape { heads: 2, dim: 3, dtype: Dtype::BF16 };
    let lent = Lent::new(shape, &Model::fresh(shape, 0, 8), Borrow::TokensFirst);
    let kept = ragged(&[&[0, 2, 5], &[1, 2, 3, 7]]);
    let mut pool = PagePool::new(shape.dtype, 3, 2, 5).unwrap();
    let flat = FlatCache::gather(&lent.view(shape), &kept, 2).unwrap();
    let paged = PagedCache::gather(&mut pool, &lent.view(shape), &kept, 2).unwrap();
    (shape, flat, paged, pool)
}

fn ragged(rows: &[&[u32]]) -> Ragged<Position> {
    rows.iter().map(|r| r.iter().copied().map(Position).collect::<Vec<_>>()).collect()
}

#[test]
fn bad_kept_positions_change_nothing() {
    let order = |head, previous, got| {
        let (layer, head) = (LayerId(0), KvHead(head));
        Error::from(CheckError::Order {
            layer,
            head,
            previous: Position(previous),
            got: Position(got),
        })
    };
    let missing = |head, got| {
        let (layer, head) = (LayerId(0), KvHead(head));
        Error::from(CheckError::NotHeld { layer, head, got: Position(got), tokens: 8 })
    };
    let heads = |got| Error::Shape { what: "heads of the kept positions", expected: 2, got };
    let cases: [(Ragged<Position>, Error); 8] = [
        (ragged(&[]), heads(0)),
        (ragged(&[&[0]]), heads(1)),
        (ragged(&[&[0], &[1], &[]]), heads(3)),
        (ragged(&[&[0], &[2, 1]]), order(1, 2, 1)),
        (ragged(&[&[2, 2], &[1]]), order(0, 2, 2)),
        (ragged(&[&[0], &[1, 4]]), missing(1, 4)),
        (ragged(&[&[0, 8], &[]]), missing(0, 8)),
        (ragged(&[&[u32::MAX], &[]]), missing(0, u32::MAX)),
    ];
    let (shape, mut flat, mut paged, mut pool) = small();
    let (_, mut other, ..) = small();
    let seen = (see_flat(shape, &flat), see_paged(shape, &paged, &pool), free_list(&pool));
    for (kept, error) in cases {
        assert_eq!(flat.compact(&kept).unwrap_err(), error);
        assert_eq!(paged.compact(&mut pool, &kept).unwrap_err(), error);
        assert_eq!(
            FlatCache::gather(&flat.view(shape.layer()).unwrap(), &kept, 0).unwrap_err(),
            error
        );
        assert_eq!(
            other.regather(&flat.view(shape.layer()).unwrap(), &kept, 0).unwrap_err(),
            error
        );
        let lent = flat.view(shape.layer()).unwrap();
        assert_eq!(PagedCache::gather(&mut pool, &lent, &kept, 0).unwrap_err(), error);
        let now = (see_flat(shape, &flat), see_paged(shape, &paged, &pool), free_list(&pool));
        assert_eq!(now, seen);
        assert_eq!(see_flat(shape, &other), seen.0);
    }
    // A dense layer holds what it is long, not what the sequence is.
    let short = Model::fresh(shape, 0, 3);
    let lent = Lent::new(shape, &Model { tokens: 8, ..short }, Borrow::HeadsFirst);
    let dense = lent.dense_view(shape);
    let error = FlatCache::gather(&dense, &ragged(&[&[0, 2], &[3]]), 0).unwrap_err();
    assert_eq!(error, missing(1, 3));
}

#[test]
fn bad_appends_change_nothing() {
    let (shape, mut flat, mut paged, mut pool) = small();
    let (halves, floats) = ([half::bf16::ONE; 64], [1f32; 64]);
    let rows =
        |heads, len, dim| Rows::heads_first(HostSlice::BF16(&halves), heads, len, dim).unwrap();
    let good = rows(2, 1, 3);
    let typed = Rows::heads_first(HostSlice::F32(&floats), 2, 1, 3).unwrap();
    let uneven = Rows::ragged(HostSlice::BF16(&halves), 3, &[0, 2], &[1, 2]).unwrap();
    let shape_error = |what, expected, got| Error::Shape { what, expected, got };
    let dtype = |what| Error::Dtype { what, expected: Dtype::BF16, got: Dtype::F32 };
    let (heads, dim) = ("heads of new keys and values", "head dim of new keys and values");
    let cases = [
        (typed, good, dtype("new keys")),
        (good, typed, dtype("new values")),
        (rows(1, 1, 3), good, shape_error(heads, 2, 1)),
        (good, rows(3, 1, 3), shape_error(heads, 2, 3)),
        (rows(2, 1, 4), good, shape_error(dim, 3, 4)),
        (good, rows(2, 1, 2), shape_error(dim, 3, 2)),
        (uneven, good, shape_error("new keys of a head", 1, 2)),
        (good, uneven, shape_error("new values of a head", 1, 2)),
        (good, rows(2, 2, 3), shape_error("new values of a head", 1, 2)),
        (rows(2, 0, 3), good, shape_error("new values of a head", 0, 1)),
        (
            rows(2, 3, 3),
            rows(2, 3, 3),
            Error::CacheFull { head: KvHead(0), len: 3, capacity: 5, new: 3 },
        ),
    ];
    let seen = (see_flat(shape, &flat), see_paged(shape, &paged, &pool), free_list(&pool));
    for (k, v, error) in &cases {
        assert_eq!(flat.append(k, v).unwrap_err(), *error);
        assert_eq!(paged.append(&mut pool, k, v).unwrap_err(), *error);
        let now = (see_flat(shape, &flat), see_paged(shape, &paged, &pool), free_list(&pool));
        assert_eq!(now, seen);
    }
    // No token is fine.
    let none = rows(2, 0, 3);
    flat.append(&none, &none).unwrap();
    paged.append(&mut pool, &none, &none).unwrap();
    let now = (see_flat(shape, &flat), see_paged(shape, &paged, &pool), free_list(&pool));
    assert_eq!(now, seen);
    // One page is free; two tokens need two: head 0 starts its third, and so does head 1.
    let two = rows(2, 2, 3);
    let error = paged.append(&mut pool, &two, &two).unwrap_err();
    assert_eq!(error, Error::OutOfPages { needed: 2, free: 1 });
    assert_eq!(see_paged(shape, &paged, &pool), seen.1);
}

#[test]
fn foreign_pools_and_over_large_requests_are_errors() {
    let (shape, flat, mut paged, mut pool) = small();
    let (seen, free) = (see_paged(shape, &paged, &pool), free_list(&pool));
    let mut other = PagePool::new(Dtype::BF16, 3, 2, 5).unwrap();
    let halves = [half::bf16::ONE; 6];
    let rows = Rows::heads_first(HostSlice::BF16(&halves), 2, 1, 3).unwrap();
    let kept = ragged(&[&[0], &[1]]);
    let foreign =
        Error::Unsupported { what: "page pool", why: "the cache's pages are of another pool" };
    assert_eq!(paged.compact(&mut other, &kept).unwrap_err(), foreign);
    assert_eq!(paged.append(&mut other, &rows, &rows).unwrap_err(), foreign);
    assert_eq!(paged.release(&mut other).unwrap_err(), foreign);
    assert_eq!(paged.view(&other, shape.layer()).unwrap_err(), foreign);
    assert_eq!(paged.attend_view(&other, rows).unwrap_err(), foreign);
    assert_eq!((see_paged(shape, &paged, &pool), free_list(&pool)), (seen, free));
    assert_eq!(other.free_pages(), 5);

    let view = flat.view(shape.layer()).unwrap();
    let mut wide = PagePool::new(Dtype::BF16, 4, 2, 9).unwrap();
    let error = PagedCache::gather(&mut wide, &view, &kept, 0).unwrap_err();
    assert_eq!(error, Error::Shape { what: "head dim of a page pool", expected: 4, got: 3 });
    let mut typed = PagePool::new(Dtype::F16, 3, 2, 9).unwrap();
    let error = PagedCache::gather(&mut typed, &view, &kept, 0).unwrap_err();
    let (expected, got) = (Dtype::F16, Dtype::BF16);
    assert_eq!(error, Error::Dtype { what: "layer for a page pool", expected, got });
    let three = ragged(&[&[0, 2], &[1]]);
    let error = PagedCache::gather(&mut pool, &view, &three, 0).unwrap_err();
    assert_eq!(error, Error::OutOfPages { needed: 2, free: 1 });
    assert_eq!(pool.free_pages(), 1);

    assert!(matches!(PagePool::new(Dtype::F32, 0, 1, 1), Err(Error::Zero { .. })));
    assert!(matches!(PagePool::new(Dtype::F32, 1, 0, 1), Err(Error::Zero { .. })));
    let huge = PagePool::new(Dtype::F32, u32::MAX, i32::MAX as u32, u32::MAX);
    assert!(matches!(huge, Err(Error::OutOfMemory { .. })));
    assert!(matches!(PagePool::new(Dtype::F32, 1, u32::MAX, 1), Err(Error::TooLarge { .. })));
    let huge = FlatCache::gather(&view, &kept, u32::MAX);
    assert!(matches!(huge, Err(Error::TooLarge { .. })));
    let wrong = LayerShape::new(4, 4, 3).unwrap();
    assert!(matches!(flat.view(wrong), Err(Error::Shape { .. })));
    assert!(matches!(paged.view(&pool, wrong), Err(Error::Shape { .. })));
}

#[test]
fn tokens_stay_below_the_limit() {
    let shape = Shape { heads: 1, dim: 1, dtype: Dtype::F32 };
    let last = (1 << 31) - 2;
    let lent = Lent::new(shape, &Model::fresh(shape, last, 1), Borrow::HeadsFirst);
    let mut flat = FlatCache::gather(&lent.view(shape), &ragged(&[&[last]]), 4).unwrap();
    let more = lent.view(shape);
    let error = flat.append(more.k(), more.v()).unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "tokens of a sequence", .. }), "{error}");
    assert_eq!(flat.tokens(), last + 1);
}

#[test]
fn attention_sees_the_rows_that_scoring_sees() {
    let (shape, flat, paged, pool) = small();
    let halves = [half::bf16::ONE; 12];
    let q = Rows::heads_first(HostSlice::BF16(&halves), 4, 1, 3).unwrap();
    let scored = flat.view(shape.layer()).unwrap();
    for view in [flat.attend_view(q).unwrap(), paged.attend_view(&pool, q).unwrap()] {
        assert_eq!(rows_of(&view.q), rows_of(&q));
        assert_eq!(rows_of(&view.k), rows_of(scored.k()));
        assert_eq!(rows_of(&view.v), rows_of(scored.v()));
    }
}
