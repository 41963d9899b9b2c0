//! The workload that speed is measured on: one layer of Llama-3.1-8B, a snap of the last 32 queries, a fifth kept.

use half::bf16;
use kvbudget::backend::AttendView;
use kvbudget::backend::cuda::{Cuda, DeviceLayer, DeviceSlice, Tensor};
use kvbudget::backend::ops::{Attend, Contest, Reduce, WindowAttention};
use kvbudget::{LayerShape, LayerView, Ragged, Rows};

pub const HEADS: u32 = 8;
pub const GROUP: u32 = 4;
pub const DIM: u32 = 128;
pub const WINDOW: u32 = 32;
pub const HIDDEN: u32 = 4096;
/// Slots of each head.
pub const TOKENS: u32 = 32768;
/// Bytes of the keys, or of the values, of one slot of one head.
pub const ROW: u64 = DIM as u64 * 2;

/// SnapKV's scores.
pub const SCORING: WindowAttention = WindowAttention::plain(WINDOW, Reduce::Mean);

/// The decode step's attention.
pub fn attention() -> Attend {
    Attend { scale: (DIM as f32).powf(-0.5) }
}

/// A layer of the model on a device, of a length and a hidden size.
pub struct Layer {
    pub tokens: u32,
    pub hidden: u32,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    lse: Tensor,
    o_proj: Tensor,
}

/// Uniform in ±1, the same everywhere.
pub fn noise(count: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

impl Layer {
    pub fn new(cuda: &Cuda, tokens: u32, hidden: u32) -> Self {
        let tensor = |rows: u32, columns: u32, seed| {
            let elements = noise(rows as usize * columns as usize, seed).map(bf16::from_f32);
            cuda.tensor(&elements.collect::<Vec<_>>()).expect("room for a tensor")
        };
        let queries = HEADS * GROUP;
        // About what the keys below give: the sum of `tokens` exponentials of small numbers.
        let lse = vec![(tokens as f32).ln(); (queries * WINDOW) as usize];
        Self {
            tokens,
            hidden,
            k: tensor(HEADS * tokens, DIM, 1),
            v: tensor(HEADS * tokens, DIM, 2),
            q: tensor(queries * WINDOW, DIM, 3),
            lse: cuda.tensor(&lse).expect("room for the log-sum-exp"),
            o_proj: tensor(hidden, queries * DIM, 4),
        }
    }

    fn rows<'a>(tensor: &'a Tensor, heads: u32, len: u32, dim: u32) -> Rows<'a, DeviceSlice<'a>> {
        Rows::heads_first(tensor.lend(), heads, len, dim).expect("the tensor's own shape")
    }

    /// The layer as a view, with or without the prefill's log-sum-exp.
    pub fn view(&self, lse: bool) -> DeviceLayer<'_> {
        let queries = HEADS * GROUP;
        let shape = LayerShape::new(queries, HEADS, DIM).expect("the model's shape");
        let cache = |tensor| Self::rows(tensor, HEADS, self.tokens, DIM);
        let view = LayerView::new(shape, self.tokens, cache(&self.k), cache(&self.v))
            .and_then(|view| view.with_queries(Self::rows(&self.q, queries, WINDOW, DIM)))
            .and_then(|view| {
                view.with_output_projection(Self::rows(&self.o_proj, 1, self.hidden, queries * DIM))
            })
            .expect("a consistent layer");
        if !lse {
            return view;
        }
        view.with_lse(Self::rows(&self.lse, queries, WINDOW, 1)).expect("one for each query")
    }

    /// The newest token over everything.
    pub fn attend(&self) -> AttendView<'_, DeviceSlice<'_>> {
        let cache = |tensor| Self::rows(tensor, HEADS, self.tokens, DIM);
        let q = Rows::strided(
            self.q.lend(),
            HEADS * GROUP,
            1,
            DIM,
            (WINDOW * DIM) as usize,
            DIM as usize,
        )
        .expect("a query of each head");
        AttendView { q, k: cache(&self.k), v: cache(&self.v) }
    }

    /// Rows of scores, one per head.
    pub fn lens(&self) -> Vec<u32> {
        vec![self.tokens; HEADS as usize]
    }

    /// AdaKV's contest for a fifth of the slots: a fifth of the fair share for sure.
    pub fn contest(&self) -> Contest {
        let budget = u64::from(HEADS * self.tokens) / 5;
        let floors = vec![budget / u64::from(HEADS) / 5; HEADS as usize];
        Contest { segments: 0..HEADS as usize, budget, floors }
    }

    /// Sinks and the window.
    pub fn protected(&self) -> Ragged<std::ops::Range<u32>> {
        (0..HEADS).map(|_| vec![0..4, self.tokens - WINDOW..self.tokens]).collect()
    }
}
