//! Mean and covariance of a sequence's queries: what ExpectedAttention knows of the queries to come.
//!
//! Source: ExpectedAttention (arXiv 2510.00636). Queries before RoPE are taken for normally distributed, each query head by itself.
//! [`QueryMoments`] gathers them while a prompt is read; [`ExpectedQueries`] are what RoPE makes of them at the positions to
//! come: `μ ← R̄μ`, `Σ ← R̄ΣR̄ᵀ` with the mean rotation `R̄`.
//!
//! Cost: `2·Hq·D²` flops per token, `8·Hq·D²` bytes per layer. Blocks of rows are centred and multiplied in f32 and merged in f64 about their
//! means (Chan, Golub and LeVeque): no large sums cancel.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::cpu::{HostSlice, gram, widen_rows};
use crate::error::{Error, Result};
use crate::geometry::LayerShape;
use crate::rope::{self, Rope};
use crate::view::{Rows, expect};

/// Rows that are multiplied at once.
const BLOCK: usize = 256;

/// Mean and covariance of a layer's queries to come, averaged over their positions: what a view lends
/// ([`LayerView::with_expected`](crate::LayerView::with_expected)).
#[derive(Debug, Clone, PartialEq)]
pub struct ExpectedQueries {
    shape: LayerShape,
    mean: Vec<f32>,
    covariance: Vec<f32>,
}

impl ExpectedQueries {
    /// `mean` is `[Hq, D]`, `covariance` `[Hq, D, D]`; of the latter the symmetric part is taken.
    ///
    /// Errors: other lengths, numbers that are not finite.
    pub fn new(shape: LayerShape, mean: Vec<f32>, mut covariance: Vec<f32>) -> Result<Self> {
        let (heads, dim) = (shape.query_heads(), shape.head_dim());
        expect("mean of the expected queries", heads * dim, mean.len())?;
        expect("covariance of the expected queries", heads * dim * dim, covariance.len())?;
        for matrix in covariance.chunks_exact_mut(dim * dim) {
            for (i, j) in (0..dim).flat_map(|i| (0..i).map(move |j| (i, j))) {
                let half = 0.5 * matrix[i * dim + j] + 0.5 * matrix[j * dim + i];
                (matrix[i * dim + j], matrix[j * dim + i]) = (half, half);
            }
        }
        for (name, numbers) in [
            ("mean of the expected queries", &mean),
            ("covariance of the expected queries", &covariance),
        ] {
            if let Some(bad) = numbers.iter().find(|x| !x.is_finite()) {
                let (expected, got) = ("finite numbers", bad.to_string());
                return Err(Error::Parameter { name, expected, got });
            }
        }
        Ok(Self { shape, mean, covariance })
    }

    /// Heads and head dim.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }
    /// `[D]` of a query head.
    pub fn mean(&self, query_head: usize) -> &[f32] {
        let dim = self.shape.head_dim();
        &self.mean[query_head * dim..][..dim]
    }
    /// `[D, D]` of a query head, symmetric.
    pub fn covariance(&self, query_head: usize) -> &[f32] {
        let size = self.shape.head_dim().pow(2);
        &self.covariance[query_head * size..][..size]
    }
}

/// Mean and covariance of the queries of one layer so far, before RoPE.
///
/// ```
/// use kvbudget::backend::cpu::HostSlice;
/// use kvbudget::{LayerShape, Pairs, QueryMoments, Rope, Rows};
///
/// # fn main() -> kvbudget::Result<()> {
/// let rope = Rope::with_base(10_000.0, 8, Pairs::Halves)?;
/// let mut moments = QueryMoments::new(LayerShape::new(4, 2, 8)?);
/// # let queries = vec![0.5; 4 * 100 * 8];
/// // What attention was given for tokens 4 to 103: the sinks, outliers, are left out.
/// let q = Rows::heads_first(HostSlice::F32(&queries), 4, 100, 8)?;
/// moments.push_rotated(&q, &rope, 4)?;
/// let expected = moments.expected(&rope, 104..104 + QueryMoments::FUTURE)?;
/// # assert_eq!(expected.mean(3).len(), 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct QueryMoments {
    shape: LayerShape,
    tokens: u64,
    /// `[Hq, D]`.
    mean: Vec<f64>,
    /// `Σ (q - mean)(q - mean)ᵀ`, `[Hq, D, D]`.
    scatter: Vec<f64>,
}

