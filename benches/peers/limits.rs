//! What the machine can do, measured by our threads: reading, copying, and the matrix product of the crate that we use.

use std::hint::black_box;

use rayon::prelude::*;

/// Words of 8 bytes: 256 MiB, more than what caches keep.
const WORDS: usize = 32 << 20;
const PART: usize = 1 << 18;
/// Side of the matrices.
const SIDE: usize = 1536;

pub struct Limits {
    from: Vec<u64>,
    to: Vec<u64>,
}

impl Limits {
    pub fn new() -> Self {
        Self { from: vec![1; WORDS], to: vec![0; WORDS] }
    }

    /// Reads 256 MiB. What was in caches is not there afterwards, and the threads of the pool are awake.
    pub fn read(&self) {
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, &x| sum.wrapping_add(x));
        black_box(self.from.par_chunks(PART).map(sum).reduce(|| 0, u64::wrapping_add));
    }

    /// Reads 256 MiB and writes as many.
    pub fn copy(&mut self) {
        let parts = self.to.par_chunks_mut(PART).zip(self.from.par_chunks(PART));
        parts.for_each(|(to, from)| to.copy_from_slice(black_box(from)));
    }
}

/// Matrices for a product in f32 on each thread.
pub struct Products {
    a: Vec<f32>,
    c: Vec<f32>,
}

impl Products {
    pub fn new() -> Self {
        let threads = rayon::current_num_threads();
        Self { a: vec![0.5; SIDE * SIDE], c: vec![0.0; threads * SIDE * SIDE] }
    }

    pub fn flops(&self) -> usize {
        2 * SIDE * self.c.len()
    }

    pub fn run(&mut self) {
        self.c.par_chunks_mut(SIDE * SIDE).for_each(|c| square(&self.a, c));
    }
}

/// `c = a · a`.
fn square(a: &[f32], c: &mut [f32]) {
    assert!(a.len() == SIDE * SIDE && c.len() == a.len());
    #[allow(unsafe_code, reason = "the matrix product's crate has no safe interface")]
    // SAFETY: all are SIDE×SIDE elements, row after row; `c` is borrowed exclusively; nothing of it is read.
    unsafe {
        let (n, row) = (SIDE, SIDE as isize);
        let none = gemm::Parallelism::None;
        let (out, a) = (c.as_mut_ptr(), a.as_ptr());
        gemm::gemm(
            n, n, n, out, 1, row, false, a, 1, row, a, 1, row, 0.0, 1.0, false, false, false, none,
        );
    }
}
