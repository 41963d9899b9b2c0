//! Attention of the newest tokens over ragged heads.

use std::fmt::Debug;

use kvbudget::backend::ops::Attend;
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{Dtype, Ragged, Result};

use super::{DTYPES, PLACES, fails, pass, poisoned, read};
use crate::compare::{self, Scale};
use crate::data::{Place, Tensor, TestDevice, with_rows};
use crate::generate::{LENGTHS, Rng};
use crate::naive::{self, Float, Matrix};

/// One sequence, in words.
#[derive(Debug, Clone)]
struct Sequence {
    /// Slots per KV head.
    lens: Vec<u32>,
    group: u32,
    dim: u32,
    /// `M`.
    queries: u32,
    dtype: Dtype,
    place: Place,
    /// Keys are this much longer than normal: 1 for flat attention, more for one-hot rows.
    peak: f64,
}

impl Default for Sequence {
    fn default() -> Self {
        Self {
            lens: vec![37, 37],
            group: 2,
            dim: 16,
            queries: 1,
            dtype: Dtype::F32,
            place: Place::HeadsFirst,
            peak: 1.0,
        }
    }
}

/// `[q, k, v]`.
type Tensors = [Tensor; 3];

impl Sequence {
    fn build(&self, seed: u64) -> Tensors {
        let rng = &mut Rng::new(seed);
        let Self { dim, dtype, place, .. } = *self;
        let query_heads = self.lens.len() as u32 * self.group;
        let q = (0..query_heads).map(|_| rng.matrix(self.queries, dim)).collect();
        let mut k: Vec<_> = self.lens.iter().map(|&len| rng.matrix(len, dim)).collect();
        k.iter_mut().flatten().flatten().for_each(|x| *x *= self.peak);
        let v = self.lens.iter().map(|&len| rng.matrix(len, dim)).collect();
        // Queries come from another tensor than the cache, laid out in its own way.
        let query_place =
            if place == Place::TokensFirst { Place::TokensFirst } else { Place::HeadsFirst };
        [
            Tensor::new(q, dim, dtype, query_place),
            Tensor::new(k, dim, dtype, place),
            Tensor::new(v, dim, dtype, place),
        ]
    }
}

fn oracle<F: Float>(op: &Attend, sequences: &[Tensors]) -> (Matrix<F>, Matrix<F>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for [q, k, v] in sequences {
        let group = q.heads.len() / k.heads.len();
        for h in 0..k.heads.len() {
            let queries: Vec<_> = (h * group..(h + 1) * group).map(|g| q.head(g)).collect();
            let scale = naive::num(op.scale);
            let (out, lse) = naive::attend(scale, &queries, &k.head(h), &v.head(h));
            outs.extend(out);
            lses.extend(lse);
        }
    }
    (outs, lses)
}

fn run<D: TestDevice>(
    device: &D,
    op: &Attend,
    sequences: &[Tensors],
    lens: (&[u32], &[u32]),
    with_lse: bool,
) -> Result<(Ragged<f32>, Ragged<f32>)> {
    let (mut out, mut lse) = (poisoned(device, lens.0), poisoned(device, lens.1));
    let tensors: Vec<&Tensor> = sequences.iter().flatten().collect();
    with_rows(device, &tensors, |rows| {
        let views: Vec<_> = rows
            .chunks(3)
            .map(|sequence| AttendView { q: sequence[0], k: sequence[1], v: sequence[2] })
            .collect();
        device.backend().attend(op, &views, &mut out, with_lse.then_some(&mut lse))
    })?;
    Ok((read(device, &out), read(device, &lse)))
}

fn check<D: TestDevice>(device: &D, case: impl Debug, op: &Attend, sequences: &[Tensors]) {
    let (out, lse) = oracle::<f64>(op, sequences);
    let (out32, lse32) = oracle::<f32>(op, sequences);
    let lens = |rows: &Matrix<f64>| rows.iter().map(|row| row.len() as u32).collect::<Vec<_>>();
    for with_lse in [true, false] {
        let result = run(device, op, sequences, (&lens(&out), &lens(&lse)), with_lse);
        let (got, got_lse) = result.unwrap_or_else(|e| panic!("{case:?}: {e}"));
        let case = (&case, op, with_lse);
        pass(&case, compare::floats(&got, &out, &out32, Scale::Row));
        if with_lse {
            pass(&(case, "lse"), compare::floats(&got_lse, &lse, &lse32, Scale::Unit));
        }
    }
}

