//! Attention over a cache: lengths come from the device, everything else from the host's upper bounds.

use super::super::append::{Strided, lend, strided};
use super::super::driver::{Memory, Ptr};
use super::super::output::reach;
use super::super::views::{HeadRows, aligned};
use super::super::{Cuda, DeviceSlice, Floats, Output, attend, check};
use super::slots::Slots;
use crate::backend::ops::Attend;
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

impl Slots {
    /// Descriptions of queries and outputs come first in the workspace.
    fn tables(query_heads: usize) -> usize {
        (2 * query_heads * size_of::<HeadRows>()).next_multiple_of(256)
    }

    fn attend_shape(&self, query_heads: usize, tokens: u32) -> Result<attend::Shape> {
        let kv_heads = self.capacity.len();
        if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            let (query_heads, kv_heads) = (query_heads as u32, kv_heads as u32);
            return Err(Error::HeadsNotDivisible { query_heads, kv_heads });
        }
        Ok(attend::Shape {
            segments: kv_heads as u32,
            group: (query_heads / kv_heads) as u32,
            queries: tokens,
            dim: self.dim,
            dtype: self.dtype,
            longest: self.bounds.iter().copied().max().unwrap_or(0),
            total: self.bounds.iter().map(|&n| u64::from(n)).sum(),
        })
    }

    pub(super) fn attend_bytes(&self, query_heads: usize, tokens: u32) -> Result<usize> {
        let shape = self.attend_shape(query_heads, tokens)?;
        Ok(Self::tables(query_heads) + attend::workspace_bytes(&self.cuda, &shape))
    }

    /// `memory`: what keys and values lie in.
    pub(super) fn attend(
        &self,
        memory: [DeviceSlice<'_>; 2],
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: &Output<'_>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let heads = q.heads();
        let tokens = q.len(0) as u32;
        let shape = self.attend_shape(heads, tokens)?;
        check::expect("head dim of queries", self.dim as usize, q.dim())?;
        if q.dtype() != self.dtype {
            let (expected, got) = (self.dtype, q.dtype());
            return Err(Error::Dtype { what: "queries", expected, got });
        }
        let [k, v] = memory;
        let inputs = [("queries", reach(q)), ("keys", k), ("values", v)];
        out.check([heads, tokens as usize, q.dim()], &inputs)?;
        if let Some(lse) = &lse {
            check::expect("log-sum-exp rows (query heads)", heads, lse.lens().len())?;
            for &len in lse.lens() {
                check::expect("log-sum-exp of a query head", tokens as usize, len as usize)?;
            }
        }
        let needed = Self::tables(heads) + attend::workspace_bytes(&self.cuda, &shape);
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
        lend(&self.cuda, heads, (from, bytes(of_q), pitch), Some(outs))?;
        let held = self.held();
        let inputs = attend::Inputs {
            q: of_q,
            k: held.rows.keys,
            v: held.rows.values,
            pages: held.rows.pages,
            lengths: held.lengths,
            out: of_out,
            out_dtype: out.dtype(),
            lse: lse.map_or(Ptr::NULL, |lse| lse.rows()),
        };
        attend::launch(&self.cuda, op, &shape, &inputs, workspace.0.at(Self::tables(heads)))
    }
}
