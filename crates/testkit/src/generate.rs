//! Deterministic test data: layers from a readable description, scores of every awkward kind.

use std::iter::once;
use std::ops::Range;

use kvbudget::{Dtype, ExpectedQueries, LayerShape, Position};

use crate::data::{Layer, Place, Tensor};
use crate::naive::{Matrix, WindowHead, log_sum_exp};

/// Around lane, warp, tile and page sizes, and nothing at all.
pub const LENGTHS: [u32; 22] =
    [0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1025];

/// splitmix64: the same numbers everywhere, for ever.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Uniform in `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }
    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
    /// About standard normal (a sum of uniforms; tails do not matter here).
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
    /// `rows` rows of `dim` about normal numbers.
    pub fn matrix(&mut self, rows: u32, dim: u32) -> Matrix<f64> {
        (0..rows).map(|_| (0..dim).map(|_| self.normal()).collect()).collect()
    }
    /// `count` of `0..n`, ascending.
    pub fn choose(&mut self, count: u32, n: u32) -> Vec<u32> {
        let mut chosen = Vec::new();
        for i in 0..n {
            let (left, wanted) = (n - i, count - chosen.len() as u32);
            if self.below(u64::from(left)) < u64::from(wanted) {
                chosen.push(i);
            }
        }
        chosen
    }
}

/// What keys look like to the queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Independent of the queries: flat attention.
    Random,
    /// Every 13th key points along a query (of the probe, if there is one): nearly all mass on few slots, the rest down to
    /// underflow.
    Peaky,
    /// All keys of a head the same: uniform attention, every score a tie.
    Equal,
    /// All zero: no direction, no norm.
    Zero,
}

/// A layer in words; `..Spec::default()` for what a case does not care about.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Tokens seen.
    pub tokens: u32,
    /// Slots per KV head of a compressed cache, at random positions. Without: all tokens.
    pub kept: Option<Vec<u32>>,
    /// `H`.
    pub kv_heads: u32,
    /// `G`.
    pub group: u32,
    /// `D`.
    pub dim: u32,
    /// Query rows; 0 for none.
    pub queries: u32,
    /// Query rows of a probe; 0 for none.
    pub probe: u32,
    /// Rows of the output projection; 0 for none.
    pub hidden: u32,
    /// Storage of everything but the log-sum-exp.
    pub dtype: Dtype,
    /// Layout of keys and values.
    pub place: Place,
    /// Layout of queries.
    pub query_place: Place,
    /// Lend the log-sum-exp of the queries.
    pub lse: bool,
    /// Layout of norms of hidden rows. Without: none.
    pub hidden_norms: Option<Place>,
    /// Lend the mean and covariance of the queries to come.
    pub expected: bool,
    /// Kind of keys.
    pub keys: Keys,
    /// Seed.
    pub seed: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            tokens: 37,
            kept: None,
            kv_heads: 2,
            group: 2,
            dim: 16,
            queries: 0,
            probe: 0,
            hidden: 0,
            dtype: Dtype::F32,
            place: Place::HeadsFirst,
            query_place: Place::HeadsFirst,
            lse: false,
            hidden_norms: None,
            expected: false,
            keys: Keys::Random,
            seed: 1,
        }
    }
}

