//! The CPU operations that read tensors, against loops in f64 written here from the definitions.

use std::sync::Arc;

use half::{bf16, f16};
use kvbudget::backend::cpu::{Cpu, HostSlice};
use kvbudget::backend::ops::{Attend, Lag, Positional, Reduce, WindowAttention};
use kvbudget::backend::{AttendView, Backend};
use kvbudget::{Dtype, Error, LayerShape, LayerView, Position, Ragged, Rows};

/// SplitMix64, uniform in [-1, 1).
struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    fn fill(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

/// Elements in their storage type, and what they widen to.
struct Data {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    dtype: Dtype,
}

impl Data {
    fn new(values: Vec<f32>, dtype: Dtype) -> Self {
        let f16: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
        let bf16: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let f32 = match dtype {
            Dtype::F32 => values,
            Dtype::F16 => f16.iter().map(|x| x.to_f32()).collect(),
            Dtype::BF16 => bf16.iter().map(|x| x.to_f32()).collect(),
        };
        Self { f32, f16, bf16, dtype }
    }
    fn slice(&self) -> HostSlice<'_> {
        match self.dtype {
            Dtype::F32 => HostSlice::F32(&self.f32),
            Dtype::F16 => HostSlice::F16(&self.f16),
            Dtype::BF16 => HostSlice::BF16(&self.bf16),
        }
    }
}

/// One layer of one sequence. `rows[h][t]` of K and V is row `starts[h] + t` of a flattened buffer.
struct Layer {
    dim: usize,
    group: usize,
    tokens: u32,
    hidden: usize,
    starts: Vec<u64>,
    lens: Vec<u32>,
    positions: Option<Vec<Vec<Position>>>,
    k: Data,
    v: Data,
    q: Data,
    q_rows: usize,
    o: Data,
}

impl Layer {
    /// Full heads of `tokens` slots, or heads that hold every `step[h]`-th position.
    fn new(seed: u64, group: usize, dim: usize, tokens: u32, steps: &[u32], q_rows: usize) -> Self {
        Self::with_dtype(seed, group, dim, tokens, steps, q_rows, Dtype::F32)
    }

    fn with_dtype(
        seed: u64,
        group: usize,
        dim: usize,
        tokens: u32,
        steps: &[u32],
        q_rows: usize,
        dtype: Dtype,
    ) -> Self {
        let mut rng = Rng(seed);
        let rows: Vec<Vec<Position>> = steps
            .iter()
            .map(|&step| (0..tokens).filter(|p| p % step == step - 1).map(Position).collect())
            .collect();
        let lens: Vec<u32> = rows.iter().map(|r| r.len() as u32).collect();
        // Slack between heads, so that a wrong start shows.
        let mut starts = vec![2u64];
        for &len in &lens {
            starts.push(starts[starts.len() - 1] + u64::from(len) + 3);
        }
        let total = starts.pop().unwrap() as usize * dim;
        let hidden = 2 * dim + 1;
        let query_heads = group * steps.len();
        let mut q = rng.fill(query_heads * q_rows * dim);
        q.iter_mut().for_each(|x| *x *= 4.0);
        Self {
            dim,
            group,
            tokens,
            hidden,
            starts,
            positions: steps.iter().any(|&s| s != 1).then_some(rows),
            lens,
            k: Data::new(rng.fill(total), dtype),
            v: Data::new(rng.fill(total), dtype),
            q: Data::new(q, dtype),
            q_rows,
            o: Data::new(rng.fill(hidden * query_heads * dim), Dtype::F32),
        }
    }

