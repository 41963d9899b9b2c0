//! Random histories of gather, compact, append and repack, over dtypes, borrowed layouts, page sizes and
//! pools that run dry. After each step contents are compared bit for bit, capacity and pages counted.

use kvbudget::cache::{FlatCache, PagePool, PagedCache};
use kvbudget::{Dtype, Error, KvHead, Position, Ragged};
use proptest::prelude::*;

use super::lent::{Borrow, Lent};
use super::model::{DTYPES, Model, Shape, free_list, random_subset, see_flat, see_paged};

/// One sequence: the model and the same thing twice.
struct Sequence {
    model: Model,
    flat: FlatCache,
    paged: PagedCache,
    capacity: Vec<Vec<u32>>,
}

fn pages(lens: &[u32], page: u32) -> usize {
    lens.iter().map(|n| n.div_ceil(page) as usize).sum()
}

impl Sequence {
    fn check(&self, shape: Shape, pool: &PagePool) {
        let row = (shape.dim as usize * shape.dtype.size()) as u64;
        let lens = self.model.lens();
        let used = 2 * row * lens.iter().map(|&n| u64::from(n)).sum::<u64>();
        let [flat, paged] = &self.capacity[..] else { unreachable!() };

        let (model, got_lens, capacity, starts, _, bytes) = see_flat(shape, &self.flat);
        assert_eq!(model, self.model);
        assert_eq!((&got_lens, &capacity), (&lens, flat));
        let sums: Vec<u64> = std::iter::once(0)
            .chain(flat.iter().scan(0, |sum, &n| {
                *sum += u64::from(n);
                Some(*sum)
            }))
            .collect();
        assert_eq!(starts, sums[..flat.len()]);
        assert_eq!(bytes, [used, 2 * row * sums[flat.len()]]);
        assert_eq!(self.flat.cu_len(), (lens == *flat).then_some(&sums[..]));

        let (model, got_lens, capacity, _, tables, bytes) = see_paged(shape, &self.paged, pool);
        assert_eq!(model, self.model);
        assert_eq!((&got_lens, &capacity), (&lens, paged));
        for (table, &len) in tables.iter().zip(&lens) {
            assert_eq!(table.len(), pages(&[len], pool.page()));
        }
        let reserved = pages(&lens, pool.page()) as u64 * u64::from(pool.page());
        assert_eq!(bytes, [used, 2 * row * reserved]);
    }
}

/// Each page is in one table, once, or free.
fn check_pages(pool: &PagePool, sequences: &[Sequence]) {
    let free = free_list(pool);
    assert_eq!(free.len(), pool.free_pages() as usize);
    let taken = sequences.iter().flat_map(|s| s.paged.tables()).flatten().copied();
    let mut all: Vec<u32> = free.into_iter().chain(taken).collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..pool.pages()));
}

#[derive(Debug, Clone)]
enum Step {
    Compact { seed: u64, percent: u64 },
    Append { new: u32, borrow: Borrow },
    Repack { slack: u32 },
    Regather { seed: u64, percent: u64, slack: u32, borrow: Borrow },
}

