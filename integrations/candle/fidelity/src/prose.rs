//! The book that contexts are made of.

const ALICE: &str = include_str!("../prose/alice.txt");

/// What profiles are measured on: a play, verse, a law. None of it is in [`half`].
pub const CALIBRATION: [&str; 3] = [
    include_str!("../prose/as-you-like-it.txt"),
    include_str!("../prose/paradise-lost.txt"),
    include_str!("../prose/constitution.txt"),
];

/// The half that belongs to a seed: even seeds read the first, odd ones the second. Cut between chapters.
pub fn half(seed: u64) -> &'static str {
    let (first, second) = ALICE.split_at(ALICE.find("CHAPTER VII.").unwrap_or(ALICE.len() / 2));
    if seed.is_multiple_of(2) { first } else { second }
}

#[cfg(test)]
mod tests {
    use super::half;

    #[test]
    fn halves_are_alike_in_length() {
        let (first, second) = (half(0), half(1));
        assert!(first.starts_with("CHAPTER I.") && second.starts_with("CHAPTER VII."));
        let share = first.len() as f64 / second.len() as f64;
        assert!((0.8..1.25).contains(&share), "{share}");
    }
}
