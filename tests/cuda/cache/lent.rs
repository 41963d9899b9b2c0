//! Caches in pages that an engine owns: the same bits as in a pool of ours, and pages that go back to the engine.

use cudarc::driver::result::memcpy_htod_sync;
use kvbudget::backend::Backend;
use kvbudget::{Error, Storage};

use super::*;

/// How an engine lays its blocks out.
#[derive(Clone, Copy, PartialEq)]
pub enum Blocks {
    /// Keys and values apart, `[blocks, H, P, D]`.
    Apart,
    /// `[blocks, 2, H, P, D]`.
    Together,
}

impl Twins {
    /// Moves a cache in pages of ours to blocks of an engine, in another order.
    #[allow(unsafe_code, reason = "the engine's part")]
    pub fn move_to_engine(&mut self, gpu: &Gpu, blocks: Blocks) {
        let Cache::Paged(cache, pool) = &mut self.device else { panic!("a cache in pages") };
        let (dtype, page, heads) = (self.shape.dtype, pool.page(), self.shape.heads);
        let most = cache.tables().iter().map(Vec::len).max().unwrap() as u32;
        // A block of ours is `H` pages, and every second one if values lie between.
        let (count, step) = (most + 3, if blocks == Blocks::Together { 2 } else { 1 });
        let number = |h: u32, i: u32| {
            let block = if h.is_multiple_of(2) { count - 1 - i } else { i + 2 };
            block * step * heads + h
        };
        let tables: Vec<Vec<u32>> = (0..heads)
            .map(|h| (0..cache.tables()[h as usize].len() as u32).map(|i| number(h, i)).collect())
            .collect();

        let page_bytes = (page * self.shape.dim) as usize * dtype.size();
        let block_bytes = heads as usize * page_bytes;
        let words = count as usize * block_bytes / 4;
        let nothing = f32::from_bits(u32::MAX);
        let memory =
            [(); 2].map(|()| gpu.cuda.tensor(&vec![nothing; words * step as usize]).unwrap());
        let k = memory[0].lend().address();
        let v = match blocks {
            Blocks::Apart => memory[1].lend().address(),
            Blocks::Together => k + block_bytes as u64,
        };
        gpu.cuda.synchronize().unwrap();
        // The rows in use; the others were never written.
        let row = page_bytes / page as usize;
        for (h, &len) in self.host.lens().iter().enumerate() {
            let pages = cache.tables()[h].iter().zip(&tables[h]);
            for ((&from, &to), done) in pages.zip((0..len).step_by(page as usize)) {
                let mut bytes = vec![0u8; (len - done).min(page) as usize * row];
                for (from_base, to_base) in [(pool.k().address(), k), (pool.v().address(), v)] {
                    let at = |base: u64, page: u32| base + u64::from(page) * page_bytes as u64;
                    read(at(from_base, from), &mut bytes);
                    // SAFETY: rows of a page of the engine's.
                    unsafe { memcpy_htod_sync(at(to_base, to), &bytes) }.unwrap();
                }
            }
        }
        let pages = count * step * heads - (step - 1) * heads;
        let elements = words * 4 / dtype.size() * step as usize;
        let slice = |address| {
            let before = if address == k { 0 } else { (step as usize - 1) * block_bytes };
            // SAFETY: the tensors live as long as the twins; nobody else uses them.
            unsafe { DeviceSlice::new(address, elements - before / dtype.size(), dtype) }
        };
        // SAFETY: as above; keys and values are blocks apart.
        let lent =
            unsafe { PagePool::lent(&gpu.cuda, slice(k), slice(v), self.shape.dim, page, pages) };
        let mut lent = lent.unwrap();
        let slack = cache.capacity()[0] - cache.lens().unwrap()[0];
        let (positions, tokens) = {
            let seen = cache.read(pool).unwrap();
            (seen.positions().to_vec(), seen.tokens())
        };
        let adopted = PagedCache::adopt(&mut lent, &tables, &positions, tokens, slack).unwrap();
        cache.release(pool).unwrap();
        self.device = Cache::Paged(adopted, lent);
        self.engine = memory.into();
        self.compare();
    }
}

/// Attention of two tokens, as the device writes it.
fn attention(gpu: &Gpu, twins: &Twins, q: &Tensor) -> Vec<Vec<f32>> {
    let heads = 2 * twins.shape.heads as usize;
    let mut out = gpu.cuda.zeros(&vec![2 * twins.shape.dim; heads]).unwrap();
    let mut lse = gpu.cuda.zeros(&vec![2; heads]).unwrap();
    let bytes = twins.device.attend_bytes(heads, 2);
    let mut workspace = Workspace::new(&gpu.cuda, bytes).unwrap();
    with_rows(gpu, &[q], |rows| {
        let op = Attend { scale: 0.125 };
        twins.device.attend(&op, &rows[0], &mut out, Some(&mut lse), &mut workspace).unwrap();
    });
    let rows = |floats: &Floats| gpu.cuda.to_host(floats).unwrap().data().to_vec();
    vec![rows(&out), rows(&lse)]
}

