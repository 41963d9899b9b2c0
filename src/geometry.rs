//! Shapes of a model's cache: layers, heads, head dims, bytes per slot. Checked once, here.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ids::LayerId;

/// Longest head supported: slot indices and positions fit `u32`, lengths stay below `2^31`.
pub const MAX_LEN: u64 = (1 << 31) - 1;

/// Heads and head dim of one layer. `Hq = G · H`, query head `h·G + g` reads KV head `h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct LayerShape {
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
}

impl LayerShape {
    /// `query_heads` must be a positive multiple of `kv_heads`.
    pub fn new(query_heads: u32, kv_heads: u32, head_dim: u32) -> Result<Self> {
        if head_dim == 0 {
            return Err(Error::Zero { what: "head dim" });
        }
        if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::HeadsNotDivisible { query_heads, kv_heads });
        }
        Ok(Self { query_heads, kv_heads, head_dim })
    }

    /// `Hq`.
    pub fn query_heads(&self) -> usize {
        self.query_heads as usize
    }
    /// `H`.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads as usize
    }
    /// `D`.
    pub fn head_dim(&self) -> usize {
        self.head_dim as usize
    }
    /// `G = Hq / H`.
    pub fn group(&self) -> usize {
        (self.query_heads / self.kv_heads) as usize
    }
}

/// The cache of a whole model: one shape per layer (they may differ) and the storage type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    layers: Vec<LayerShape>,
    dtype: Dtype,
}

impl Geometry {
    /// Layers in order.
    pub fn new(layers: Vec<LayerShape>, dtype: Dtype) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::Zero { what: "number of layers" });
        }
        Ok(Self { layers, dtype })
    }

    /// `layers` equal layers.
    pub fn uniform(layers: usize, shape: LayerShape, dtype: Dtype) -> Result<Self> {
        Self::new(vec![shape; layers], dtype)
    }

    /// Storage type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Shapes, by layer.
    pub fn layers(&self) -> &[LayerShape] {
        &self.layers
    }
    /// KV heads of all layers: the number of segments a sequence has.
    pub fn heads(&self) -> usize {
        self.layers.iter().map(LayerShape::kv_heads).sum()
    }
    /// Bytes of one slot (a K row and a V row) of a layer.
    pub fn slot_bytes(&self, layer: LayerId) -> u64 {
        2 * self.layers[layer.index()].head_dim() as u64 * self.dtype.size() as u64
    }
    /// Slots of a full cache of `tokens` tokens.
    pub fn slots(&self, tokens: u64) -> u64 {
        self.heads() as u64 * tokens
    }
    /// Bytes of a full cache of `tokens` tokens.
    pub fn bytes(&self, tokens: u64) -> u64 {
        (0..self.layers.len() as u32)
            .map(|l| {
                self.layers[l as usize].kv_heads() as u64 * tokens * self.slot_bytes(LayerId(l))
            })
            .sum()
    }
}
