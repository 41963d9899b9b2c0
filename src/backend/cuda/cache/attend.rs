//! Attention over a cache: lengths come from the device, everything else from the host's upper bounds.

use super::super::append::{Strided, lend, strided};
use super::super::driver::{Memory, Ptr};
use super::super::gather::Held;
use super::super::output::reach;
use super::super::views::{HeadRows, aligned};
use super::super::{Cuda, DeviceSlice, Floats, Output, attend, check};
use super::slots::Slots;
use crate::backend::ops::Attend;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Rows;

/// Device memory that an operation may use as it likes while it runs. Made once, for as many bytes as the operations that
/// share it ask for; operations of one stream may share it.
pub struct Workspace(pub(in super::super) Memory);

impl Workspace {
    /// So many bytes.
    ///
    /// Errors: more than the device has.
    pub fn new(cuda: &Cuda, bytes: usize) -> Result<Self> {
        Ok(Self(Memory::new(&cuda.driver, "a workspace", bytes)?))
    }

    /// How many there are.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// Rows at fixed strides, or the error that says why only those.
pub(super) fn queries(q: &Rows<'_, DeviceSlice<'_>>) -> Result<Strided> {
    aligned("queries", q.dim() as u64 * q.dtype().size() as u64)?;
    let why = "a decode step copies no tables to the device";
    strided("queries", q)?.ok_or(Error::Unsupported { what: "queries without fixed strides", why })
}

/// What is attended over: the heads of a cache, or of several.
pub(super) struct Over<'a> {
    pub(super) cuda: &'a Cuda,
    pub(super) of: (Dtype, u32),
    /// Slots that each head may ever hold.
    pub(super) bounds: &'a [u32],
    pub(super) keys: Ptr<HeadRows>,
    pub(super) values: Ptr<HeadRows>,
    pub(super) pages: Ptr<u32>,
    pub(super) lengths: Ptr<u32>,
}

impl Slots {
    pub(super) fn over(&self) -> Over<'_> {
        let Held { rows, lengths, .. } = self.held();
        Over {
            cuda: &self.cuda,
            of: (self.dtype, self.dim),
            bounds: &self.bounds,
            keys: rows.keys,
            values: rows.values,
            pages: rows.pages,
            lengths,
        }
    }
}

impl Over<'_> {
    /// Descriptions of queries and outputs come first in the workspace.
    fn tables(query_heads: usize) -> usize {
        (2 * query_heads * size_of::<HeadRows>()).next_multiple_of(256)
    }

    fn shape(&self, query_heads: usize, tokens: u32) -> Result<attend::Shape> {
        let kv_heads = self.bounds.len();
        if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            let (query_heads, kv_heads) = (query_heads as u32, kv_heads as u32);
            return Err(Error::HeadsNotDivisible { query_heads, kv_heads });
        }
        Ok(attend::Shape {
            segments: kv_heads as u32,
            group: (query_heads / kv_heads) as u32,
            queries: tokens,
            dim: self.of.1,
            dtype: self.of.0,
            longest: self.bounds.iter().copied().max().unwrap_or(0),
            total: self.bounds.iter().map(|&n| u64::from(n)).sum(),
        })
    }

    pub(super) fn bytes(&self, query_heads: usize, tokens: u32) -> Result<usize> {
        let shape = self.shape(query_heads, tokens)?;
        Ok(Self::tables(query_heads) + attend::workspace_bytes(self.cuda, &shape))
    }

    /// `memory`: what keys and values lie in.
    pub(super) fn attend(
        &self,
        memory: &[DeviceSlice<'_>],
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: &Output<'_>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let heads = q.heads();
        let tokens = q.len(0) as u32;
        let shape = self.shape(heads, tokens)?;
        check::expect("head dim of queries", shape.dim as usize, q.dim())?;
        if q.dtype() != shape.dtype {
            let (expected, got) = (shape.dtype, q.dtype());
            return Err(Error::Dtype { what: "queries", expected, got });
        }
        out.check([heads, tokens as usize, q.dim()])?;
        out.check_apart("queries", &reach(q))?;
        memory.iter().try_for_each(|memory| out.check_apart("keys or values", memory))?;
        if let Some(lse) = &lse {
            check::expect("log-sum-exp rows (query heads)", heads, lse.lens().len())?;
            for &len in lse.lens() {
                check::expect("log-sum-exp of a query head", tokens as usize, len as usize)?;
            }
        }
        let needed = Self::tables(heads) + attend::workspace_bytes(self.cuda, &shape);
        check::within("bytes of a workspace", workspace.bytes(), needed)?;
        let from = queries(q)?;
        if tokens == 0 {
            return Ok(());
        }

        let of_q = workspace.0.at::<HeadRows>(0);
        let of_out = of_q.add(heads);
        let pitch = size_of::<HeadRows>();
        let bytes = |rows: Ptr<HeadRows>| Ptr::<u8>::at(rows.address);
        let outs = (out.strided(q.dim())?, bytes(of_out), pitch);
        lend(self.cuda, heads, (from, bytes(of_q), pitch), Some(outs))?;
        let inputs = attend::Inputs {
            q: of_q,
            k: self.keys,
            v: self.values,
            pages: self.pages,
            lengths: self.lengths,
            out: of_out,
            out_dtype: out.dtype(),
            lse: lse.map_or(Ptr::NULL, |lse| lse.rows()),
        };
        attend::launch(self.cuda, op, &shape, &inputs, workspace.0.at(Self::tables(heads)))
    }
}
