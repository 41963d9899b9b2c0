//! Containers, and the operations on rows that read no tensor.

use std::ops::Range;

use kvbudget::backend::Backend;
use kvbudget::backend::ops::NormScale;
use kvbudget::{Ragged, Result};

use super::{Expected, batch, fails, pass, read, upload, wide};
use crate::compare::{self, Scale};
use crate::data::{Floats, Layer, Place, TestDevice, segment_lens, with_layers};
use crate::generate::{LENGTHS, Rng, Scores, Spec};
use crate::naive::{self, Float, Matrix};

/// Uploads rows, changes them in place, reads them back.
fn changed<D: TestDevice>(
    device: &D,
    rows: &[Vec<f32>],
    run: impl FnOnce(&D::Backend, &mut Floats<D>) -> Result<()>,
) -> Result<Ragged<f32>> {
    let mut on_device = upload(device, rows);
    run(device.backend(), &mut on_device)?;
    Ok(read(device, &on_device))
}

fn cast<F: Float>(rows: &[Vec<f32>]) -> Matrix<F> {
    rows.iter().map(|row| row.iter().map(|&x| naive::num(x)).collect()).collect()
}

/// One row of each length.
fn rows_of(kind: Scores) -> Vec<Vec<f32>> {
    LENGTHS.iter().map(|&n| kind.row(n, u64::from(n))).collect()
}

fn positive(lens: &[u32]) -> Vec<Vec<f32>> {
    let rng = &mut Rng::new(5);
    lens.iter().map(|&n| (0..n).map(|_| rng.unit() as f32 + 0.01).collect()).collect()
}

/// What goes in comes out, to the bit: through a device, and through a list of several.
pub fn containers<D: TestDevice>(device: &D) {
    let backend = device.backend();
    for kind in Scores::ALL {
        let rows: Ragged<f32> = rows_of(kind).into_iter().collect();
        let up = || backend.upload(rows.clone()).expect("rows can be written");
        pass(&kind, compare::bits(&read(device, &up()), &rows));

        for range in [0..0, 0..rows.rows(), 3..7, 5..6] {
            let want: Ragged<f32> = range.clone().map(|r| rows.row(r).to_vec()).collect();
            let some = backend.slice(&up(), range.clone()).expect("rows can be copied");
            pass(&(kind, range), compare::bits(&read(device, &some), &want));
        }
    }
    let zeros = backend.zeros(&LENGTHS).expect("rows can be made");
    let want = Ragged::filled(LENGTHS.map(|n| n as usize), 0.0);
    pass(&"zeros", compare::bits(&read(device, &zeros), &want));
}

/// Both signs, every row, and none where there is none.
pub fn nan_counts<D: TestDevice>(device: &D) {
    for kind in Scores::ALL {
        let rows = rows_of(kind);
        let count = |row: &Vec<f32>| row.iter().filter(|x| x.is_nan()).count() as u64;
        let want: Vec<u64> = rows.iter().map(count).collect();
        let backend = device.backend();
        let got = backend.count_nan(&upload(device, &rows)).expect("NaN can be counted");
        let got = backend.counts_to_host(&got).expect("counts can be read");
        pass(&kind, compare::equal(&got, &want));
    }
}

fn scaled<F: Float>(op: NormScale, layers: &[Layer], norms: &[Vec<f32>]) -> Matrix<F> {
    let mut rows = cast(norms).into_iter();
    let mut out = Vec::new();
    for layer in layers {
        let norms: Matrix<F> = rows.by_ref().take(layer.shape.kv_heads()).collect();
        out.extend(naive::scale_norms(op, &norms, &layer.slot_positions()));
    }
    out
}

/// Each divisor, per view and not across the batch; by position where heads hold different ones; 0 by 0 is 0.
pub fn norm_scales<D: TestDevice>(device: &D) {
    let layers = batch(&Spec::default());
    let lens = segment_lens(&layers);
    let zeros: Vec<Vec<f32>> = lens.iter().map(|&n| vec![0.0; n as usize]).collect();
    for norms in [positive(&lens), zeros] {
        for op in [NormScale::None, NormScale::Layer, NormScale::Heads] {
            let got = changed(device, &norms, |backend, rows| {
                with_layers(device, &layers, |views| backend.scale_norms(op, views, rows))
            });
            let (want, baseline) = (scaled(op, &layers, &norms), scaled(op, &layers, &norms));
            Expected { want, baseline }.check(&op, got, Scale::Element);
        }
    }
}

