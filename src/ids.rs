//! Typed indices, so that a layer cannot index heads and a slot index cannot pass for a position.

macro_rules! index {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default,
            bytemuck::Pod, bytemuck::Zeroable,
        )]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
        #[repr(transparent)]
        pub struct $name(pub u32);

        impl $name {
            /// The index as `usize`.
            #[inline]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

index! {
    /// A layer, from 0.
    LayerId
}
index! {
    /// A KV head of one layer, from 0.
    KvHead
}
index! {
    /// A token's logical index in its sequence: what RoPE saw. Not the index of a slot: after the
    /// first eviction the two differ.
    Position
}