fn scale(dim: u32) -> Attend {
    Attend { scale: 1.0 / (dim as f32).sqrt() }
}

fn check_one<D: TestDevice>(device: &D, sequence: &Sequence) {
    check(device, sequence, &scale(sequence.dim), &[sequence.build(1)]);
}

/// Decode over every length, from a single slot up.
pub fn lengths<D: TestDevice>(device: &D) {
    for len in LENGTHS.into_iter().filter(|&n| n > 0).chain([4099]) {
        check_one(device, &Sequence { lens: vec![len; 2], ..Sequence::default() });
    }
}

/// Several new tokens, causal among themselves; nothing but new tokens; scales other than `1/√D`.
pub fn queries<D: TestDevice>(device: &D) {
    for (len, queries) in [(2, 2), (9, 2), (37, 5), (64, 33), (65, 65), (300, 3)] {
        let sequence = Sequence { lens: vec![len; 2], queries, ..Sequence::default() };
        check_one(device, &sequence);
        for scale in [0.0, 1.0, -0.5] {
            check(device, &sequence, &Attend { scale }, &[sequence.build(1)]);
        }
    }
}

/// Group sizes that are no power of two, head dims that are no multiple of 64.
pub fn shapes<D: TestDevice>(device: &D) {
    for group in [1, 2, 4, 7] {
        for dim in [16, 64, 80, 128] {
            for queries in [1, 3] {
                check_one(device, &Sequence { group, dim, queries, ..Sequence::default() });
            }
        }
    }
}

/// Every dtype in every layout.
pub fn storage<D: TestDevice>(device: &D) {
    for (dtype, place) in DTYPES.into_iter().flat_map(|dtype| PLACES.map(|place| (dtype, place))) {
        for queries in [1, 4] {
            let base = Sequence { dim: 80, lens: vec![70; 3], ..Sequence::default() };
            check_one(device, &Sequence { dtype, place, queries, ..base });
        }
    }
}

/// 16-bit head dims that are and that are not what tensor cores are given.
pub fn dims<D: TestDevice>(device: &D) {
    for dtype in [Dtype::F16, Dtype::BF16] {
        for dim in [8, 56, 64, 72, 96, 128, 136, 256] {
            let base = Sequence { dim, dtype, lens: vec![70; 2], ..Sequence::default() };
            check_one(device, &base);
            check_one(device, &Sequence { queries: 3, place: Place::Paged { page: 5 }, ..base });
        }
    }
    check_one(device, &Sequence { dim: 256, lens: vec![70; 2], queries: 3, ..Sequence::default() });
}

/// More query rows than a block takes, and one too few; queries that see nothing.
pub fn row_blocks<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        for (group, queries) in [(16, 1), (8, 1), (5, 3), (17, 1), (16, 3), (5, 7), (1, 70)] {
            let lens = vec![70, 90];
            let place = Place::Ragged { slack: 1 };
            let base = Sequence { lens, place, group, queries, dtype, ..Sequence::default() };
            check_one(device, &base);
            if queries > 1 {
                let lens = vec![queries - 1, queries];
                check_one(device, &Sequence { lens, ..base });
            }
        }
    }
}

/// Segments that are cut into chunks, beside empty ones, ones that end with a chunk and ones that hardly begin one; more
/// segments than a block has threads, and more work than there are blocks.
pub fn splits<D: TestDevice>(device: &D) {
    for dtype in DTYPES {
        let place = Place::Paged { page: 16 };
        let base = Sequence { dim: 64, place, dtype, ..Sequence::default() };
        for lens in [vec![0, 600, 257, 1, 1025], vec![512, 0, 0, 256, 513], vec![0]] {
            check_one(device, &Sequence { lens, ..base.clone() });
        }
        let lens = vec![258, 3, 770];
        check_one(device, &Sequence { lens, queries: 4, group: 5, ..base.clone() });
        check_one(device, &Sequence { lens: vec![2100], dim: 128, group: 1, ..base });
    }
    let place = Place::Ragged { slack: 0 };
    for dtype in DTYPES {
        let lens = (0..1100).map(|head| head % 3).collect();
        check_one(
            device,
            &Sequence { lens, place, group: 1, dim: 8, dtype, ..Sequence::default() },
        );
    }
}