    fn heads(&self) -> usize {
        self.lens.len()
    }
    fn shape(&self) -> LayerShape {
        let heads = self.heads() as u32;
        LayerShape::new(heads * self.group as u32, heads, self.dim as u32).unwrap()
    }
    fn kv<'a>(&'a self, data: &'a Data) -> Rows<'a, HostSlice<'a>> {
        Rows::ragged(data.slice(), self.dim as u32, &self.starts, &self.lens).unwrap()
    }
    fn queries(&self) -> Rows<'_, HostSlice<'_>> {
        let heads = (self.heads() * self.group) as u32;
        Rows::heads_first(self.q.slice(), heads, self.q_rows as u32, self.dim as u32).unwrap()
    }
    fn view(&self) -> LayerView<'_, HostSlice<'_>> {
        let (k, v) = (self.kv(&self.k), self.kv(&self.v));
        let columns = (self.heads() * self.group * self.dim) as u32;
        let o = Rows::heads_first(self.o.slice(), 1, self.hidden as u32, columns).unwrap();
        let view = LayerView::new(self.shape(), self.tokens, k, v)
            .and_then(|view| view.with_queries(self.queries()))
            .and_then(|view| view.with_output_projection(o))
            .unwrap();
        match &self.positions {
            Some(positions) => view.with_positions(positions).unwrap(),
            None => view,
        }
    }
    fn row<'a>(&self, data: &'a Data, head: usize, slot: usize) -> &'a [f32] {
        let start = (self.starts[head] as usize + slot) * self.dim;
        &data.f32[start..start + self.dim]
    }
    fn position(&self, head: usize, slot: usize) -> u32 {
        self.positions.as_ref().map_or(slot as u32, |p| p[head][slot].0)
    }
    fn query(&self, hq: usize, row: usize) -> &[f32] {
        &self.q.f32[(hq * self.q_rows + row) * self.dim..][..self.dim]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Softmax over the first `seen` logits, zeros beyond; and its log-sum-exp.
fn softmax(logits: &[f64], seen: usize) -> (Vec<f64>, f64) {
    let max = logits[..seen].iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits[..seen].iter().map(|x| (x - max).exp()).sum();
    let weight = |i: usize| if i < seen { (logits[i] - max).exp() / sum } else { 0.0 };
    ((0..logits.len()).map(weight).collect(), max + sum.ln())
}

fn reduce(kind: Reduce, values: impl Iterator<Item = f64> + Clone) -> f64 {
    match kind {
        Reduce::Mean => values.clone().sum::<f64>() / values.count() as f64,
        Reduce::Max => values.fold(0.0, f64::max),
    }
}

/// Scores, mean and the log-sum-exp `[Hq, window]` of one layer, from the definition.
fn oracle(op: &WindowAttention, layer: &Layer) -> (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<f32>) {
    let window = op.window as usize;
    let first = layer.tokens - op.window;
    let (mut scores, mut means, mut lses) = (Vec::new(), Vec::new(), Vec::new());
    for head in 0..layer.heads() {
        let len = layer.lens[head] as usize;
        let before = |p: u32| (0..len).filter(|&t| layer.position(head, t) < p).count();
        let past = before(first);
        let n = if op.score_window { len } else { past };
        let mut rows: Vec<Vec<Vec<f64>>> = Vec::new();
        let mut raw: Vec<Vec<Vec<f64>>> = Vec::new();
        for g in 0..layer.group {
            let hq = head * layer.group + g;
            let (mut pooled, mut plain) = (Vec::new(), Vec::new());
            for w in 0..window {
                let q = layer.query(hq, layer.q_rows - window + w);
                let logits: Vec<f64> = (0..len)
                    .map(|t| dot(q, layer.row(&layer.k, head, t)) / (layer.dim as f64).sqrt())
                    .collect();
                let (p, lse) = softmax(&logits, before(first + w as u32 + 1));
                lses.push(lse as f32);
                pooled.push(match op.row_pool {
                    None => p[..n].to_vec(),
                    Some(kernel) => pool_row(&p[..n], kernel as usize),
                });
                plain.push(p);
            }
            rows.push(pooled);
            raw.push(plain);
        }
        let score = |t: usize| {
            let over_window = |g: usize| reduce(op.over_window, rows[g].iter().map(|row| row[t]));
            let heads: Vec<f64> = (0..layer.group).map(over_window).collect();
            reduce(op.over_group, heads.into_iter())
        };
        scores.push((0..len).map(|t| if t < n { score(t) } else { 0.0 }).collect());
        let all = raw.iter().flatten();
        let mean =
            |t: usize| all.clone().map(|row| row[t]).sum::<f64>() / all.clone().count() as f64;
        means.push((0..len).map(|t| if t < past { mean(t) } else { 0.0 }).collect());
    }
    (scores, means, lses)
}

fn pool_row(p: &[f64], kernel: usize) -> Vec<f64> {
    let r = kernel / 2;
    let windows =
        |t: usize| (t.saturating_sub(r)..p.len().min(t + r + 1)).map(|i| p[i]).sum::<f64>();
    let pooled: Vec<f64> = (0..p.len()).map(|t| windows(t) / kernel as f64).collect();
    let (mass, sum) = (p.iter().sum::<f64>(), pooled.iter().sum::<f64>());
    pooled.iter().map(|x| if sum == 0.0 { 0.0 } else { x / sum * mass }).collect()
}

fn assert_close(what: &str, got: &Ragged<f32>, want: &[Vec<f64>], relative: f64) {
    assert_eq!(got.rows(), want.len(), "{what}: rows");
    for (s, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}: length of row {s}");
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(got) - want).abs();
            let ok = error <= relative * want.abs() + 1e-8 || (got.is_nan() && want.is_nan());
            assert!(ok, "{what}: segment {s} slot {i}: got {got:e}, want {want:e}");
        }
    }
}

fn zeros(layers: &[LayerView<'_, HostSlice<'_>>]) -> Ragged<f32> {
    // Not zero: an operation must write everything.
    let lens = layers.iter().flat_map(|l| (0..l.shape().kv_heads()).map(|h| l.k().len(h)));
    Ragged::filled(lens, 7.0)
}

fn op(window: u32) -> WindowAttention {
    WindowAttention {
        window,
        over_window: Reduce::Mean,
        over_group: Reduce::Mean,
        row_pool: None,
        score_window: false,
    }
}

