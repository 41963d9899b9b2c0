//! Attention of the window over all keys, and of the newest token over what is held.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};

use crate::gpu::{CANARY, Failure, Gpu, Outcome, expect, expect_untouched, launch};
use crate::reference::{self, Random};

const DIM: usize = 128;
/// Units of the last place of an f32 near 1.
const ULP: f64 = 1.0 / (1 << 23) as f64;

#[repr(C)]
#[derive(Clone, Default)]
struct Segment {
    first: i64,
    length: u32,
    unused: u32,
}
// SAFETY: plain old data, laid out as kernels/window_attention.cu and kernels/attend.cu have it.
unsafe impl DeviceRepr for Segment {}

/// What a cache stores, with the half of a unit of its last place near 1.
struct Type {
    name: &'static str,
    bits: fn(f32) -> u16,
    value: fn(u16) -> f32,
    half_ulp: f64,
}

const TYPES: [Type; 2] = [
    Type {
        name: "bf16",
        bits: |x| bf16::from_f32(x).to_bits(),
        value: |x| bf16::from_bits(x).to_f32(),
        half_ulp: 1.0 / 256.0,
    },
    Type {
        name: "f16",
        bits: |x| f16::from_f32(x).to_bits(),
        value: |x| f16::from_bits(x).to_f32(),
        half_ulp: 1.0 / 2048.0,
    },
];

impl Type {
    /// Bits, and the values they stand for.
    fn of(&self, values: Vec<f32>) -> (Vec<u16>, Vec<f32>) {
        let bits: Vec<u16> = values.into_iter().map(self.bits).collect();
        let values = bits.iter().map(|&x| (self.value)(x)).collect();
        (bits, values)
    }
}

/// Ragged rows as an engine has them: `row_stride` elements apart, NaN wherever no key is.
struct Cache {
    bits: Vec<u16>,
    rows: Vec<Vec<Vec<f32>>>,
    segments: Vec<Segment>,
}