impl Spec {
    /// Generates the layer.
    pub fn build(&self) -> Layer {
        let Self { tokens, kv_heads, group, dim, dtype, .. } = *self;
        let rng = &mut Rng::new(self.seed);
        let query_heads = kv_heads * group;
        let lens = self.kept.clone().unwrap_or(vec![tokens; kv_heads as usize]);
        let mut rows = |count| (0..query_heads).map(|_| rng.matrix(count, dim)).collect::<Vec<_>>();
        let (q, probe) = (rows(self.queries), rows(self.probe));
        let looks = if self.probe > 0 { &probe } else { &q };
        let k = (0..kv_heads)
            .map(|h| self.head_keys(rng, lens[h as usize], &looks[(h * group) as usize]));
        let k = Tensor::new(k.collect(), dim, dtype, self.place);
        let v = lens.iter().map(|&len| rng.matrix(len, dim)).collect();
        let o_proj = vec![rng.matrix(self.hidden, query_heads * dim)];
        let positions = self.kept.as_ref().map(|kept| {
            let head = |&len: &u32| rng.choose(len, tokens).into_iter().map(Position).collect();
            kept.iter().map(head).collect()
        });
        let mut layer = Layer {
            shape: LayerShape::new(query_heads, kv_heads, dim).expect("a valid shape"),
            tokens,
            k,
            v: Tensor::new(v, dim, dtype, self.place),
            q: (self.queries > 0).then(|| Tensor::new(q, dim, dtype, self.query_place)),
            probe: (self.probe > 0).then(|| Tensor::new(probe, dim, dtype, self.query_place)),
            o_proj: (self.hidden > 0)
                .then(|| Tensor::new(o_proj, query_heads * dim, dtype, Place::HeadsFirst)),
            lse: None,
            hidden_norms: None,
            expected: None,
            positions,
        };
        if self.lse {
            let rows = (0..kv_heads as usize).flat_map(|h| lse(&layer, h)).collect();
            layer.lse = Some(Tensor::new(rows, 1, Dtype::F32, Place::HeadsFirst));
        }
        layer.hidden_norms = self.hidden_norms.map(|place| {
            let norms = (0..tokens).map(|_| vec![20.0 + 3.0 * rng.normal()]).collect();
            Tensor::new(vec![norms], 1, Dtype::F32, place)
        });
        layer.expected = self.expected.then(|| expected(layer.shape, rng));
        layer
    }

    fn head_keys(&self, rng: &mut Rng, len: u32, queries: &Matrix<f64>) -> Matrix<f64> {
        let mut k = rng.matrix(len, self.dim);
        match self.keys {
            Keys::Random => {}
            Keys::Peaky => {
                for t in (3..k.len()).step_by(13) {
                    let q = &queries[t % queries.len().max(1)];
                    k[t] = q.iter().map(|x| 4.0 * x).collect();
                }
            }
            Keys::Equal => k = vec![rng.matrix(1, self.dim).remove(0); len as usize],
            Keys::Zero => k.iter_mut().for_each(|row| row.fill(0.0)),
        }
        k
    }
}

/// Queries that spread along four directions each.
fn expected(shape: LayerShape, rng: &mut Rng) -> ExpectedQueries {
    let (heads, dim) = (shape.query_heads() as u32, shape.head_dim());
    let mean = rng.matrix(heads, dim as u32).concat().into_iter().map(|x| x as f32).collect();
    let covariance = (0..heads).flat_map(|_| {
        let along = rng.matrix(4, dim as u32);
        let element = |i: usize, j: usize| along.iter().map(|b| b[i] * b[j]).sum::<f64>() as f32;
        (0..dim * dim).map(|at| element(at / dim, at % dim)).collect::<Vec<_>>()
    });
    ExpectedQueries::new(shape, mean, covariance.collect()).expect("finite numbers")
}

/// What the prefill of KV head `h` would have computed, `[G][W][1]`.
fn lse(layer: &Layer, h: usize) -> Vec<Matrix<f64>> {
    let head: WindowHead<f64> = window_head(layer, h);
    let of_query = |q: &[Matrix<f64>], g: usize, w: usize| {
        let newest = layer.tokens - q[g].len() as u32 + w as u32;
        vec![log_sum_exp(&head.logits(&q[g][w], newest))]
    };
    let rows = |g: usize| (0..head.q[g].len()).map(|w| of_query(&head.q, g, w)).collect();
    (0..head.q.len()).map(rows).collect()
}