/// The mean of what takes part, raised into what takes part; equal entries are their own mean.
pub fn mean_floors<D: TestDevice>(device: &D) {
    let lengths: Vec<u32> = LENGTHS.into_iter().chain([4096, 4097, 9000]).collect();
    let lens: Vec<u32> = lengths.iter().map(|n| n - n / 3).collect();
    let rows_of = |kind: Scores| lengths.iter().map(|&n| kind.row(n, u64::from(n))).collect();
    fn floored<F: Float>(lens: &[u32], rows: &[Vec<f32>]) -> Matrix<F> {
        let mut rows = cast(rows);
        let each = rows.iter_mut().zip(lens);
        each.for_each(|(row, &len)| naive::floor_at_mean(len as usize, row));
        rows
    }
    for rows in [positive(&lengths), rows_of(Scores::Equal), rows_of(Scores::Nan)] {
        let got = changed(device, &rows, |backend, rows| backend.floor_at_mean(&lens, rows));
        let (want, baseline) = (floored(&lens, &rows), floored(&lens, &rows));
        Expected { want, baseline }.check(&"mean floor", got, Scale::Element);
    }
}

/// `(x + ε) · norm`, in the place of the norms; without ε a score of zero stays zero.
pub fn weights<D: TestDevice>(device: &D) {
    fn weighed<F: Float>(epsilon: f32, norms: &[Vec<f32>], rows: &[Vec<f32>]) -> Matrix<F> {
        let (norms, mut rows) = (cast(norms), cast(rows));
        rows.iter_mut().zip(&norms).for_each(|(row, norms)| naive::weigh(epsilon, norms, row));
        rows
    }
    let norms = positive(&LENGTHS);
    for epsilon in [0.0, 1e-4, 1.0] {
        for kind in [Scores::Zeros, Scores::Equal, Scores::Descending, Scores::Nan] {
            let rows: Vec<Vec<f32>> =
                rows_of(kind).iter().map(|row| row.iter().map(|x| x.abs()).collect()).collect();
            let scores = upload(device, &rows);
            let got = changed(device, &norms, |b, norms| b.weigh(epsilon, &scores, norms));
            let want = weighed(epsilon, &norms, &rows);
            let baseline = weighed(epsilon, &norms, &rows);
            Expected { want, baseline }.check(&(epsilon, kind), got, Scale::Element);
        }
    }
}

/// The larger of two, in the place of one; what it is raised by may go on after it.
pub fn raises<D: TestDevice>(device: &D) {
    let longer = |row: &Vec<f32>| [row.as_slice(), &[f32::INFINITY]].concat();
    for kind in Scores::ALL {
        for by in Scores::ALL {
            let rows = rows_of(kind);
            let by: Vec<Vec<f32>> = LENGTHS.iter().map(|&n| by.row(n, 99 + u64::from(n))).collect();
            let on_device = upload(device, &by.iter().map(longer).collect::<Vec<_>>());
            let got = changed(device, &rows, |b, rows| b.raise(&on_device, rows));
            let mut want = rows.clone();
            want.iter_mut().zip(&by).for_each(|(row, by)| naive::raise(by, row));
            let got = got.expect("rows can be raised");
            // Which NaN, and the sign of zero, are left open.
            let plain = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { (x + 0.0).to_bits() };
            let plain = |row: &[f32]| row.iter().map(plain).collect::<Vec<_>>();
            let want: Vec<_> = want.iter().map(|row| plain(row)).collect();
            let got: Vec<_> = got.iter().map(plain).collect();
            pass(&(kind, by.len()), compare::equal(&got, &want));
        }
    }
}

/// Places by protection, then score, ties by slot, NaN last; what is pinned stays.
pub fn ranks<D: TestDevice>(device: &D) {
    Scores::ALL.into_iter().for_each(|kind| ranked(device, &LENGTHS, kind));
}

/// The same over several thousand slots.
pub fn long_ranks<D: TestDevice>(device: &D) {
    for kind in [Scores::Random, Scores::Ties, Scores::Extremes] {
        ranked(device, &[2047, 4097, 0, 2048], kind);
    }
}

fn ranked<D: TestDevice>(device: &D, lens: &[u32], kind: Scores) {
    type Ranges = Ragged<Range<u32>>;
    fn ranked<F: Float>(protected: &Ranges, weights: &[f32], rows: &[Vec<f32>]) -> Matrix<F> {
        let mut rows = cast(rows);
        for (s, row) in rows.iter_mut().enumerate() {
            naive::rank(protected.row(s), weights[s], row);
        }
        rows
    }
    let some = |n: u32| vec![0..n.min(2), n - n / 4..n];
    let none: Ranges = lens.iter().map(|_| Vec::new()).collect();
    let some: Ranges = lens.iter().map(|&n| if n < 3 { vec![] } else { some(n) }).collect();
    let weights: Vec<f32> = (0..lens.len()).map(|s| (s % 4) as f32 * 10.5).collect();
    for protected in [&none, &some] {
        let rows: Vec<Vec<f32>> = (5..).zip(lens).map(|(s, &len)| kind.row(len, s)).collect();
        let got = changed(device, &rows, |b, rows| b.rank(protected, &weights, rows));
        let want = ranked(protected, &weights, &rows);
        let baseline = ranked(protected, &weights, &rows);
        Expected { want, baseline }.check(&(kind, protected.total()), got, Scale::Element);
    }
}

