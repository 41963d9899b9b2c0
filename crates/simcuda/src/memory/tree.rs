//! What a warp knows of other blocks: block -> clocks of its warps, as a persistent radix tree.
//!
//! With decoupled look-back every block knows every earlier one. Copying such maps costs the square of the number of
//! blocks; sharing subtrees makes a join cost what differs.

use std::sync::Arc;

/// Clocks by block. All trees of a launch have the same depth.
#[derive(Debug, Clone, Default)]
pub(super) enum Tree {
    #[default]
    Empty,
    Leaf(Arc<[u32]>),
    Inner(Arc<[Tree; 16]>),
}

impl Tree {
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// The same nodes, not only the same clocks.
    pub(super) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Empty, Self::Empty) => true,
            (Self::Leaf(a), Self::Leaf(b)) => Arc::ptr_eq(a, b),
            (Self::Inner(a), Self::Inner(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The clocks of a block; `levels` as in [`Tree::with`].
    pub(super) fn get(&self, levels: u32, block: u32) -> Option<&Arc<[u32]>> {
        match self {
            Self::Empty => None,
            Self::Leaf(clocks) => Some(clocks),
            Self::Inner(children) => {
                children[(block >> (4 * levels - 4)) as usize % 16].get(levels - 1, block)
            }
        }
    }

    /// This tree with a block's clocks replaced, `levels` above the leaves.
    pub(super) fn with(&self, levels: u32, block: u32, clocks: Arc<[u32]>) -> Self {
        if levels == 0 {
            return Self::Leaf(clocks);
        }
        let mut children = match self {
            Self::Inner(children) => (**children).clone(),
            _ => Default::default(),
        };
        let child = &mut children[(block >> (4 * levels - 4)) as usize % 16];
        *child = child.with(levels - 1, block, clocks);
        Self::Inner(Arc::new(children))
    }

    /// The later clock everywhere. Gives back one of the two where it is the result, so that trees stay shared.
    pub(super) fn join(&self, other: &Self) -> Self {
        match (self, other) {
            (_, Self::Empty) => self.clone(),
            (Self::Empty, _) => other.clone(),
            _ if self.same(other) => self.clone(),
            (Self::Leaf(a), Self::Leaf(b)) => {
                let later = || a.iter().zip(&**b);
                if later().all(|(a, b)| a >= b) {
                    self.clone()
                } else if later().all(|(a, b)| a <= b) {
                    other.clone()
                } else {
                    Self::Leaf(later().map(|(a, b)| *a.max(b)).collect())
                }
            }
            (Self::Inner(a), Self::Inner(b)) => {
                let joined: [Self; 16] = std::array::from_fn(|i| a[i].join(&b[i]));
                if joined.iter().zip(&**a).all(|(new, old)| new.same(old)) {
                    self.clone()
                } else if joined.iter().zip(&**b).all(|(new, old)| new.same(old)) {
                    other.clone()
                } else {
                    Self::Inner(Arc::new(joined))
                }
            }
            _ => unreachable!("trees of one launch have one depth"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Tree;

    fn leaf(levels: u32, blocks: &[(u32, [u32; 2])]) -> Tree {
        blocks
            .iter()
            .fold(Tree::Empty, |tree, (block, clocks)| tree.with(levels, *block, (*clocks).into()))
    }

    #[test]
    fn a_join_has_the_later_clock_of_each() {
        let a = leaf(2, &[(3, [1, 9]), (200, [4, 4])]);
        let b = leaf(2, &[(3, [5, 2]), (17, [1, 1])]);
        let both = a.join(&b);
        assert_eq!(both.get(2, 3).unwrap()[..], [5, 9]);
        assert_eq!(both.get(2, 17).unwrap()[..], [1, 1]);
        assert_eq!(both.get(2, 200).unwrap()[..], [4, 4]);
        assert!(both.get(2, 4).is_none());
    }

    #[test]
    fn a_join_that_adds_nothing_shares() {
        let a = leaf(2, &[(3, [1, 9]), (200, [4, 4])]);
        let b = leaf(2, &[(3, [1, 8])]);
        assert!(a.join(&b).same(&a) && b.join(&a).same(&a));
    }
}