/// Heads of one layer that hold different numbers of slots: long enough to split, and a single one.
pub fn ragged_heads<D: TestDevice>(device: &D) {
    for place in [Place::Ragged { slack: 7 }, Place::Paged { page: 16 }] {
        for lens in [vec![1, 2, 513], vec![1025, 64, 3, 129], vec![1]] {
            check_one(device, &Sequence { lens, place, ..Sequence::default() });
        }
        let lens = vec![5, 700, 33];
        check_one(device, &Sequence { lens, place, queries: 5, ..Sequence::default() });
    }
}

/// Sequences with different lengths, head counts, groups, layouts and numbers of new tokens; no sequence.
pub fn batches<D: TestDevice>(device: &D) {
    let place = Place::Ragged { slack: 0 };
    let sequences = [
        Sequence { lens: vec![130], group: 4, ..Sequence::default() },
        Sequence { lens: vec![9, 64, 1, 33], group: 1, place, ..Sequence::default() },
        Sequence {
            lens: vec![65; 3],
            queries: 5,
            place: Place::TokensFirst,
            ..Sequence::default()
        },
        Sequence {
            lens: vec![33, 20],
            group: 7,
            place: Place::Paged { page: 8 },
            ..Sequence::default()
        },
    ];
    let built: Vec<_> = sequences.iter().zip(1..).map(|(s, seed)| s.build(seed)).collect();
    check(device, "batch", &scale(16), &built);
    check(device, "no sequence", &scale(16), &[]);
}

/// Logits in the hundreds: the largest has to be taken out before `exp`.
pub fn peaky<D: TestDevice>(device: &D) {
    for peak in [10.0, 100.0, 1000.0] {
        let base = Sequence { lens: vec![200, 200], dim: 64, ..Sequence::default() };
        check_one(device, &Sequence { peak, ..base.clone() });
        check_one(device, &Sequence { peak, queries: 3, ..base });
    }
}

/// A NaN or an infinity reaches the queries that see it; a token after them has none to spoil.
pub fn non_finite<D: TestDevice>(device: &D) {
    for (dtype, bad) in DTYPES.into_iter().flat_map(|d| [(d, f64::NAN), (d, f64::INFINITY)]) {
        let base = Sequence { queries: 3, dtype, ..Sequence::default() };
        let [q, k, v] = base.build(1);
        let mut factors = [1.0; 16];
        factors[5] = bad;
        for row in [0, 20, 35, 36] {
            let case = |of: &str| format!("{dtype} {of} {bad}, slot {row}");
            let bad_k = k.with_row_scaled(1, row, &factors);
            check(device, case("key"), &scale(16), &[[q.clone(), bad_k, v.clone()]]);
            let bad_v = v.with_row_scaled(0, row, &factors);
            check(device, case("value"), &scale(16), &[[q.clone(), k.clone(), bad_v]]);
        }
        let bad_q = q.with_row_scaled(2, 1, &factors);
        check(device, format!("{dtype} query {bad}"), &scale(16), &[[bad_q, k, v]]);
        // In the second chunk of a segment, and in the last slot of all.
        let [q, k, v] = Sequence { lens: vec![290; 2], ..base }.build(1);
        for row in [280, 289] {
            let bad_v = v.with_row_scaled(1, row, &factors);
            let case = format!("{dtype} value {bad}, slot {row} of 290");
            check(device, case, &scale(16), &[[q.clone(), k.clone(), bad_v]]);
        }
    }
}

/// Tensors and outputs that do not fit each other.
pub fn errors<D: TestDevice>(device: &D) {
    let build = |sequence: Sequence| sequence.build(1);
    let [q, k, v] = build(Sequence::default());
    let [_, wide_k, _] = build(Sequence { dim: 32, ..Sequence::default() });
    let [_, _, short_v] = build(Sequence { lens: vec![36, 36], ..Sequence::default() });
    let [_, three_k, three_v] = build(Sequence { lens: vec![37; 3], ..Sequence::default() });
    let (out, lse) = ([16; 4], [1; 4]);
    let refuse = |case: &str, tensors: Tensors, out: &[u32], lse: &[u32]| {
        fails(&case, run(device, &scale(16), &[tensors], (out, lse), true));
    };
    refuse("4 query heads on 3", [q.clone(), three_k, three_v], &out, &lse);
    refuse("head dims", [q.clone(), wide_k, v.clone()], &out, &lse);
    refuse("lengths", [q.clone(), k.clone(), short_v], &out, &lse);
    refuse("a row of output short", [q.clone(), k.clone(), v.clone()], &[16; 3], &lse);
    refuse("short output", [q.clone(), k.clone(), v.clone()], &[15; 4], &lse);
    refuse("a row of lse short", [q, k, v], &out, &[1; 3]);
}