/// Sums over the heads of each view.
pub fn shared_heads<D: TestDevice>(device: &D) {
    fn shared<F: Float>(heads: &[usize], rows: &[Vec<f32>]) -> Matrix<F> {
        let mut rows = cast(rows).into_iter();
        let mut out = Vec::new();
        for &n in heads {
            let sum = naive::share_heads(&rows.by_ref().take(n).collect::<Vec<_>>());
            out.extend(vec![sum; n]);
        }
        out
    }
    let heads = [1, 3, 2, 4];
    let rows = positive(&[33, 65, 65, 65, 0, 0, 9, 9, 9, 9]);
    let got = changed(device, &rows, |backend, rows| backend.share_heads(&heads, rows));
    let (want, baseline) = (shared(&heads, &rows), shared(&heads, &rows));
    Expected { want, baseline }.check(&heads, got, Scale::Element);
}

/// Chunks of a row, a short last one, single slots, one unit for all; rows without units.
pub fn units<D: TestDevice>(device: &D) {
    fn coarse<F: Float>(units: &[Vec<Range<u32>>], rows: &[Vec<f32>]) -> Matrix<F> {
        units.iter().zip(cast(rows)).map(|(units, row)| naive::coarsen(units, &row)).collect()
    }
    let rows = positive(&LENGTHS);
    for size in [1, 3, 20, 2048] {
        let units: Vec<Vec<Range<u32>>> = LENGTHS
            .iter()
            .map(|&n| (0..n).step_by(size).map(|t| t..n.min(t + size as u32)).collect())
            .collect();
        let got = device
            .backend()
            .coarsen(&units.iter().cloned().collect(), &upload(device, &rows))
            .map(|rows| read(device, &rows));
        let (want, baseline) = (coarse(&units, &rows), coarse(&units, &rows));
        Expected { want, baseline }.check(&size, got, Scale::Element);
    }
}

/// Entries by slot: none, all, some.
pub fn picks<D: TestDevice>(device: &D) {
    for kind in Scores::ALL {
        let rows = rows_of(kind);
        for third in 0..4 {
            let some = |&n: &u32| Rng::new(9).choose(n * third / 3, n);
            let slots: Vec<Vec<u32>> = LENGTHS.iter().map(some).collect();
            let picked = device
                .backend()
                .pick(&slots.iter().cloned().collect(), &upload(device, &rows))
                .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            let want: Vec<Vec<f64>> =
                slots.iter().zip(wide(&rows)).map(|(s, row)| naive::pick(s, &row)).collect();
            pass(&kind, compare::exact(&read(device, &picked), &want));
        }
    }
}

/// Rows that do not match are refused.
pub fn errors<D: TestDevice>(device: &D) {
    let rows = positive(&[8, 9]);
    let short = upload(device, &positive(&[8, 8]));
    let few = upload(device, &positive(&[8]));
    let layers = [Spec { place: Place::HeadsFirst, ..Spec::default() }.build()];
    fails(&"lengths", changed(device, &rows, |b, rows| b.floor_at_mean(&[8], rows)));
    fails(&"too long", changed(device, &rows, |b, rows| b.floor_at_mean(&[9, 9], rows)));
    fails(&"short scores", changed(device, &rows, |b, rows| b.weigh(0.0, &short, rows)));
    fails(&"few scores", changed(device, &rows, |b, rows| b.weigh(0.0, &few, rows)));
    fails(&"short raises", changed(device, &rows, |b, rows| b.raise(&short, rows)));
    fails(&"few places", changed(device, &rows, |b, rows| b.rank(&Ragged::default(), &[], rows)));
    fails(&"few raises", changed(device, &rows, |b, rows| b.raise(&few, rows)));
    fails(&"unequal heads", changed(device, &rows, |b, rows| b.share_heads(&[2], rows)));
    fails(&"missing heads", changed(device, &rows, |b, rows| b.share_heads(&[1], rows)));
    let scale = changed(device, &rows, |b, rows| {
        with_layers(device, &layers, |views| b.scale_norms(NormScale::Layer, views, rows))
    });
    fails(&"norms of other segments", scale);
    let backend = device.backend();
    fails(&"rows past the end", backend.slice(&few, 0..2));
    fails(&"picked past the end", backend.pick(&Ragged::from_iter([vec![8]]), &few));
    fails(&"picked rows", backend.pick(&Ragged::from_iter([vec![0], vec![0]]), &few));
    fails(&"units", backend.coarsen(&Ragged::from_iter([vec![0..4, 4..9]]), &few));
}