fn check_window(op: &WindowAttention, layers: &[&Layer]) {
    let views: Vec<_> = layers.iter().map(|l| l.view()).collect();
    let (mut out, mut mean) = (zeros(&views), zeros(&views));
    Cpu::new().window_attention(op, &views, &mut out, Some(&mut mean)).unwrap();
    let want: Vec<_> = layers.iter().map(|l| oracle(op, l)).collect();
    let scores: Vec<_> = want.iter().flat_map(|w| w.0.clone()).collect();
    let means: Vec<_> = want.iter().flat_map(|w| w.1.clone()).collect();
    let what = format!("{op:?} over {:?}", layers.iter().map(|l| &l.lens).collect::<Vec<_>>());
    // Logits reach 4·√D in size; an f32 dot product of 32 terms is good to a few 1e-6 of that.
    assert_close(&what, &out, &scores, 3e-5);
    assert_close(&format!("mean of {what}"), &mean, &means, 3e-5);
    // Without the mean the scores are the same bits.
    let mut alone = zeros(&views);
    Cpu::new().window_attention(op, &views, &mut alone, None).unwrap();
    assert_eq!(alone, out);

    // A log-sum-exp is one f32: where logits are huge, its last bit is a factor on everything.
    let lses: Vec<Vec<f32>> = want.into_iter().map(|w| w.2).collect();
    let with_lse: Vec<_> = layers
        .iter()
        .zip(&lses)
        .filter(|(l, lse)| {
            l.q_rows == op.window as usize && lse.iter().all(|x| x.is_infinite() || x.abs() < 100.0)
        })
        .map(|(l, lse)| {
            let heads = (l.heads() * l.group) as u32;
            let rows = Rows::heads_first(HostSlice::F32(lse), heads, op.window, 1).unwrap();
            l.view().with_lse(rows).unwrap()
        })
        .collect();
    if with_lse.len() == layers.len() {
        let (mut out, mut mean) = (zeros(&views), zeros(&views));
        Cpu::new().window_attention(op, &with_lse, &mut out, Some(&mut mean)).unwrap();
        assert_close(&format!("with lse: {what}"), &out, &scores, 3e-5);
        assert_close(&format!("mean with lse: {what}"), &mean, &means, 3e-5);
    }
}

fn variants(window: u32) -> Vec<WindowAttention> {
    let mut all = Vec::new();
    for over_window in [Reduce::Mean, Reduce::Max] {
        for over_group in [Reduce::Mean, Reduce::Max] {
            for row_pool in [None, Some(1), Some(5)] {
                for score_window in [false, true] {
                    all.push(WindowAttention {
                        window,
                        over_window,
                        over_group,
                        row_pool,
                        score_window,
                    });
                }
            }
        }
    }
    all
}

#[test]
fn window_attention_matches_the_definition() {
    for (group, window, tokens) in
        [(1, 1, 1), (1, 1, 2), (3, 4, 4), (4, 4, 5), (4, 8, 40), (1, 7, 9), (3, 40, 60)]
    {
        let layer = Layer::new(tokens.into(), group, 16, tokens, &[1, 1], window as usize);
        for op in variants(window) {
            check_window(&op, &[&layer]);
        }
    }
}

#[test]
fn window_attention_at_tile_edges() {
    for past in [253, 255, 256, 257, 259, 511, 512, 513, 1024, 1030] {
        let layer = Layer::new(past.into(), 2, 8, past + 6, &[1], 9);
        for (row_pool, score_window) in
            [(None, false), (Some(5), false), (Some(13), true), (Some(3), false)]
        {
            let op = WindowAttention { row_pool, score_window, over_window: Reduce::Max, ..op(6) };
            check_window(&op, &[&layer]);
        }
    }
}

#[test]
fn window_attention_with_pooling_wider_than_the_row() {
    for tokens in 3..12 {
        let layer = Layer::new(tokens.into(), 2, 8, tokens, &[1], 2);
        for kernel in [3, 7, 9, 31] {
            for score_window in [false, true] {
                let op = WindowAttention { row_pool: Some(kernel), score_window, ..op(2) };
                check_window(&op, &[&layer]);
            }
        }
    }
    // A halo wider than a tile.
    let layer = Layer::new(5, 1, 8, 900, &[1], 2);
    check_window(&WindowAttention { row_pool: Some(1001), ..op(2) }, &[&layer]);
}

#[test]
fn window_attention_by_position_over_compressed_heads_and_several_views() {
    // Head 1 holds few slots, head 2 holds none inside the window, head 3 none at all before it.
    let a = Layer::new(1, 3, 16, 700, &[1, 5, 97, 698], 12);
    let b = Layer::new(2, 1, 16, 40, &[1, 41], 12);
    let c = Layer::with_dtype(3, 4, 24, 300, &[1, 2], 12, Dtype::BF16);
    let d = Layer::with_dtype(4, 4, 24, 300, &[3, 2], 12, Dtype::F16);
    for op in variants(12) {
        check_window(&op, &[&a, &b, &c, &d]);
    }
}