impl Cache {
    fn new(random: &mut Random, ty: &Type, lengths: &[usize], row_stride: usize) -> Self {
        let nan = (ty.bits)(f32::NAN);
        let (mut bits, mut rows, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for &length in lengths {
            segments.push(Segment { first: bits.len() as i64, length: length as u32, unused: 0 });
            let mut segment = Vec::new();
            for _ in 0..length {
                let (row, values) = ty.of(random.units(DIM).iter().map(|x| x * 2.0).collect());
                bits.extend(row);
                bits.resize(bits.len() + row_stride - DIM, nan);
                segment.push(values);
            }
            rows.push(segment);
            bits.resize(bits.len() + 3 * row_stride, nan);
        }
        Self { bits, rows, segments }
    }
}

/// Bound of a score's rounding: 128 products are added in f32, with at worst an ulp of the sum of their absolute
/// values an addition (models that truncate), then scaled.
fn rounding(absolute: f64) -> f64 {
    absolute * (DIM as f64 + 4.0) * ULP
}

pub fn window_attention(gpu: &Gpu) -> Outcome {
    let mut random = Random(5);
    let scale = 1.0 / (DIM as f32).sqrt();
    // Query heads that share the keys, queries of each, keys a block, distance of rows, lengths.
    let cases: [(usize, usize, usize, usize, &[usize]); 4] = [
        (1, 32, 64, DIM, &[32, 33, 63, 64, 65, 127, 128, 129]),
        (4, 32, 256, DIM, &[200, 257, 40]),
        (3, 8, 128, 2 * DIM, &[8, 9, 130, 61]),
        (1, 1, 192, DIM + 8, &[1, 2, 193, 400]),
    ];
    for ty in &TYPES {
        for (group, window, chunk, row_stride, lengths) in cases {
            let rows = group * window;
            let (n, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
            let (chunks, threads, stride) =
                (longest.div_ceil(chunk), 32 * rows.div_ceil(32), longest.next_multiple_of(8) + 8);
            let (query_bits, queries) = ty.of(random.units(n * rows * DIM));
            let cache = Cache::new(&mut random, ty, lengths, row_stride);
            let (q, k, segments) =
                (gpu.upload(&query_bits)?, gpu.upload(&cache.bits)?, gpu.upload(&cache.segments)?);
            let what = format!("{} of {rows} rows", ty.name);

            // Of each segment, each row: scores of all keys and their error; -inf and 0 past what it sees.
            let row_scores = |s: usize, r: usize| {
                let q = &queries[(s * rows + r) * DIM..][..DIM];
                let seen = reference::visible(lengths[s], window, r);
                let masked = (f64::NEG_INFINITY, 0.0);
                let of = |(j, k): (usize, &Vec<f32>)| {
                    if j < seen { reference::score(q, k, scale) } else { masked }
                };
                cache.rows[s]
                    .iter()
                    .enumerate()
                    .map(of)
                    .map(|(x, absolute)| (x, rounding(absolute)))
                    .collect::<Vec<_>>()
            };
            let all: Vec<Vec<Vec<(f64, f64)>>> =
                (0..n).map(|s| (0..rows).map(|r| row_scores(s, r)).collect()).collect();

            let mut scores = gpu.canaries(n * rows * stride)?;
            let (row, to, rows_, window_, chunk_) =
                (row_stride as i64, stride as i64, rows as i32, window as i32, chunk as i32);
            launch!(gpu, &format!("window_attention_scores_{}", ty.name), (chunks, n), threads, 0;
                &q, &k, &segments, &mut scores, &row, &to, &rows_, &window_, &chunk_, &scale);
            let scores = gpu.download(&scores)?;
            for (i, got) in scores.chunks(stride).enumerate() {
                let (s, r) = (i / rows, i % rows);
                let what = format!("scores, {what}, segment {s}, row {r}");
                expect(&what, got[..lengths[s]].iter().copied(), all[s][r].iter().copied())?;
                expect_untouched(&what, &got[lengths[s]..])?;
            }

            // An error of a score moves its exponential by as much; the exponent is rounded three times, ex2 and the
            // sums of chunks and quads as in softmax.
            let lse_of = |row: &[(f64, f64)]| {
                let values: Vec<f64> = row.iter().map(|x| x.0).collect();
                let worst = row.iter().fold(0.0, |a: f64, x| a.max(x.1));
                let most =
                    values.iter().filter(|x| x.is_finite()).fold(0.0, |a: f64, x| a.max(x.abs()));
                (
                    reference::log_sum_exp(&values),
                    worst + ULP * (4.0 * (most + 16.0) + row.len() as f64 / 4.0 + 64.0),
                )
            };
            let want_lse: Vec<(f64, f64)> = all.iter().flatten().map(|row| lse_of(row)).collect();
            let (mut lse, mut arrivals) = (gpu.canaries(n * rows)?, gpu.zeros::<u32>(n)?);
            for _ in 0..2 {
                let mut partials = gpu.scratch::<f32>(n * chunks * rows * 2)?;
                launch!(gpu, &format!("window_attention_lse_{}", ty.name), (chunks, n), threads, 0;
                    &q, &k, &segments, &mut lse, &mut partials, &mut arrivals, &row, &rows_, &window_, &chunk_, &scale);
                expect(&format!("lse, {what}"), gpu.download(&lse)?, want_lse.iter().copied())?;
            }

            let weight = 1.0 / rows as f32;
            let mut sums = gpu.canaries(n * stride)?;
            launch!(gpu, &format!("window_attention_sum_{}", ty.name), (chunks, n), threads, 0;
                &q, &k, &segments, &mut sums, &lse, &row, &to, &rows_, &window_, &chunk_, &scale, &weight);
            let sums = gpu.download(&sums)?;
            for (s, got) in sums.chunks(stride).enumerate() {
                let want = (0..lengths[s]).map(|j| {
                    let terms = (0..rows).map(|r| {
                        let ((x, error), (lse, lse_error)) = (all[s][r][j], want_lse[s * rows + r]);
                        let p = (x - lse).exp() / rows as f64;
                        (p, p * (error + 2.0 * lse_error + ULP * 32.0))
                    });
                    terms.fold((0.0, f64::from(f32::MIN_POSITIVE)), |a, b| (a.0 + b.0, a.1 + b.1))
                });
                let what = format!("sums, {what}, segment {s}");
                expect(&what, got[..lengths[s]].iter().copied(), want)?;
                expect_untouched(&what, &got[lengths[s]..])?;
            }
        }
    }
    Ok(())
}

/// Scores of 32 queries against 4096 keys of 8 heads in bf16: 65 536 `mma`s. Gives the seconds that the launch took
/// the processor, waiting for others not counted.
pub fn window_attention_at_size(gpu: &Gpu) -> Result<f64, Failure> {
    let mut random = Random(7);
    let (heads, keys, rows, chunk) = (8, 4096, 32, 256);
    let ty = &TYPES[0];
    let (query_bits, queries) = ty.of(random.units(heads * rows * DIM));
    let cache = Cache::new(&mut random, ty, &[keys; 8], DIM);
    let (q, k, segments) =
        (gpu.upload(&query_bits)?, gpu.upload(&cache.bits)?, gpu.upload(&cache.segments)?);
    let mut scores = gpu.canaries(heads * rows * keys)?;
    let scale = 1.0 / (DIM as f32).sqrt();
    let before = thread_seconds();
    launch!(gpu, "window_attention_scores_bf16", (keys / chunk, heads), rows, 0;
        &q, &k, &segments, &mut scores, &(DIM as i64), &(keys as i64), &(rows as i32), &(rows as i32),
        &(chunk as i32), &scale);
    gpu.stream.synchronize()?;
    let seconds = thread_seconds() - before;
    let scores = gpu.download(&scores)?;
    // One row of each head, from first to last.
    for s in 0..heads {
        let r = s * rows / heads;
        let seen = reference::visible(keys, rows, r);
        let q = &queries[(s * rows + r) * DIM..][..DIM];
        let want = cache.rows[s][..seen].iter().map(|k| {
            let (x, absolute) = reference::score(q, k, scale);
            (x, rounding(absolute))
        });
        let got = &scores[(s * rows + r) * keys..][..seen];
        expect(&format!("scores of head {s}"), got.iter().copied(), want)?;
    }
    Ok(seconds)
}

/// Processor time of this thread.
fn thread_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    assert_eq!(status, 0, "a clock of Linux");
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

pub fn attend(gpu: &Gpu) -> Outcome {
    let mut random = Random(6);
    let scale = 1.0 / (DIM as f32).sqrt();
    let cases: [(usize, usize, usize, &[usize]); 5] = [
        (1, 64, DIM, &[0, 1, 15, 16, 17, 63, 64, 65]),
        (4, 128, DIM, &[130, 300, 0, 257]),
        (7, 64, 3 * DIM, &[77, 128, 192]),
        (8, 192, DIM, &[513, 5]),
        (16, 64, DIM + 8, &[100]),
    ];
    for ty in &TYPES {
        for (group, chunk, row_stride, lengths) in cases {
            let (n, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
            let splits = longest.div_ceil(chunk).max(1);
            let (query_bits, queries) =
                ty.of(random.units(n * group * DIM).iter().map(|x| x * 4.0).collect());
            let keys = Cache::new(&mut random, ty, lengths, row_stride);
            let values = Cache::new(&mut random, ty, lengths, row_stride);
            let (q, segments) = (gpu.upload(&query_bits)?, gpu.upload(&keys.segments)?);
            let (k, v) = (gpu.upload(&keys.bits)?, gpu.upload(&values.bits)?);
            let mut partials = gpu.scratch::<f32>(n * splits * group * DIM)?;
            let mut stats = gpu.scratch::<f32>(n * splits * group * 2)?;
            let (group_, chunk_, splits_) = (group as i32, chunk as i32, splits as i32);
            launch!(gpu, &format!("attend_{}", ty.name), (splits, n), 128, 64 << 10;
                &q, &k, &v, &segments, &mut partials, &mut stats, &(row_stride as i64), &group_, &chunk_, &scale);
            // Rows in pairs of elements, and one past the end.
            let mut out = gpu.upload(&vec![CANARY; n * group * DIM / 2 + 1])?;
            launch!(gpu, &format!("attend_combine_{}", ty.name), (group, n), 64, 0;
                &partials, &stats, &segments, &mut out, &splits_, &chunk_);
            let mut out = gpu.download(&out)?;
            if out.pop() != Some(CANARY) {
                return Err(Failure::Wrong("attend_combine wrote past its end".into()));
            }
            let got: Vec<f32> = out
                .iter()
                .flat_map(|pair| [*pair as u16, (pair >> 16) as u16])
                .map(ty.value)
                .collect();
            for (i, got) in got.chunks(DIM).enumerate() {
                let s = i / group;
                let k: Vec<&[f32]> = keys.rows[s].iter().map(Vec::as_slice).collect();
                let v: Vec<&[f32]> = values.rows[s].iter().map(Vec::as_slice).collect();
                let q = &queries[i * DIM..][..DIM];
                let worst = k
                    .iter()
                    .fold(0.0, |a: f64, k| a.max(rounding(reference::score(q, k, scale).1)));
                // Probabilities are rounded to the type before they weigh values (f16: below its normal range to steps
                // of 2^-24), the result once more; errors of scores move probabilities, and with them their sum.
                let want = reference::attend(q, &k, &v, scale).into_iter().map(|(x, absolute)| {
                    let probabilities = ty.half_ulp + 2.0 * worst + ULP * (k.len() as f64 + 256.0);
                    let subnormal = 4.0 * k.len() as f64 / f64::from(1 << 24);
                    (x, absolute * probabilities + subnormal + x.abs() * ty.half_ulp + 1e-6)
                });
                expect(
                    &format!("attend {}, group {group}, segment {s} of {}", ty.name, lengths[s]),
                    got.iter().copied(),
                    want,
                )?;
            }
        }
    }
    Ok(())
}
