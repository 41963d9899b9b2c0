//! One bit per byte of memory: written or not, waited for or not. Ranges are what is asked for and set.

/// A row of bits, in words of 64.
#[derive(Debug, Clone, Default)]
pub(super) struct Bits(Vec<u64>);

/// The words a range touches: index and the mask of its bits there.
fn words(start: u64, len: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = start + len;
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, bit) = (at / 64, at % 64);
        let count = (64 - bit).min(end - at);
        at += count;
        Some((word as usize, u64::MAX >> (64 - count) << bit))
    })
}

impl Bits {
    /// All clear.
    pub(super) fn new(len: u64) -> Self {
        Self(vec![0; len.div_ceil(64) as usize])
    }

    pub(super) fn set(&mut self, start: u64, len: u64) {
        words(start, len).for_each(|(word, mask)| self.0[word] |= mask);
    }

    pub(super) fn clear(&mut self, start: u64, len: u64) {
        words(start, len).for_each(|(word, mask)| self.0[word] &= !mask);
    }

    pub(super) fn clear_all(&mut self) {
        self.0.fill(0);
    }

    /// The first bit of the range that is clear.
    pub(super) fn first_clear(&self, start: u64, len: u64) -> Option<u64> {
        words(start, len).find_map(|(word, mask)| {
            let clear = !self.0[word] & mask;
            (clear != 0).then(|| word as u64 * 64 + u64::from(clear.trailing_zeros()))
        })
    }

    /// The first bit of the range that is set.
    pub(super) fn first_set(&self, start: u64, len: u64) -> Option<u64> {
        words(start, len).find_map(|(word, mask)| {
            let set = self.0[word] & mask;
            (set != 0).then(|| word as u64 * 64 + u64::from(set.trailing_zeros()))
        })
    }

    /// The bits of a range, moved to the front.
    pub(super) fn extract(&self, start: u64, len: u64) -> Self {
        Self((0..len.div_ceil(64)).map(|i| self.word(start + i * 64)).collect())
    }

    /// Puts the first `len` bits of `from` at `start`.
    pub(super) fn insert(&mut self, start: u64, from: &Self, len: u64) {
        for (word, mask) in words(start, len) {
            let moved = match (word as u64 * 64).checked_sub(start) {
                Some(at) => from.word(at),
                None => from.0[0] << (start % 64),
            };
            self.0[word] = self.0[word] & !mask | moved & mask;
        }
    }

    /// 64 bits from any place.
    fn word(&self, at: u64) -> u64 {
        let (word, shift) = ((at / 64) as usize, at % 64);
        let high = self.0.get(word + 1).copied().unwrap_or(0);
        ((u128::from(high) << 64 | u128::from(self.0[word])) >> shift) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;

    #[test]
    fn ranges_are_set_cleared_and_found() {
        let mut bits = Bits::new(200);
        bits.set(60, 70);
        assert_eq!(bits.first_clear(60, 70), None);
        assert_eq!(bits.first_clear(60, 71), Some(130));
        assert_eq!(bits.first_set(0, 200), Some(60));
        bits.clear(64, 64);
        assert_eq!(bits.first_clear(60, 70), Some(64));
        assert_eq!(bits.first_set(64, 100), Some(128));
    }

    proptest::proptest! {
        #[test]
        fn a_copied_range_is_the_same_bit_by_bit(
            set in proptest::collection::vec(proptest::bool::ANY, 300),
            from in 0u64..150, to in 0u64..150, len in 0u64..150,
        ) {
            let (mut source, mut target) = (Bits::new(300), Bits::new(300));
            (0..300).filter(|&i| set[i as usize]).for_each(|i| source.set(i, 1));
            (0..300).filter(|&i| !set[i as usize]).for_each(|i| target.set(i, 1));
            target.insert(to, &source.extract(from, len), len);
            for i in 0..300 {
                let inside = (to..to + len).contains(&i);
                let expected = if inside { set[(i - to + from) as usize] } else { !set[i as usize] };
                proptest::prop_assert_eq!(target.first_set(i, 1).is_some(), expected);
            }
        }
    }
}