#[test]
fn window_attention_of_all_queries() {
    // H2O: more query rows than a block holds, causal tiles.
    let layer = Layer::new(9, 4, 8, 330, &[1, 2], 330);
    for op in [
        WindowAttention { score_window: true, ..op(330) },
        WindowAttention { score_window: true, row_pool: Some(3), ..op(330) },
        WindowAttention { over_window: Reduce::Max, ..op(300) },
        op(330),
    ] {
        check_window(&op, &[&layer]);
    }
}

#[test]
fn window_attention_reads_any_layout() {
    let layer = Layer::new(3, 2, 16, 77, &[1, 1], 5);
    let op = WindowAttention { row_pool: Some(3), ..op(5) };
    let views = [layer.view()];
    let mut want = zeros(&views);
    Cpu::new().window_attention(&op, &views, &mut want, None).unwrap();
    let (strided, paged, tables) = relayout(&layer, &layer.k);
    for k in [
        Rows::tokens_first(HostSlice::F32(&strided), 2, 77, 16).unwrap(),
        Rows::paged(HostSlice::F32(&paged), 16, 5, &tables, &layer.lens).unwrap(),
    ] {
        let view = LayerView::new(layer.shape(), 77, k, k).unwrap();
        let view = view.with_queries(layer.queries()).unwrap();
        let mut out = zeros(&[view]);
        Cpu::new().window_attention(&op, &[view], &mut out, None).unwrap();
        assert_eq!(out, want);
    }
}

/// The rows of equally long heads as `[T, H, D]`, and as pages of 5 rows in a scrambled pool.
fn relayout(layer: &Layer, data: &Data) -> (Vec<f32>, Vec<f32>, Vec<Vec<u32>>) {
    let (heads, len) = (layer.heads(), layer.lens[0] as usize);
    let mut strided = Vec::new();
    for t in 0..len {
        (0..heads).for_each(|h| strided.extend_from_slice(layer.row(data, h, t)));
    }
    let pages = len.div_ceil(5);
    let pool = heads * pages + 1;
    let mut paged = vec![f32::NAN; pool * 5 * layer.dim];
    let tables: Vec<Vec<u32>> = (0..heads)
        .map(|h| (0..pages).map(|p| ((p * heads + h) * 7 % pool) as u32).collect())
        .collect();
    for (h, table) in tables.iter().enumerate() {
        for t in 0..len {
            let row = (table[t / 5] as usize * 5 + t % 5) * layer.dim;
            paged[row..row + layer.dim].copy_from_slice(layer.row(data, h, t));
        }
    }
    (strided, paged, tables)
}

#[test]
fn window_attention_lets_nan_poison_what_it_reaches() {
    let mut layer = Layer::new(3, 1, 16, 300, &[1, 1], 4);
    // In the window: seen by the last two queries only.
    let at = (layer.starts[0] as usize + 298) * 16;
    layer.k.f32[at] = f32::NAN;
    for over_window in [Reduce::Mean, Reduce::Max] {
        let views = [layer.view()];
        let mut out = zeros(&views);
        let op = WindowAttention { over_window, row_pool: Some(5), ..op(4) };
        Cpu::new().window_attention(&op, &views, &mut out, None).unwrap();
        assert!(out.row(0)[..296].iter().all(|x| x.is_nan()));
        assert!(out.row(0)[296..].iter().all(|&x| x == 0.0));
        assert!(out.row(1).iter().all(|x| x.is_finite()));
    }
    // Huge keys: the product of unscaled f16 would overflow, logits are far apart, nothing is NaN.
    let mut layer = Layer::new(4, 2, 16, 300, &[1], 4);
    layer.k.f32.iter_mut().for_each(|x| *x *= 1e4);
    check_window(&op(4), &[&layer]);
    let views = [layer.view()];
    let mut out = zeros(&views);
    let op = WindowAttention { row_pool: Some(5), ..op(4) };
    Cpu::new().window_attention(&op, &views, &mut out, None).unwrap();
    assert!(out.data().iter().all(|x| x.is_finite()));
}

#[test]
fn window_attention_refuses_what_it_cannot_do() {
    let layer = Layer::new(3, 2, 16, 20, &[1], 5);
    let view = layer.view();
    let run = |op: WindowAttention, view: LayerView<'_, HostSlice<'_>>, len: usize| {
        let mut out = Ragged::filled([len], 0.0);
        Cpu::new().window_attention(&op, &[view], &mut out, None).unwrap_err()
    };
    assert!(matches!(run(op(0), view, 20), Error::Zero { .. }));
    assert!(matches!(run(op(6), view, 20), Error::TooFewQueries { needed: 6, got: 5, .. }));
    let even = WindowAttention { row_pool: Some(4), ..op(5) };
    assert!(matches!(run(even, view, 20), Error::Parameter { .. }));
    assert!(matches!(run(op(5), view, 19), Error::Shape { .. }));
    let bare = LayerView::new(layer.shape(), 20, *view.k(), *view.v()).unwrap();
    let error = run(op(5), bare, 20);
    assert!(matches!(error, Error::Missing { method: "window attention", .. }));
    let mut out = Ragged::filled([20], 0.0);
    assert!(matches!(Cpu::new().value_norm(&[bare], &mut out), Err(Error::Missing { .. })));
}

