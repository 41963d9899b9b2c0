//! `ldmatrix`: how an 8x8 matrix of 16-bit elements is dealt to the lanes of a warp.

/// One matrix, given by its rows, as the register each lane receives: lane `i` gets elements `2 * (i % 4)` and the next
/// of row `i / 4`, the first in the low half. With `.trans`, of column `i / 4`.
pub fn ldmatrix(rows: &[[u16; 8]; 8], trans: bool) -> [u32; 32] {
    std::array::from_fn(|lane| {
        let (major, minor) = (lane / 4, lane % 4 * 2);
        let element = |i: usize| u32::from(if trans { rows[i][major] } else { rows[major][i] });
        element(minor) | element(minor + 1) << 16
    })
}
