//! Decode attention allocates nothing. One test per binary: the counter is global.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::Attend;
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{Ragged, Rows};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code, reason = "an allocator that counts has no safe form")]
// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn attend_does_not_allocate() {
    // Sequences of different lengths; heads long enough for split-K; dims up to 256, M up to 3.
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for (dim, m) in [(64u32, 1u32), (256, 1), (128, 3)] {
            let lens = [3000u32, 1, 0, 130];
            let starts = [0u64, 3000, 3001, 3001];
            let kv = vec![half::f16::from_f32(0.5); 3131 * dim as usize];
            let q = vec![0.25f32; (16 * m * dim) as usize];
            let k = Rows::ragged(HostSlice::F16(&kv), dim, &starts, &lens).unwrap();
            let q = Rows::heads_first(HostSlice::F32(&q), 16, m, dim).unwrap();
            let views = [AttendView { q, k, v: k }; 2];
            let mut out = Ragged::filled(vec![(m * dim) as usize; 32], 0.0);
            let mut lse = Ragged::filled(vec![m as usize; 32], 0.0);
            let cpu = Cpu::new();
            let op = Attend { scale: 0.1 };
            let mut step = || {
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                cpu.attend(&op, &views, &mut out, Some(&mut lse)).unwrap();
                ALLOCATIONS.load(Ordering::Relaxed) - before
            };
            // The first steps of each thread set up rayon's own queues; then there is nothing left to allocate.
            let counts: Vec<usize> = pool.install(|| (0..10).map(|_| step()).collect());
            let settled = counts.iter().rev().take(5).all(|&n| n == 0);
            assert!(settled, "{threads} threads, dim {dim}, {m} queries: {counts:?}");
        }
    }
}
