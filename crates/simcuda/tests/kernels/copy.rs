//! Compaction, out of place and in place, and appending.

use cudarc::driver::DeviceRepr;

use crate::gpu::{Gpu, Outcome, expect_equal, launch};
use crate::reference::Random;

#[repr(C)]
#[derive(Clone, Default)]
struct GatherSegment {
    source: i64,
    target: i64,
    kept: i64,
    count: u32,
    unused: u32,
}
#[repr(C)]
#[derive(Clone, Default)]
struct AppendSegment {
    fresh: i64,
    fresh_stride: i64,
    cache: i64,
    capacity: u32,
    unused: u32,
}
// SAFETY: plain old data, laid out as kernels/gather.cu has it.
unsafe impl DeviceRepr for GatherSegment {}
// SAFETY: plain old data, laid out as kernels/append.cu has it.
unsafe impl DeviceRepr for AppendSegment {}

/// Sixteen bytes, in words of four.
const UNIT: usize = 4;

fn words(random: &mut Random, n: usize) -> Vec<u32> {
    (0..n).map(|_| random.next() as u32).collect()
}

/// Kept slots of each segment out of so many, ascending.
fn selections(random: &mut Random, units: usize) -> Vec<(usize, Vec<u32>)> {
    let tile = 4 * (256 / units);
    // A tile and its edges; nothing, one, all; and more tiles than a warp looks back over.
    let mut wanted = vec![
        (0, 0),
        (5, 0),
        (1, 1),
        (9, 9),
        (2 * tile, tile),
        (3 * tile, tile + 1),
        (tile, tile - 1),
    ];
    if units == 64 {
        wanted.push((45 * tile, 35 * tile + 3));
    }
    let choose = |(length, count): (usize, usize)| {
        let mut slots: Vec<u32> = (0..length as u32).collect();
        while slots.len() > count {
            slots.remove(random.below(slots.len()));
        }
        (length, slots)
    };
    wanted.into_iter().map(choose).collect()
}

pub fn gather(gpu: &Gpu) -> Outcome {
    [1, 8, 12, 16, 64].into_iter().try_for_each(|units| gather_rows(gpu, units))
}

/// The rows of a 16-bit cache of 128 dimensions.
pub fn gather_256_bytes(gpu: &Gpu) -> Outcome {
    gather_rows(gpu, 16)
}

fn gather_rows(gpu: &Gpu, units: usize) -> Outcome {
    let mut random = Random(3);
    {
        let row = units * UNIT;
        let selections = selections(&mut random, units);
        let tiles = selections
            .iter()
            .map(|(_, kept)| kept.len())
            .max()
            .unwrap_or(0)
            .div_ceil(4 * (256 / units));
        let rows: usize = selections.iter().map(|(length, _)| length).sum();
        let (keys, values) = (words(&mut random, rows * row), words(&mut random, rows * row));
        let kept: Vec<u32> = selections.iter().flat_map(|(_, kept)| kept.iter().copied()).collect();
        let d_kept = gpu.upload(&kept)?;

        // Where each segment lies: in the source, in a packed target, in the list.
        let (mut packed, mut in_place, mut source, mut at) = (Vec::new(), Vec::new(), 0, 0);
        for (length, kept) in &selections {
            let segment =
                GatherSegment { source, target: at, kept: at, count: kept.len() as u32, unused: 0 };
            in_place.push(GatherSegment { target: source, ..segment.clone() });
            packed.push(segment);
            source += *length as i64;
            at += kept.len() as i64;
        }
        let grid = (tiles, selections.len());
        let take = |from: &[u32]| {
            let slots = packed
                .iter()
                .zip(&selections)
                .flat_map(|(s, (_, kept))| kept.iter().map(|&t| s.source as usize + t as usize));
            slots.flat_map(|slot| from[slot * row..][..row].iter().copied()).collect::<Vec<_>>()
        };

        let (from_keys, from_values) = (gpu.upload(&keys)?, gpu.upload(&values)?);
        let mut to_keys = gpu.scratch::<u32>(kept.len() * row)?;
        let mut to_values = gpu.scratch::<u32>(kept.len() * row)?;
        let segments = gpu.upload(&packed)?;
        launch!(gpu, "gather", grid, 256, 0; &from_keys, &from_values, &mut to_keys, &mut to_values, &segments,
            &d_kept, &(units as i32));
        expect_equal(
            &format!("gathered keys of {units} units"),
            &gpu.download(&to_keys)?,
            &take(&keys),
        )?;
        expect_equal(
            &format!("gathered values of {units} units"),
            &gpu.download(&to_values)?,
            &take(&values),
        )?;

        let (mut both_keys, mut both_values) = (from_keys, from_values);
        let segments = gpu.upload(&in_place)?;
        let mut states = gpu.zeros::<u32>(selections.len() * (tiles + 1))?;
        launch!(gpu, "gather_in_place", grid, 256, 0; &mut both_keys, &mut both_values, &segments, &d_kept,
            &mut states, &(units as i32));
        for (what, before, after) in [("keys", &keys, both_keys), ("values", &values, both_values)]
        {
            let mut want = before.clone();
            for (s, (_, kept)) in in_place.iter().zip(&selections) {
                for (i, &slot) in kept.iter().enumerate() {
                    let (to, from) = (s.source as usize + i, s.source as usize + slot as usize);
                    want[to * row..][..row].copy_from_slice(&before[from * row..][..row]);
                }
            }
            expect_equal(
                &format!("{what} of {units} units in place"),
                &gpu.download(&after)?,
                &want,
            )?;
        }
    }
    Ok(())
}