#[test]
fn value_norm_matches_the_definition() {
    for (group, dim, tokens) in [(1, 8, 1), (3, 16, 30), (4, 8, 257), (2, 160, 20)] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let layer = Layer::with_dtype(7, group, dim, tokens, &[1, 3], 1, dtype);
            let columns = layer.heads() * group * dim;
            let norm = |head: usize, t: usize| {
                let v = layer.row(&layer.v, head, t);
                let rows = (head * group..(head + 1) * group)
                    .flat_map(|hq| (0..layer.hidden).map(move |o| o * columns + hq * dim));
                rows.map(|at| dot(v, &layer.o.f32[at..at + dim]).abs()).sum::<f64>() / group as f64
            };
            let want: Vec<Vec<f64>> =
                (0..2).map(|h| (0..layer.lens[h] as usize).map(|t| norm(h, t)).collect()).collect();
            let views = [layer.view()];
            let mut out = zeros(&views);
            Cpu::new().value_norm(&views, &mut out).unwrap();
            assert_close("value norm", &out, &want, 1e-5);
        }
    }
}

#[test]
fn key_scores_match_the_definition() {
    for (tokens, dtype) in [(1, Dtype::F32), (513, Dtype::BF16), (1200, Dtype::F16)] {
        let layer = Layer::with_dtype(8, 1, 20, tokens, &[1, 2], 1, dtype);
        let views = [layer.view()];
        let per_slot = |f: &dyn Fn(usize, &[f32]) -> f64| -> Vec<Vec<f64>> {
            let row = |h: usize, t: usize| f(h, layer.row(&layer.k, h, t));
            (0..2).map(|h| (0..layer.lens[h] as usize).map(|t| row(h, t)).collect()).collect()
        };
        let mut out = zeros(&views);
        Cpu::new().key_norm(&views, &mut out).unwrap();
        assert_close("key norm", &out, &per_slot(&|_, k| -dot(k, k).sqrt()), 1e-6);

        let means: Vec<Vec<f32>> = (0..2)
            .map(|h| {
                let mut mean = vec![0f64; 20];
                for t in 0..layer.lens[h] as usize {
                    let k = layer.row(&layer.k, h, t);
                    let norm = dot(k, k).sqrt() * f64::from(layer.lens[h]);
                    mean.iter_mut().zip(k).for_each(|(m, &x)| *m += f64::from(x) / norm);
                }
                mean.into_iter().map(|x| x as f32).collect()
            })
            .collect();
        let cosine = |h: usize, k: &[f32]| {
            let m = &means[h];
            -dot(k, m) / (dot(k, k).sqrt().max(1e-8) * dot(m, m).sqrt().max(1e-8))
        };
        Cpu::new().key_diff(&views, &mut out).unwrap();
        assert_close("key diff", &out, &per_slot(&cosine), 1e-5);
    }
    // Zero keys have no direction, huge keys do not overflow.
    let mut layer = Layer::new(8, 1, 4, 3, &[1], 1);
    layer.k.f32.fill(0.0);
    let mut out = zeros(&[layer.view()]);
    Cpu::new().key_diff(&[layer.view()], &mut out).unwrap();
    assert!(out.data().iter().all(|&x| x == 0.0));
    layer.k.f32.fill(1e30);
    Cpu::new().key_norm(&[layer.view()], &mut out).unwrap();
    assert!(out.data().iter().all(|&x| x == -2e30));
}

/// LagKV in f64: scores and, per partition, the values that ranks come from.
fn lag_oracle(op: &Lag, layer: &Layer, head: usize) -> Vec<f64> {
    let (len, sinks, lag) = (layer.lens[head] as usize, op.sinks as usize, op.lag as usize);
    let mut scores = vec![1.0; len];
    if len < sinks + 2 * lag {
        (sinks..len).for_each(|t| scores[t] = (t - sinks) as f64 / (len - sinks) as f64);
        return scores;
    }
    for p in 0..(len - sinks) / lag - 1 {
        let start = sinks + p * lag;
        let mut score = vec![0f64; lag];
        for data in [&layer.k, &layer.v] {
            let channel = |t: usize, c: usize| f64::from(layer.row(data, head, t)[c]);
            let next = start + lag..start + 2 * lag;
            let deviations: Vec<f64> = (start..start + lag)
                .map(|t| {
                    let z: Vec<f64> = (0..layer.dim)
                        .map(|c| {
                            let all = next.clone().map(|t| channel(t, c));
                            let min = all.clone().fold(f64::INFINITY, f64::min);
                            let range = all.fold(f64::NEG_INFINITY, f64::max) - min;
                            if range == 0.0 { 0.0 } else { (channel(t, c) - min) / range }
                        })
                        .collect();
                    let mean = z.iter().sum::<f64>() / z.len() as f64;
                    let squares: f64 = z.iter().map(|z| (z - mean).powi(2)).sum();
                    (squares / (z.len() - 1) as f64).sqrt()
                })
                .collect();
            let (weights, _) = softmax(&deviations, lag);
            score.iter_mut().zip(weights).for_each(|(s, w)| *s += w / 2.0);
        }
        if !op.cross_scoring {
            let mut order: Vec<usize> = (0..lag).collect();
            order.sort_by(|&a, &b| score[a].total_cmp(&score[b]));
            order.iter().enumerate().for_each(|(r, &i)| score[i] = r as f64 / lag as f64);
        }
        scores[start..start + lag].copy_from_slice(&score);
    }
    scores
}