fn same_bits(shape: Shape, page: u32, blocks: Blocks) {
    let gpu = Gpu::new();
    let twins =
        || Twins::new(&gpu, shape, &mut Random(41), (70, 80, 40), Place::TokensFirst, Some(page));
    let (mut ours, mut engines) = (twins(), twins());
    engines.move_to_engine(&gpu, blocks);
    let config = super::decode::config();
    let recompression = |of: &Twins| of.device.recompression(&config, 2 * shape.heads as usize);
    let mut with = [recompression(&ours).unwrap(), recompression(&engines).unwrap()];
    let mut random = Random(43);
    for round in 0..3 {
        let appended = random.0;
        for twins in [&mut ours, &mut engines] {
            twins.append(&gpu, &mut Random(appended), 5, Place::HeadsFirst);
            twins.compare();
        }
        let q = shape.tensor(&mut random, 2 * shape.heads, 2, Place::TokensFirst);
        let bits = |twins: &Twins| {
            let rows = attention(&gpu, twins, &q).concat();
            rows.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert!(bits(&ours) == bits(&engines), "attention differs");
        if round == 1 {
            let q = shape.tensor(&mut random, 2 * shape.heads, 4, Place::TokensFirst);
            with_rows(&gpu, &[&q], |rows| {
                for (twins, with) in [&mut ours, &mut engines].into_iter().zip(&mut with) {
                    twins.device.recompress(&rows[0], with).unwrap();
                }
            });
            let (a, b) = (ours.device.read(), engines.device.read());
            assert!(device_rows(shape, &a) == device_rows(shape, &b), "recompression differs");
            let kept = a.positions().to_vec();
            ours.host.compact(&kept.iter().cloned().collect()).unwrap();
            engines.host.compact(&kept.into_iter().collect()).unwrap();
        }
        ours.compare();
        engines.compare();
    }
    let (mut other, seed) = (Random(9), 47);
    for twins in [&mut ours, &mut engines] {
        twins.compact(&mut Random(seed), 40, Order::Any);
        twins.compare();
    }
    let q = shape.tensor(&mut other, 2 * shape.heads, 2, Place::HeadsFirst);
    assert_eq!(attention(&gpu, &ours, &q), attention(&gpu, &engines, &q));

    // What the cache no longer needs goes back by whole blocks, all of it in the end.
    let Cache::Paged(cache, pool) = &mut engines.device else { unreachable!() };
    let step = if blocks == Blocks::Together { 2 } else { 1 };
    let before = cache.tables().concat().len();
    cache.reserve(pool, 0).unwrap();
    assert_eq!(before - cache.tables().concat().len(), pool.free_pages() as usize);
    let whole =
        |page: u32| (0..shape.heads).all(|h| pool.is_free(page / shape.heads * shape.heads + h));
    let pages = (0..pool.pages()).filter(|&page| whole(page)).count() as u32;
    let withdrawn = pool.withdraw(shape.heads).unwrap();
    assert_eq!(withdrawn.len() as u32 * shape.heads, pages);
    assert!(
        withdrawn.iter().all(|&block| block % step == 0 && pool.is_engines(block * shape.heads))
    );
    // They come again, empty.
    for &block in &withdrawn {
        let pages: Vec<u32> = (0..shape.heads).map(|h| block * shape.heads + h).collect();
        pool.admit(&pages).unwrap();
    }
    cache.reserve(pool, 3).unwrap();
    cache.release(pool).unwrap();
    pool.withdraw(1).unwrap();
    assert!((0..pool.pages()).all(|page| pool.is_engines(page)));
}

#[test]
fn an_engines_pages_hold_the_same_bits() {
    same_bits(Shape { heads: 3, dim: 64, dtype: Dtype::BF16 }, 8, Blocks::Apart);
    same_bits(Shape { heads: 2, dim: 128, dtype: Dtype::F16 }, 16, Blocks::Together);
    same_bits(Shape { heads: 2, dim: 40, dtype: Dtype::F32 }, 7, Blocks::Apart);
}

#[test]
#[allow(unsafe_code, reason = "an engine's memory")]
fn pages_that_cannot_be_adopted() {
    let gpu = Gpu::new();
    let memory = gpu.cuda.tensor(&vec![0f32; 8 * 4 * 8]).unwrap();
    let whole = memory.lend();
    let lent = |k: DeviceSlice<'_>, v: DeviceSlice<'_>, dim, page, pages| {
        // SAFETY: the tensor lives to the end of the test, and nothing is launched over both.
        unsafe { PagePool::lent(&gpu.cuda, k, v, dim, page, pages) }
    };
    let refused = |k, v, dim, page, pages| lent(k, v, dim, page, pages).map(drop).unwrap_err();
    // SAFETY: elements of the tensor.
    let part = |bytes: u64, elements, dtype| unsafe {
        DeviceSlice::new(whole.address() + bytes, elements, dtype)
    };
    let odd = part(8, 200, Dtype::F32);
    assert!(matches!(refused(odd, whole, 8, 4, 1), Error::Misaligned { expected: 16, .. }));
    assert!(matches!(refused(whole, whole, 6, 4, 1), Error::Misaligned { .. }));
    let (what, got) = ("values of a page pool", Dtype::F16);
    let error = refused(whole, part(0, 512, got), 8, 4, 1);
    assert_eq!(error, Error::Dtype { what, expected: Dtype::F32, got });
    let error = refused(whole, part(0, 255, Dtype::F32), 8, 4, 8);
    assert_eq!(error, Error::OutOfStorage { what, needed: 256, available: 255 });
    assert!(matches!(refused(whole, whole, 8, u32::MAX, u32::MAX), Error::TooLarge { .. }));
    assert!(matches!(refused(whole, whole, 0, 4, 1), Error::Zero { .. }));
    assert!(matches!(refused(whole, whole, 8, 0, 1), Error::Zero { .. }));

    let mut pool = lent(whole, whole, 8, 4, 8).unwrap();
    pool.admit(&[6, 7]).unwrap();
    let positions = |lens: &[u32]| -> Vec<Vec<Position>> {
        lens.iter().map(|&n| (0..n).map(Position).collect()).collect()
    };
    let adopt = |pool: &mut PagePool, tables: &[Vec<u32>], lens: &[u32], tokens| {
        PagedCache::adopt(pool, tables, &positions(lens), tokens, 2)
    };
    let not = |page| Error::NotTheEngines { page, pages: 8 };
    let short = Error::Shape { what: "pages of a head", expected: 2, got: 1 };
    let heads = Error::Shape { what: "page tables", expected: 1, got: 2 };
    let cases = [
        (vec![vec![0, 1], vec![2, 1]], vec![8, 8], not(1)),
        (vec![vec![0], vec![6]], vec![3, 4], not(6)),
        (vec![vec![0], vec![1, 8]], vec![3, 4], not(8)),
        (vec![vec![0], vec![1]], vec![3, 5], short),
        (vec![vec![0], vec![1]], vec![3], heads),
    ];
    let as_before = |pool: &PagePool| {
        assert!((0..8).all(|page| pool.is_engines(page) != pool.is_free(page)));
        assert_eq!(pool.free_pages(), 2);
    };
    for (tables, lens, error) in &cases {
        assert_eq!(adopt(&mut pool, tables, lens, 8).map(drop).unwrap_err(), *error);
        as_before(&pool);
    }
    let beyond = adopt(&mut pool, &[vec![0], vec![1, 8]], &[3, 5], 8).map(drop).unwrap_err();
    assert!(matches!(beyond, Error::OutOfStorage { .. }), "{beyond}");
    let repeated = vec![vec![Position(0), Position(0)]];
    let error = PagedCache::adopt(&mut pool, &[vec![0]], &repeated, 8, 0).map(drop).unwrap_err();
    assert!(matches!(error, Error::Positions { index: 1, .. }), "{error}");
    assert!(adopt(&mut pool, &[vec![0]], &[3], 2).is_err(), "more slots than tokens");
    assert_eq!(pool.admit(&[0, 1, 0]).unwrap_err(), not(0));
    assert_eq!(pool.admit(&[8]).unwrap_err(), not(8));
    assert!(matches!(pool.withdraw(0), Err(Error::Zero { .. })));
    as_before(&pool);

    // Room in the pages that are there, and with others up to the slack.
    let mut cache = adopt(&mut pool, &[vec![3], vec![5, 0]], &[3, 4], 9).unwrap();
    assert_eq!((cache.capacity(), cache.lens().unwrap()), (&[4, 8][..], vec![3, 4]));
    assert_eq!(adopt(&mut pool, &[vec![5]], &[3], 9).map(drop).unwrap_err(), not(5));
    cache.reserve(&mut pool, 2).unwrap();
    assert_eq!(cache.tables(), [vec![3, 6], vec![5, 0]]);
    assert!(matches!(cache.reserve(&mut pool, 3), Err(Error::CacheFull { .. })));
    cache.release(&mut pool).unwrap();
    assert_eq!(pool.withdraw(2).unwrap(), [3]);
    assert_eq!(pool.withdraw(1).unwrap(), [0, 3, 5]);
    assert_eq!(whole.elements(), 256);
}