impl QueryMoments {
    /// Positions over which the method averages.
    pub const FUTURE: u32 = 512;

    /// None yet.
    pub fn new(shape: LayerShape) -> Self {
        let (heads, dim) = (shape.query_heads(), shape.head_dim());
        let (mean, scatter) = (vec![0.0; heads * dim], vec![0.0; heads * dim * dim]);
        Self { shape, tokens: 0, mean, scatter }
    }

    /// Queries that went in.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds the queries `[Hq, n, D]` of `n` tokens before RoPE, after a norm of queries if the model has one. Attention's logits are
    /// `q · k / √D`: a model with another scale multiplies its queries by the quotient.
    ///
    /// Errors: another shape.
    pub fn push(&mut self, q: &Rows<'_, HostSlice<'_>>) -> Result<()> {
        self.add(q, None)
    }

    /// The same of queries after RoPE, which is turned back: those of consecutive tokens from position `first` on.
    ///
    /// Errors: another shape, more pairs than a head has.
    pub fn push_rotated(
        &mut self,
        q: &Rows<'_, HostSlice<'_>>,
        rope: &Rope,
        first: u32,
    ) -> Result<()> {
        rope.fits(self.shape.head_dim())?;
        self.add(q, Some((rope, first)))
    }

    /// Adds what others have gathered, say of another stretch of the sequence.
    ///
    /// Errors: another shape.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        expect("query heads", self.shape.query_heads(), other.shape.query_heads())?;
        expect("head dim of queries", self.shape.head_dim(), other.shape.head_dim())?;
        let (counts, dim) = ([self.tokens, other.tokens], self.shape.head_dim());
        self.heads()
            .zip(other.mean.par_chunks_exact(dim))
            .zip(other.scatter.par_chunks_exact(dim * dim))
            .for_each(|(((mean, scatter), other_mean), other_scatter)| {
                merge(counts, (mean, scatter), (other_mean, other_scatter));
            });
        self.tokens += other.tokens;
        Ok(())
    }

    /// What is to be expected at these positions; of no queries, zeros: attention to everything alike.
    ///
    /// Errors: no positions, more pairs than a head has, queries that were not finite.
    pub fn expected(&self, rope: &Rope, positions: Range<u32>) -> Result<ExpectedQueries> {
        let dim = self.shape.head_dim();
        rope.fits(dim)?;
        if positions.is_empty() {
            return Err(Error::Zero { what: "positions of expected queries" });
        }
        let turns = rope.mean(positions);
        let (mut mean, mut covariance) = (self.mean.clone(), self.scatter.clone());
        mean.par_chunks_exact_mut(dim).zip(covariance.par_chunks_exact_mut(dim * dim)).for_each(
            |(mean, matrix)| {
                rope.turn(&turns, mean);
                // R̄(R̄Σ)ᵀ = R̄ΣR̄ᵀ, since Σ is symmetric.
                for _ in 0..2 {
                    matrix.chunks_exact_mut(dim).for_each(|row| rope.turn(&turns, row));
                    for (i, j) in (0..dim).flat_map(|i| (0..i).map(move |j| (i, j))) {
                        matrix.swap(i * dim + j, j * dim + i);
                    }
                }
            },
        );
        let tokens = self.tokens.max(1) as f64;
        let covariance = covariance.into_iter().map(|x| (x / tokens) as f32).collect();
        ExpectedQueries::new(self.shape, mean.into_iter().map(|x| x as f32).collect(), covariance)
    }

    /// Mean and scatter of each query head.
    fn heads(&mut self) -> impl IndexedParallelIterator<Item = (&mut [f64], &mut [f64])> {
        let dim = self.shape.head_dim();
        self.mean.par_chunks_exact_mut(dim).zip(self.scatter.par_chunks_exact_mut(dim * dim))
    }

    fn add(&mut self, q: &Rows<'_, HostSlice<'_>>, rotated: Option<(&Rope, u32)>) -> Result<()> {
        expect("query heads", self.shape.query_heads(), q.heads())?;
        expect("head dim of queries", self.shape.head_dim(), q.dim())?;
        for head in 1..q.heads() {
            expect("queries of a head", q.len(0), q.len(head))?;
        }
        for from in (0..q.len(0)).step_by(BLOCK) {
            let rows = from..q.len(0).min(from + BLOCK);
            let turns = rotated.map(|(rope, first)| {
                let of_row = |row| rope::back(rope.at(u64::from(first) + row as u64));
                (rope, rows.clone().map(of_row).collect::<Vec<_>>())
            });
            let counts = [self.tokens, rows.len() as u64];
            self.heads().enumerate().for_each_init(Block::default, |block, (head, so_far)| {
                block.read(q, head, rows.clone());
                if let Some((rope, turns)) = &turns {
                    let rows = block.rows.chunks_exact_mut(q.dim());
                    rows.zip(turns).for_each(|(row, turns)| rope.turn(turns, row));
                }
                merge(counts, so_far, block.moments(q.dim()));
            });
            self.tokens += rows.len() as u64;
        }
        Ok(())
    }
}