fn borrow() -> impl Strategy<Value = Borrow> {
    prop_oneof![
        Just(Borrow::HeadsFirst),
        Just(Borrow::TokensFirst),
        (0usize..4, 0usize..3).prop_map(|(row, head)| Borrow::Gaps { row, head }),
        (0u64..4).prop_map(|slack| Borrow::Ragged { slack }),
        (1u32..6).prop_map(|page| Borrow::Paged { page }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let percent = prop_oneof![Just(0u64), Just(100), 1u64..100];
    prop_oneof![
        2 => (any::<u64>(), percent.clone())
            .prop_map(|(seed, percent)| Step::Compact { seed, percent }),
        3 => (0u32..5, borrow()).prop_map(|(new, borrow)| Step::Append { new, borrow }),
        1 => (0u32..8).prop_map(|slack| Step::Repack { slack }),
        1 => (any::<u64>(), percent, 0u32..8, borrow()).prop_map(
            |(seed, percent, slack, borrow)| Step::Regather { seed, percent, slack, borrow }
        ),
    ]
}

/// What the model says about an append to the flat and to the paged cache.
fn append_errors(seq: &Sequence, pool: &PagePool, new: u32) -> [Option<Error>; 2] {
    let lens = seq.model.lens();
    let full = |capacity: &[u32]| {
        let h = (0..lens.len()).find(|&h| lens[h] + new > capacity[h])?;
        let (head, len, capacity) = (KvHead(h as u32), lens[h].into(), capacity[h].into());
        Some(Error::CacheFull { head, len, capacity, new: new.into() })
    };
    let grown: Vec<u32> = lens.iter().map(|n| n + new).collect();
    let needed = (pages(&grown, pool.page()) - pages(&lens, pool.page())) as u64;
    let free = u64::from(pool.free_pages());
    let dry = (needed > free).then_some(Error::OutOfPages { needed, free });
    [full(&seq.capacity[0]), full(&seq.capacity[1]).or(dry)]
}

fn apply(shape: Shape, seq: &mut Sequence, pool: &mut PagePool, step: &Step) {
    match step {
        Step::Compact { seed, percent } => {
            let kept = random_subset(&seq.model, *seed, *percent);
            let before = pages(&seq.model.lens(), pool.page()) + pool.free_pages() as usize;
            seq.flat.compact(&kept).unwrap();
            seq.paged.compact(pool, &kept).unwrap();
            seq.model.keep(&kept);
            assert_eq!(pages(&seq.model.lens(), pool.page()) + pool.free_pages() as usize, before);
        }
        Step::Append { new, borrow } => {
            let more = Model::fresh(shape, seq.model.tokens, *new);
            let lent = Lent::new(shape, &more, *borrow);
            let (k, v) = (*lent.view(shape).k(), *lent.view(shape).v());
            let errors = append_errors(seq, pool, *new);
            if let [None, None] = errors {
                let (seen, free) = (see_paged(shape, &seq.paged, pool), free_list(pool));
                seq.flat.append(&k, &v).unwrap();
                seq.paged.append(pool, &k, &v).unwrap();
                seq.model.extend(&more);
                // The lowest pages, in head order.
                let tables = seq.paged.tables().iter().zip(&seen.4);
                let taken = tables.flat_map(|(now, then)| &now[then.len()..]);
                assert!(taken.eq(&free[..free.len() - pool.free_pages() as usize]));
                return;
            }
            // Only what fails is called, so that the twins stay equal; the caller sees that nothing changed.
            let [flat, paged] = errors;
            if let Some(error) = flat {
                assert_eq!(seq.flat.append(&k, &v).unwrap_err(), error);
            }
            if let Some(error) = paged {
                assert_eq!(seq.paged.append(pool, &k, &v).unwrap_err(), error);
            }
        }
        Step::Repack { slack } => {
            seq.flat.repack(*slack).unwrap();
            seq.capacity[0] = seq.model.lens().iter().map(|n| n + slack).collect();
        }
        Step::Regather { seed, percent, slack, borrow } => {
            let kept = random_subset(&seq.model, *seed, *percent);
            let lent = Lent::new(shape, &seq.model, *borrow);
            let view = lent.view(shape);
            seq.model.keep(&kept);
            let capacity: Vec<u32> = seq.model.lens().iter().map(|n| n + slack).collect();
            // From its own rows in place of a foreign layout, and into memory that is there, half of the time each.
            let own = see_paged(shape, &seq.paged, pool);
            let paged = seq.paged.view(pool, shape.layer()).unwrap();
            let from = if seed % 2 == 0 { &view } else { &paged };
            match seed % 4 {
                0 | 1 => seq.flat = FlatCache::gather(from, &kept, *slack).unwrap(),
                _ => seq.flat.regather(from, &kept, *slack).unwrap(),
            }
            seq.capacity[0] = capacity.clone();
            let free = free_list(pool);
            let needed = pages(&seq.model.lens(), pool.page());
            match PagedCache::gather(pool, &view, &kept, *slack) {
                Ok(paged) => {
                    assert!(needed <= free.len());
                    assert!(paged.tables().iter().flatten().eq(&free[..needed]));
                    seq.paged.release(pool).unwrap();
                    assert_eq!(seq.paged.bytes_reserved(), 0);
                    seq.paged = paged;
                    seq.capacity[1] = capacity;
                }
                Err(error) => {
                    let free = free.len() as u64;
                    assert_eq!(error, Error::OutOfPages { needed: needed as u64, free });
                    assert_eq!(see_paged(shape, &seq.paged, pool), own);
                    seq.paged.compact(pool, &kept).unwrap();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn histories_match_the_model(
        dtype in prop::sample::select(DTYPES.to_vec()),
        (heads, dim) in (1u32..5, 1u32..10),
        starts in prop::collection::vec((0u32..24, borrow(), any::<u64>(), 0u32..8), 1..4),
        (page, spare) in (1u32..6, 0u32..24),
        steps in prop::collection::vec((any::<prop::sample::Index>(), step()), 0..24),
    ) {
        let shape = Shape { heads, dim, dtype };
        let models: Vec<Model> = starts.iter().map(|s| Model::fresh(shape, 0, s.0)).collect();
        let kept: Vec<_> =
            models.iter().zip(&starts).map(|(m, s)| random_subset(m, s.2, 70)).collect();
        let needed: usize = kept
            .iter()
            .map(|k| pages(&k.lens().map(|n| n as u32).collect::<Vec<_>>(), page))
            .sum();
        let mut pool = PagePool::new(dtype, dim, page, needed as u32 + spare).unwrap();
        let mut sequences = Vec::new();
        for ((mut model, kept), (_, borrow, _, slack)) in models.into_iter().zip(kept).zip(starts) {
            let lent = Lent::new(shape, &model, borrow);
            let view = lent.view(shape);
            let flat = FlatCache::gather(&view, &kept, slack).unwrap();
            let paged = PagedCache::gather(&mut pool, &view, &kept, slack).unwrap();
            model.keep(&kept);
            let capacity: Vec<u32> = model.lens().iter().map(|n| n + slack).collect();
            sequences.push(Sequence { model, flat, paged, capacity: vec![capacity; 2] });
        }
        for (at, step) in steps {
            let at = at.index(sequences.len());
            apply(shape, &mut sequences[at], &mut pool, &step);
            for sequence in &sequences {
                sequence.check(shape, &pool);
            }
            check_pages(&pool, &sequences);
        }
        for mut sequence in sequences {
            sequence.paged.release(&mut pool).unwrap();
        }
        prop_assert_eq!(pool.free_pages(), pool.pages());
    }
}

/// Large enough for every parallel path: heads of 0, 1 and thousands of slots.
#[test]
fn large_layers_match_the_model() {
    for (dtype, borrow) in [
        (Dtype::F32, Borrow::TokensFirst),
        (Dtype::BF16, Borrow::HeadsFirst),
        (Dtype::F16, Borrow::Paged { page: 16 }),
    ] {
        let shape = Shape { heads: 4, dim: 64, dtype };
        let mut model = Model::fresh(shape, 0, 5000);
        let mut pool = PagePool::new(dtype, shape.dim, 32, 4 * 157).unwrap();
        let kept = random_subset(&model, 1, 90);
        let lent = Lent::new(shape, &model, borrow);
        let mut flat = FlatCache::gather(&lent.view(shape), &kept, 3).unwrap();
        let mut paged = PagedCache::gather(&mut pool, &lent.view(shape), &kept, 3).unwrap();
        model.keep(&kept);
        for percent in [80, 95, 100] {
            assert_eq!(see_flat(shape, &flat).0, model);
            assert_eq!(see_paged(shape, &paged, &pool).0, model);
            let kept = random_subset(&model, 2, percent);
            flat.compact(&kept).unwrap();
            paged.compact(&mut pool, &kept).unwrap();
            model.keep(&kept);
        }
        let kept: Ragged<Position> = [
            model.positions().row(0).to_vec(),
            vec![],
            model.positions().row(2)[7..8].to_vec(),
            model.positions().row(3)[1000..].to_vec(),
        ]
        .into_iter()
        .collect();
        flat.compact(&kept).unwrap();
        paged.compact(&mut pool, &kept).unwrap();
        flat.repack(0).unwrap();
        model.keep(&kept);
        assert_eq!(see_flat(shape, &flat).0, model);
        assert_eq!(see_paged(shape, &paged, &pool).0, model);
        paged.release(&mut pool).unwrap();
        assert_eq!(pool.free_pages(), pool.pages());
    }
}

#[test]
fn pages_are_taken_lowest_first() {
    let shape = Shape { heads: 1, dim: 2, dtype: Dtype::F16 };
    let lent = Lent::new(shape, &Model::fresh(shape, 0, 8), Borrow::HeadsFirst);
    let mut pool = PagePool::new(shape.dtype, 2, 2, 130).unwrap();
    let first = |n: u32| Ragged::from_iter([(0..n).map(Position).collect::<Vec<_>>()]);
    let take =
        |pool: &mut PagePool, n| PagedCache::gather(pool, &lent.view(shape), &first(n), 0).unwrap();
    let mut a = take(&mut pool, 5);
    let mut b = take(&mut pool, 2);
    assert_eq!((a.tables(), b.tables()), (&[vec![0, 1, 2]][..], &[vec![3]][..]));
    a.compact(&mut pool, &first(1)).unwrap();
    let mut c = take(&mut pool, 6);
    assert_eq!(c.tables(), [vec![1, 2, 4]]);
    for cache in [&mut b, &mut a, &mut c] {
        cache.release(&mut pool).unwrap();
    }
    // Past a word of the free list.
    let many: Vec<PagedCache> = (0..32).map(|_| take(&mut pool, 8)).collect();
    let taken = many.iter().flat_map(|c| &c.tables()[0]).copied();
    assert!(taken.eq(0..128));
    assert_eq!(free_list(&pool), [128, 129]);
    assert!(!pool.is_free(130) && !pool.is_free(u32::MAX));
}