/// What the window oracle wants to know of KV head `h`.
pub fn window_head<F: crate::naive::Float>(layer: &Layer, h: usize) -> WindowHead<F> {
    let group = layer.group(h);
    let queries = layer.q.as_ref().expect("a layer with queries");
    let column = |m: Matrix<F>| m.iter().map(|row| row[0]).collect();
    WindowHead {
        q: group.clone().map(|g| queries.head(g)).collect(),
        k: layer.k.head(h),
        positions: layer.slot_positions().swap_remove(h),
        tokens: layer.tokens,
        lse: layer.lse.as_ref().map(|lse| group.map(|g| column(lse.head(g))).collect()),
    }
}

/// The same of a probe's queries.
pub fn probe_head<F: crate::naive::Float>(layer: &Layer, h: usize) -> WindowHead<F> {
    let (q, lse) = (layer.probe.clone(), None);
    window_head(&Layer { q, lse, ..layer.clone() }, h)
}

/// Kinds of score rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// All different, positive and negative.
    Random,
    /// Five different values: the cut runs through a tie.
    Ties,
    /// One value: ties decide everything.
    Equal,
    /// NaN only: they rank, and by slot.
    Nan,
    /// `+0` and `-0`: equal, so slots decide.
    Zeros,
    /// ±∞, NaN of both signs, and finite numbers.
    Extremes,
    /// Subnormals and the smallest normals, both signs.
    Subnormal,
    /// Best first, or best last: early exits and heaps go wrong here.
    Ascending,
    /// The reverse.
    Descending,
    /// bf16 values with low bits equal: radix digits that never differ.
    Coarse,
}

impl Scores {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Random,
        Self::Ties,
        Self::Equal,
        Self::Nan,
        Self::Zeros,
        Self::Extremes,
        Self::Subnormal,
        Self::Ascending,
        Self::Descending,
        Self::Coarse,
    ];

    /// A row of `len` scores.
    pub fn row(self, len: u32, seed: u64) -> Vec<f32> {
        let rng = &mut Rng::new(seed);
        let extremes =
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MAX, f32::MIN, 1.0, -1.0];
        let one = |t: u32| match self {
            Self::Random => rng.normal() as f32,
            Self::Ties => rng.below(5) as f32 - 2.0,
            Self::Equal => 0.25,
            Self::Nan => f32::NAN,
            Self::Zeros => [0.0, -0.0][rng.below(2) as usize],
            Self::Extremes => extremes[rng.below(8) as usize],
            Self::Subnormal => {
                let bits = rng.below(0x0100_0000) as u32;
                f32::from_bits(bits | (rng.bits() as u32 & 0x8000_0000))
            }
            Self::Ascending => t as f32,
            Self::Descending => -(t as f32),
            Self::Coarse => half::bf16::from_f64(rng.normal()).to_f32(),
        };
        (0..len).map(one).collect()
    }
}

/// Kinds of protected ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protected {
    /// None.
    Nothing,
    /// Every slot, as one range.
    Everything,
    /// Every slot, slot by slot: adjacent ranges.
    EverySlot,
    /// Four sinks and the last third.
    SinksAndRecent,
    /// A stretch in the middle.
    Middle,
}

impl Protected {
    /// Every kind.
    pub const ALL: [Self; 5] =
        [Self::Nothing, Self::Everything, Self::EverySlot, Self::SinksAndRecent, Self::Middle];

    /// The ranges in a segment of `len` slots.
    pub fn ranges(self, len: u32) -> Vec<Range<u32>> {
        let sinks = len.min(4);
        let ranges = match self {
            Self::Nothing => vec![],
            Self::Everything => Vec::from_iter(once(0..len)),
            Self::EverySlot => (0..len).map(|t| t..t + 1).collect(),
            Self::SinksAndRecent => vec![0..sinks, (len - len / 3).max(sinks)..len],
            Self::Middle => Vec::from_iter(once(len / 3..len / 2)),
        };
        ranges.into_iter().filter(|r| !r.is_empty()).collect()
    }
}
