//! The fuzz targets' bodies on reproducible mutations of good files: a smoke run of `fuzz/`, and a guard that
//! keeps it from rotting.

use kvbudget_cli::fuzz;
use safetensors::Dtype;

use crate::support::{SMALL, Sizes, Tensors, folder, succeeds};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// One to four edits; most of them in the first `front` bytes.
fn mutate(random: &mut Random, good: &[u8], front: usize) -> Vec<u8> {
    let tokens: [&[u8]; 8] =
        [b"0", b"-1", b"18446744073709551615", b"4294967296", b"[", b"}", b"null", b"1e308"];
    let mut bytes = good.to_vec();
    for _ in 0..=random.below(4) {
        let reach = if random.below(8) == 0 { bytes.len() } else { front.min(bytes.len()) };
        let at = random.below(reach);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.below(256) as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => drop(bytes.splice(at..at, tokens[random.below(8)].iter().copied())),
            4 => {
                let end = (at + random.below(20)).min(bytes.len());
                drop(bytes.splice(at..end, tokens[random.below(8)].iter().copied()));
            }
            5 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ if at < bytes.len() => bytes[at] = b'0' + random.below(10) as u8,
            _ => {}
        }
    }
    bytes
}

#[test]
fn dumps() {
    let tiny = Sizes { tokens: 6, window: 2, next: 2, dim: 2, ..SMALL };
    let good = Tensors::noise(tiny, Dtype::F16).bytes();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut random = Random(7);
    fuzz::dump(&good);
    for _ in 0..20_000 {
        let mut bad = mutate(&mut random, &good, header);
        fuzz::dump(&bad);
        // The same again with a length that agrees, to get past the first door.
        if let Some(end) = bad.windows(2).rposition(|w| w == b"}}").filter(|end| *end > 8) {
            bad[..8].copy_from_slice(&(end as u64 + 2 - 8).to_le_bytes());
            fuzz::dump(&bad);
        }
    }
}

#[test]
fn plans() {
    let folder = folder("mutated_plans");
    Tensors::noise(Sizes { dim: 8, tokens: 64, ..SMALL }, Dtype::F16).save(&folder.join("d"));
    let good = succeeds(&folder, &["plan", "d", "--policy", "knorm", "--budget", "10%"]);
    let mut random = Random(11);
    fuzz::plan(good.as_bytes());
    for _ in 0..20_000 {
        fuzz::plan(&mutate(&mut random, good.as_bytes(), good.len()));
    }
}