/// Rows of one head, and what becomes of them.
#[derive(Default)]
struct Block {
    rows: Vec<f64>,
    narrow: Vec<f32>,
    products: Vec<f32>,
    mean: Vec<f64>,
    scatter: Vec<f64>,
}

impl Block {
    fn read(&mut self, q: &Rows<'_, HostSlice<'_>>, head: usize, rows: Range<usize>) {
        self.narrow.resize(rows.len() * q.dim(), 0.0);
        widen_rows(q, head, rows, &mut self.narrow);
        self.rows.clear();
        self.rows.extend(self.narrow.iter().map(|&x| f64::from(x)));
    }

    /// Mean and scatter of the rows.
    fn moments(&mut self, dim: usize) -> (&[f64], &[f64]) {
        let count = (self.rows.len() / dim) as f64;
        self.mean.clear();
        self.mean.resize(dim, 0.0);
        for row in self.rows.chunks_exact(dim) {
            self.mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        self.mean.iter_mut().for_each(|sum| *sum /= count);
        let rows = self.rows.chunks_exact(dim).zip(self.narrow.chunks_exact_mut(dim));
        for (row, narrow) in rows {
            let centred = row.iter().zip(&self.mean).map(|(x, mean)| (x - mean) as f32);
            narrow.iter_mut().zip(centred).for_each(|(to, x)| *to = x);
        }
        self.products.resize(dim * dim, 0.0);
        gram(dim, &self.narrow, &mut self.products);
        self.scatter.clear();
        self.scatter.extend(self.products.iter().map(|&x| f64::from(x)));
        (&self.mean, &self.scatter)
    }
}

/// Merges the mean and scatter of one head's rows into those of others: `counts` are of these and of those that come.
fn merge(counts: [u64; 2], so_far: (&mut [f64], &mut [f64]), more: (&[f64], &[f64])) {
    let [a, b] = counts.map(|n| n as f64);
    if b == 0.0 {
        return;
    }
    let (mean, scatter) = so_far;
    let apart: Vec<f64> = more.0.iter().zip(&*mean).map(|(to, from)| to - from).collect();
    let weight = a * b / (a + b);
    let rows = scatter.chunks_exact_mut(apart.len()).zip(more.1.chunks_exact(apart.len()));
    for ((row, more), x) in rows.zip(&apart) {
        let terms = more.iter().zip(&apart).map(|(more, y)| more + weight * x * y);
        row.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    }
    mean.iter_mut().zip(&apart).for_each(|(mean, x)| *mean += x * (b / (a + b)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::Pairs;

    const SHAPE: [u32; 3] = [3, 1, 6];

    fn shape() -> LayerShape {
        LayerShape::new(SHAPE[0], SHAPE[1], SHAPE[2]).unwrap()
    }

    /// Of a large mean and a small deviation, where sums of squares would cancel.
    fn queries(tokens: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..3 * tokens * 6).map(|i| 100.0 * (i % 6) as f32 + noise()).collect()
    }

    fn rows(data: &[f32]) -> Rows<'_, HostSlice<'_>> {
        Rows::heads_first(HostSlice::F32(data), 3, data.len() as u32 / 18, 6).unwrap()
    }

    fn of(data: &[f32]) -> QueryMoments {
        let mut moments = QueryMoments::new(shape());
        moments.push(&rows(data)).unwrap();
        moments
    }

    /// Some tokens of `[3, tokens, 6]`.
    fn part(data: &[f32], tokens: Range<usize>) -> Vec<f32> {
        let heads = data.chunks(data.len() / 3);
        heads.flat_map(|head| head[tokens.start * 6..tokens.end * 6].to_vec()).collect()
    }

    fn close(got: &[f64], want: &[f64], tolerance: f64) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() <= tolerance, "{got} {want}");
        }
    }

    #[test]
    fn moments_are_those_of_the_definition() {
        let data = queries(700);
        let moments = of(&data);
        assert_eq!(moments.tokens(), 700);
        for (head, rows) in data.chunks(700 * 6).enumerate() {
            let column = |i: usize| rows.chunks(6).map(move |row| f64::from(row[i]));
            let mean: Vec<f64> = (0..6).map(|i| column(i).sum::<f64>() / 700.0).collect();
            close(&moments.mean[head * 6..][..6], &mean, 1e-10);
            let element = |at: usize| {
                let [i, j] = [at / 6, at % 6];
                column(i).zip(column(j)).map(|(x, y)| (x - mean[i]) * (y - mean[j])).sum()
            };
            let scatter: Vec<f64> = (0..36).map(element).collect();
            let largest = scatter.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
            close(&moments.scatter[head * 36..][..36], &scatter, 1e-6 * largest);
        }
    }

    #[test]
    fn the_way_they_come_does_not_matter() {
        let data = queries(700);
        let whole = of(&data);
        let mut pushed = of(&part(&data, 0..1));
        for tokens in [1..2, 2..300, 300..300, 300..700] {
            pushed.push(&rows(&part(&data, tokens))).unwrap();
        }
        let mut merged = of(&part(&data, 0..450));
        merged.merge(&of(&part(&data, 450..700))).unwrap();
        merged.merge(&QueryMoments::new(shape())).unwrap();
        let mut late = QueryMoments::new(shape());
        late.merge(&whole).unwrap();
        assert_eq!(late, whole);
        for other in [pushed, merged] {
            assert_eq!(other.tokens(), 700);
            close(&other.mean, &whole.mean, 1e-10);
            close(&other.scatter, &whole.scatter, 1e-4);
        }
    }

    #[test]
    fn queries_after_rope_are_turned_back() {
        let data: Vec<f32> = queries(300).iter().map(|x| x / 100.0).collect();
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            // The last two elements do not turn.
            let rope = Rope::with_base(1000.0, 4, pairs).unwrap();
            let mut rotated = Vec::new();
            for (i, row) in data.chunks(6).enumerate() {
                let mut row: Vec<f64> = row.iter().map(|&x| x.into()).collect();
                rope.turn(&rope.at(1_000_000 + i as u64 % 300), &mut row);
                rotated.extend(row.into_iter().map(|x| x as f32));
            }
            assert!(rotated.iter().zip(&data).any(|(a, b)| (a - b).abs() > 1.0));
            let mut moments = QueryMoments::new(shape());
            moments.push_rotated(&rows(&rotated), &rope, 1_000_000).unwrap();
            let plain = of(&data);
            close(&moments.mean, &plain.mean, 1e-6);
            close(&moments.scatter, &plain.scatter, 1e-6);
        }
    }

    /// `R̄ΣR̄ᵀ` with matrices written out, of one position and of many.
    #[test]
    fn expectation_rotates_from_both_sides() {
        let moments = of(&queries(50));
        let rope = Rope::with_base(50.0, 6, Pairs::Halves).unwrap();
        for positions in [9..10, 50..562] {
            let turns = rope.mean(positions.clone());
            let mut rotation = [[0.0; 6]; 6];
            for (i, [cos, sin]) in turns.into_iter().enumerate() {
                (rotation[i][i], rotation[i][i + 3]) = (cos, -sin);
                (rotation[i + 3][i], rotation[i + 3][i + 3]) = (sin, cos);
            }
            let expected = moments.expected(&rope, positions).unwrap();
            for head in 0..3 {
                let (mean, scatter) = (&moments.mean[head * 6..], &moments.scatter[head * 36..]);
                let turned = |i: usize| (0..6).map(|k| rotation[i][k] * mean[k]).sum::<f64>();
                let element = |at: usize| -> f64 {
                    let terms = (0..36).map(|k| {
                        rotation[at / 6][k / 6] * scatter[k] / 50.0 * rotation[at % 6][k % 6]
                    });
                    terms.sum()
                };
                let wide = |x: &[f32]| x.iter().map(|&x| x.into()).collect::<Vec<f64>>();
                close(&wide(expected.mean(head)), &(0..6).map(turned).collect::<Vec<_>>(), 1e-4);
                let covariance: Vec<f64> = (0..36).map(element).collect();
                close(&wide(expected.covariance(head)), &covariance, 1e-6);
            }
        }
    }

    #[test]
    fn of_no_queries_everything_is_alike() {
        let rope = Rope::with_base(50.0, 6, Pairs::Halves).unwrap();
        let expected = QueryMoments::new(shape()).expected(&rope, 0..1).unwrap();
        assert!(expected.mean(2).iter().chain(expected.covariance(0)).all(|&x| x == 0.0));
    }

    #[test]
    fn nonsense_is_named() {
        let named = |result: Result<ExpectedQueries>, words: &[&str]| {
            let error = result.unwrap_err().to_string();
            words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
        };
        let new = |mean, covariance| ExpectedQueries::new(shape(), mean, covariance);
        named(new(vec![0.0; 17], vec![0.0; 108]), &["mean", "expected 18, got 17"]);
        named(new(vec![0.0; 18], vec![0.0; 18]), &["covariance", "expected 108, got 18"]);
        named(new(vec![f32::NAN; 18], vec![0.0; 108]), &["mean", "NaN", "finite"]);
        named(new(vec![0.0; 18], vec![f32::INFINITY; 108]), &["covariance", "inf", "finite"]);
        let rope = Rope::with_base(50.0, 6, Pairs::Halves).unwrap();
        let mut moments = of(&[f32::NAN; 18]);
        named(moments.expected(&rope, 0..9), &["mean", "NaN"]);
        named(moments.expected(&rope, 9..9), &["positions", "positive"]);
        let wide = Rope::with_base(50.0, 8, Pairs::Halves).unwrap();
        named(moments.expected(&wide, 0..9), &["8", "at most 6"]);
        let other = Rows::heads_first(HostSlice::F32(&[0.0; 16]), 2, 1, 8).unwrap();
        assert!(moments.push(&other).is_err());
        let other = QueryMoments::new(LayerShape::new(2, 1, 6).unwrap());
        assert!(moments.merge(&other).is_err());
    }

    #[test]
    fn covariances_are_made_symmetric() {
        let shape = LayerShape::new(1, 1, 2).unwrap();
        let expected = ExpectedQueries::new(shape, vec![1.0, 2.0], vec![4.0, 3.0, 1.0, 5.0]);
        assert_eq!(expected.unwrap().covariance(0), [4.0, 2.0, 2.0, 5.0]);
    }
}
