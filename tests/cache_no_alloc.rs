//! Contract 8: `append` and `compact` allocate nothing, in any dtype, on the parallel paths too.
//!
//! One test, so that no other one allocates beside it.

#![allow(unsafe_code, reason = "counting allocations takes an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvbudget::backend::cpu::HostSlice;
use kvbudget::cache::{FlatCache, PagePool, PagedCache};
use kvbudget::{Dtype, LayerShape, LayerView, Position, Ragged, Rows};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to `System` with the caller's arguments; counting touches no memory but an atomic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those `System` asks for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System`, since every allocation does.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for `dealloc`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `work`, on whatever thread.
fn count(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    work();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// The positions of each head that `keep` picks.
fn thin(kept: &Ragged<Position>, keep: impl Fn(u32) -> bool) -> Ragged<Position> {
    kept.iter().map(|row| row.iter().copied().filter(|p| keep(p.0)).collect::<Vec<_>>()).collect()
}

#[test]
fn append_and_compact_allocate_nothing() {
    const H: u32 = 4;
    const D: u32 = 64;
    assert!(count(|| drop(std::hint::black_box(vec![0u8; 64]))) > 0, "the counter counts");

    let f32s = vec![1f32; (H * D * 4096) as usize];
    let f16s = vec![half::f16::ONE; f32s.len()];
    let bf16s = vec![half::bf16::ONE; f32s.len()];
    let storages = [HostSlice::F32(&f32s), HostSlice::F16(&f16s), HostSlice::BF16(&bf16s)];
    // Threads that exist and have worked: only then is the count about the caches.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for (dtype, storage) in [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().zip(storages) {
        for tokens in [40, 4096] {
            let shape = LayerShape::new(H, H, D).unwrap();
            let dense = Rows::tokens_first(storage, H, tokens, D).unwrap();
            let view = LayerView::new(shape, tokens, dense, dense).unwrap();
            let all: Ragged<Position> =
                vec![(0..tokens).map(Position).collect(); H as usize].into_iter().collect();
            let most = thin(&all, |p| p % 9 != 0);
            let fewer = thin(&most, |p| p % 5 != 0);
            let fewest = thin(&fewer, |p| p % 7 != 0);
            let mut pool = PagePool::new(dtype, D, 16, H * 300).unwrap();
            let mut flat = FlatCache::gather(&view, &most, 8).unwrap();
            let mut paged = PagedCache::gather(&mut pool, &view, &most, 8).unwrap();
            let new = Rows::heads_first(storage, H, 1, D).unwrap();
            let counted = threads.install(|| {
                flat.compact(&fewer).unwrap();
                paged.compact(&mut pool, &fewer).unwrap();
                count(|| {
                    flat.compact(&fewest).unwrap();
                    paged.compact(&mut pool, &fewest).unwrap();
                    for _ in 0..tokens / 8 {
                        flat.append(&new, &new).unwrap();
                        paged.append(&mut pool, &new, &new).unwrap();
                    }
                })
            });
            assert_eq!(counted, 0, "{dtype}, {tokens} tokens");
            paged.release(&mut pool).unwrap();
        }
    }
}