pub fn append(gpu: &Gpu) -> Outcome {
    let mut random = Random(4);
    let lengths = [0u32, 1, 7, 10, 11, 63];
    for units in [1, 8, 12, 16, 64] {
        let row = units * UNIT;
        for tokens in [1usize, 3, 17] {
            // The second has just enough room, the fourth one row too little.
            let room = |i: usize| {
                if i == 1 {
                    tokens
                } else if i == 3 {
                    tokens - 1
                } else {
                    tokens + 5
                }
            };
            let capacities: Vec<usize> =
                lengths.iter().enumerate().map(|(i, &n)| n as usize + room(i)).collect();
            let segments: Vec<AppendSegment> = (0..lengths.len())
                .map(|i| AppendSegment {
                    // New rows are [token][segment].
                    fresh: i as i64,
                    fresh_stride: lengths.len() as i64,
                    cache: capacities[..i].iter().sum::<usize>() as i64,
                    capacity: capacities[i] as u32,
                    unused: 0,
                })
                .collect();
            let rows: usize = capacities.iter().sum();
            let fresh = [(); 2].map(|()| words(&mut random, tokens * lengths.len() * row));
            let before = [(); 2].map(|()| words(&mut random, rows * row));

            let (keys, values) = (gpu.upload(&fresh[0])?, gpu.upload(&fresh[1])?);
            let mut caches = [gpu.upload(&before[0])?, gpu.upload(&before[1])?];
            let [cached_keys, cached_values] = &mut caches;
            let (mut d_lengths, mut refused) = (gpu.upload(&lengths)?, gpu.zeros::<u32>(1)?);
            launch!(gpu, "append", (lengths.len(), 1), 256, 0; &keys, &values, cached_keys, cached_values,
                &gpu.upload(&segments)?, &mut d_lengths, &mut refused, &(tokens as i32), &(units as i32));

            let mut grown = lengths;
            let mut want = before;
            for (i, segment) in segments.iter().enumerate().filter(|(i, _)| *i != 3) {
                grown[i] += tokens as u32;
                for token in 0..tokens {
                    let to = segment.cache as usize + lengths[i] as usize + token;
                    let from = token * lengths.len() + i;
                    for (want, fresh) in want.iter_mut().zip(&fresh) {
                        want[to * row..][..row].copy_from_slice(&fresh[from * row..][..row]);
                    }
                }
            }
            let what = format!("{tokens} rows of {units} units appended");
            for (cache, want) in caches.iter().zip(&want) {
                expect_equal(&what, &gpu.download(cache)?, want)?;
            }
            expect_equal(&format!("lengths after {what}"), &gpu.download(&d_lengths)?, &grown)?;
            expect_equal(&format!("segments refused of {what}"), &gpu.download(&refused)?, &[1])?;
        }
    }
    Ok(())
}