#[test]
fn lag_matches_the_definition() {
    for tokens in [1, 4, 5, 35, 36, 37, 51, 52, 53, 120] {
        for cross_scoring in [false, true] {
            for sinks in [0, 4] {
                let op = Lag { sinks, lag: 16, cross_scoring };
                let layer = Layer::new(u64::from(tokens), 1, 12, tokens, &[1, 2], 1);
                let mut out = zeros(&[layer.view()]);
                Cpu::new().lag(&op, &[layer.view()], &mut out).unwrap();
                let want: Vec<_> = (0..2).map(|h| lag_oracle(&op, &layer, h)).collect();
                assert_close(&format!("{op:?}"), &out, &want, 1e-5);
            }
        }
    }
}

#[test]
fn lag_survives_constant_channels_and_ties() {
    let mut layer = Layer::new(3, 1, 4, 40, &[1], 1);
    layer.k.f32.fill(2.5);
    layer.v.f32.fill(0.0);
    for cross_scoring in [false, true] {
        let mut out = zeros(&[layer.view()]);
        let op = Lag { sinks: 0, lag: 8, cross_scoring };
        Cpu::new().lag(&op, &[layer.view()], &mut out).unwrap();
        let want = |t: usize| {
            if t >= 32 {
                1.0
            } else if cross_scoring {
                0.125
            } else {
                (t % 8) as f32 / 8.0
            }
        };
        assert!(out.row(0).iter().enumerate().all(|(t, &x)| x == want(t)), "{:?}", out.row(0));
    }
    let mut out = zeros(&[layer.view()]);
    let op = Lag { sinks: 0, lag: 0, cross_scoring: true };
    assert!(Cpu::new().lag(&op, &[layer.view()], &mut out).is_err());
    layer.k.f32[(layer.starts[0] as usize + 9) * 4] = f32::NAN;
    Cpu::new().lag(&Lag { lag: 8, ..op }, &[layer.view()], &mut out).unwrap();
    // Slot 9 is in partition 1 and is the reference of partition 0.
    assert!(out.row(0)[..16].iter().all(|x| x.is_nan()));
    assert!(out.row(0)[16..].iter().all(|x| x.is_finite()));
}

#[test]
fn positional_scores() {
    let edges = [0, 1, 2, 1 << 23, (1 << 24) + 1, (1 << 24) + 2, 1 << 30, (1 << 30) + 1];
    let mut positions: Vec<u32> = edges.to_vec();
    positions.extend([(1 << 30) - 1, (1u32 << 31) - 2, (1 << 31) - 1]);
    positions.sort_unstable();
    let rows = vec![positions.iter().copied().map(Position).collect::<Vec<_>>(); 2];
    let len = positions.len() as u32;
    let data = vec![0f32; 2 * len as usize];
    let k = Rows::heads_first(HostSlice::F32(&data), 2, len, 1).unwrap();
    let view = LayerView::new(LayerShape::new(2, 2, 1).unwrap(), 1 << 31, k, k).unwrap();
    let view = view.with_positions(&rows).unwrap();
    let mut out = zeros(&[view]);
    Cpu::new().positional(Positional::Recency, &[view], &mut out).unwrap();
    assert!(out.row(0).windows(2).all(|w| w[0] < w[1]), "{:?}", out.row(0));
    let random = |seed: u64, layer: u32| {
        let mut out = zeros(&[view]);
        Cpu::new().positional(Positional::Random { seed, layer }, &[view], &mut out).unwrap();
        out
    };
    let base = random(1, 2);
    assert!(base.data().iter().all(|x| (0.0..1.0).contains(x)));
    assert_eq!(base, random(1, 2));
    assert_ne!(base.row(0), base.row(1));
    assert_ne!(base, random(2, 2));
    assert_ne!(base, random(1, 3));
    // By position, not by slot: the score of position 2 is that of a full cache.
    let full = LayerView::new(LayerShape::new(2, 2, 1).unwrap(), 1 << 31, k, k).unwrap();
    let mut slots = zeros(&[full]);
    Cpu::new().positional(Positional::Random { seed: 1, layer: 2 }, &[full], &mut slots).unwrap();
    assert_eq!(slots.row(1)[..3], base.row(1)[..3]);
}

