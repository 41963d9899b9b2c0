//! tests
use super::*;
#[test]
fn count() {
    for (n, t) in [
        ("int", integer::TABLES),
        ("bits", bits::TABLES),
        ("select", select::TABLES),
        ("float", float::TABLES),
        ("half", half::TABLES),
        ("cvt", convert::TABLES),
    ] {
        println!(
            "{n}: {} rows {} forms",
            t.iter().map(|t| t.len()).sum::<usize>(),
            t.iter().flat_map(|t| t.iter()).map(|e| e.forms.len()).sum::<usize>()
        );
    }
    println!("{}", Alu::forms().len());
}