/// Outputs `Hq` rows `[M, D]` and log-sum-exp rows `[M]`.
fn attend_oracle(layer: &Layer, scale: f64) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for hq in 0..layer.heads() * layer.group {
        let head = hq / layer.group;
        let len = layer.lens[head] as usize;
        let (mut rows, mut row_lse) = (Vec::new(), Vec::new());
        for m in 0..layer.q_rows {
            let seen = len.saturating_sub(layer.q_rows - 1 - m);
            let logits: Vec<f64> = (0..len)
                .map(|t| dot(layer.query(hq, m), layer.row(&layer.k, head, t)) * scale)
                .collect();
            let (p, lse) = softmax(&logits, seen);
            row_lse.push(if seen == 0 { f64::NEG_INFINITY } else { lse });
            for c in 0..layer.dim {
                let value = |t: usize| f64::from(layer.row(&layer.v, head, t)[c]);
                rows.push((0..seen).map(|t| p[t] * value(t)).sum());
            }
        }
        out.push(rows);
        lses.push(row_lse);
    }
    (out, lses)
}

fn attend(views: &[AttendView<'_, HostSlice<'_>>], scale: f32) -> (Ragged<f32>, Ragged<f32>) {
    let rows = || views.iter().flat_map(|v| (0..v.q.heads()).map(|_| v.q.len(0)));
    let dims = views.iter().flat_map(|v| (0..v.q.heads()).map(|_| v.q.dim()));
    let mut out = Ragged::filled(rows().zip(dims).map(|(m, d)| m * d), 7.0);
    let mut lse = Ragged::filled(rows(), 7.0);
    Cpu::new().attend(&Attend { scale }, views, &mut out, Some(&mut lse)).unwrap();
    let mut alone = Ragged::filled(out.lens(), 7.0);
    Cpu::new().attend(&Attend { scale }, views, &mut alone, None).unwrap();
    assert_eq!(bits(&alone), bits(&out));
    (out, lse)
}

fn bits(rows: &Ragged<f32>) -> Vec<u32> {
    rows.data().iter().map(|x| x.to_bits()).collect()
}

fn check_attend(layers: &[&Layer]) {
    let views: Vec<_> = layers
        .iter()
        .map(|l| AttendView { q: l.queries(), k: l.kv(&l.k), v: l.kv(&l.v) })
        .collect();
    let (out, lse) = attend(&views, 0.3);
    let want: Vec<_> = layers.iter().map(|l| attend_oracle(l, f64::from(0.3f32))).collect();
    let what = format!("{:?}", layers.iter().map(|l| (&l.lens, l.q_rows)).collect::<Vec<_>>());
    for (row, want) in want.iter().flat_map(|w| &w.0).enumerate() {
        for (i, (&got, &want)) in out.row(row).iter().zip(want).enumerate() {
            let ok = (f64::from(got) - want).abs() <= 2e-5;
            assert!(ok, "{what}: row {row} element {i}: got {got}, want {want}");
        }
    }
    for (row, want) in want.iter().flat_map(|w| &w.1).enumerate() {
        for (&got, &want) in lse.row(row).iter().zip(want) {
            let same = f64::from(got) == want || (f64::from(got) - want).abs() <= 2e-5;
            assert!(same, "{what}: lse of row {row}: got {got}, want {want}");
        }
    }
}

#[test]
fn attend_matches_the_definition() {
    for (group, dim, m) in [(1, 64, 1), (3, 16, 2), (4, 20, 1), (4, 128, 3), (8, 64, 1), (5, 7, 7)]
    {
        for tokens in [1, 2, 63, 64, 65, 127, 128, 129, 300] {
            let m = m.min(tokens as usize);
            check_attend(&[&Layer::new(11, group, dim, tokens, &[1, 2, 7], m)]);
        }
    }
}

#[test]
fn attend_splits_long_heads_and_mixes_sequences() {
    for tokens in [1023, 1024, 1025, 2049, 4500] {
        check_attend(&[&Layer::new(12, 2, 16, tokens, &[1, 4], 3)]);
    }
    let a = Layer::new(1, 2, 32, 200, &[1, 3], 2);
    let b = Layer::with_dtype(2, 4, 64, 90, &[1], 1, Dtype::F16);
    let c = Layer::with_dtype(3, 1, 8, 1500, &[2, 1, 1501], 5, Dtype::BF16);
    check_attend(&[&a, &b, &c]);
}

#[test]
fn attend_at_large_head_dims() {
    for dim in [256, 257, 576, 1024, 2048] {
        check_attend(&[&Layer::new(12, 4, dim, 37, &[1], 3)]);
    }
    let layer = Layer::new(1, 1, 2049, 2, &[1], 1);
    let view = AttendView { q: layer.queries(), k: layer.kv(&layer.k), v: layer.kv(&layer.v) };
    let mut out = Ragged::filled([2049], 0.0);
    let error = Cpu::new().attend(&Attend { scale: 1.0 }, &[view], &mut out, None);
    assert!(matches!(error, Err(Error::TooLarge { .. })));
}

#[test]
fn attend_reads_any_layout() {
    let layer = Layer::new(3, 4, 16, 77, &[1, 1], 2);
    let (k, v) = (layer.kv(&layer.k), layer.kv(&layer.v));
    let want = attend(&[AttendView { q: layer.queries(), k, v }], 0.3);
    let (k, paged_k, tables) = relayout(&layer, &layer.k);
    let (v, paged_v, _) = relayout(&layer, &layer.v);
    let strided = |data| Rows::tokens_first(HostSlice::F32(data), 2, 77, 16).unwrap();
    let view = AttendView { q: layer.queries(), k: strided(&k), v: strided(&v) };
    assert_eq!(attend(&[view], 0.3), want);
    let paged = |data| Rows::paged(HostSlice::F32(data), 16, 5, &tables, &layer.lens).unwrap();
    let view = AttendView { q: layer.queries(), k: paged(&paged_k), v: paged(&paged_v) };
    assert_eq!(attend(&[view], 0.3), want);
}

#[test]
fn attend_keeps_nan_where_it_is_seen() {
    let mut layer = Layer::new(3, 4, 16, 77, &[1, 1], 2);
    // The newest slot of head 0: the first query does not see it.
    let at = (layer.starts[0] as usize + 76) * 16;
    layer.k.f32[at] = f32::NAN;
    layer.v.f32[at] = f32::NAN;
    let view = AttendView { q: layer.queries(), k: layer.kv(&layer.k), v: layer.kv(&layer.v) };
    let (out, lse) = attend(&[view], 0.3);
    for hq in 0..4 {
        assert!(out.row(hq)[..16].iter().all(|x| x.is_finite()));
        assert!(out.row(hq)[16..].iter().all(|x| x.is_nan()));
        assert!(lse.row(hq)[0].is_finite() && lse.row(hq)[1].is_nan());
        assert!(out.row(hq + 4).iter().all(|x| x.is_finite()));
    }
    // Logits of ±1e30: the softmax is one slot, not a NaN.
    layer.k.f32.iter_mut().for_each(|x| *x = if x.is_nan() { 1.0 } else { *x * 1e30 });
    layer.v.f32[at] = 0.0;
    let view = AttendView { q: layer.queries(), k: layer.kv(&layer.k), v: layer.kv(&layer.v) };
    assert!(attend(&[view], 0.3).0.data().iter().all(|x| x.is_finite()));
}

#[test]
fn attend_refuses_wrong_shapes() {
    let layer = Layer::new(3, 4, 16, 7, &[1, 2], 1);
    let view = AttendView { q: layer.queries(), k: layer.kv(&layer.k), v: layer.kv(&layer.v) };
    let run = |view, rows: usize, lse: usize| {
        let mut out = Ragged::filled(vec![16; rows], 0.0);
        let mut lse = Ragged::filled(vec![1; lse], 0.0);
        Cpu::new().attend(&Attend { scale: 1.0 }, &[view], &mut out, Some(&mut lse))
    };
    assert!(run(view, 8, 8).is_ok());
    assert!(run(view, 7, 8).is_err());
    assert!(run(view, 8, 7).is_err());
    let q = Rows::heads_first(layer.q.slice(), 7, 1, 16).unwrap();
    assert!(matches!(run(AttendView { q, ..view }, 7, 7), Err(Error::HeadsNotDivisible { .. })));
    let one = Layer::new(3, 4, 16, 7, &[1], 1);
    assert!(run(AttendView { v: one.kv(&one.v), ..view }, 8, 8).is_err());
}

#[test]
fn bits_do_not_depend_on_threads() {
    let a = Layer::with_dtype(21, 4, 32, 2600, &[1, 3], 9, Dtype::F16);
    let b = Layer::new(22, 4, 32, 300, &[1], 300);
    let (views, all) = ([a.view()], [a.view(), b.view()]);
    let attends = [AttendView { q: a.queries(), k: a.kv(&a.k), v: a.kv(&a.v) }];
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let cpu = Cpu::with_pool(Arc::new(pool));
        let mut results = Vec::new();
        for op in [op(9), WindowAttention { row_pool: Some(5), ..op(9) }] {
            let (mut out, mut mean) = (zeros(&all), zeros(&all));
            cpu.window_attention(&op, &all, &mut out, Some(&mut mean)).unwrap();
            results.extend([bits(&out), bits(&mean)]);
        }
        let all_queries = WindowAttention { score_window: true, ..op(300) };
        let mut out = zeros(&[b.view()]);
        cpu.window_attention(&all_queries, &[b.view()], &mut out, None).unwrap();
        results.push(bits(&out));
        let mut out = zeros(&views);
        cpu.value_norm(&views, &mut out).unwrap();
        results.push(bits(&out));
        cpu.key_diff(&views, &mut out).unwrap();
        results.push(bits(&out));
        cpu.lag(&Lag { sinks: 4, lag: 64, cross_scoring: true }, &views, &mut out).unwrap();
        results.push(bits(&out));
        let mut out = Ragged::filled(vec![9 * 32; 8], 0.0);
        let mut lse = Ragged::filled(vec![9; 8], 0.0);
        cpu.attend(&Attend { scale: 0.2 }, &attends, &mut out, Some(&mut lse)).unwrap();
        results.extend([bits(&out), bits(&lse)]);
        results
    };
    let one = run(1);
    for threads in [2, 3] {
        for (i, (got, want)) in run(threads).iter().zip(&one).enumerate() {
            assert!(got == want, "result {i} differs between 1 and {threads} threads");
        }
    }
}
