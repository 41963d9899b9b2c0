//! One tensor in memory: typed and aligned, filled by the reader without a second copy.

use std::io::{self, Read};

use bytemuck::Pod;
use half::{bf16, f16};
use kvbudget::backend::cpu::HostSlice;
use kvbudget::{Dtype, Element};

use super::TensorInfo;

// File bytes become elements as they are.
const _: () = assert!(cfg!(target_endian = "little"), "safetensors are little-endian");

/// Elements of a tensor and their shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<u32>,
    data: Data,
}

#[derive(Debug, Clone, PartialEq)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Tensor {
    /// Reads the elements from where `source` stands. The header has been checked against the size of the
    /// source, so the allocation is never larger than what there is to read.
    pub(super) fn read(source: &mut impl Read, info: &TensorInfo) -> io::Result<Self> {
        let data = match info.dtype {
            Dtype::F32 => Data::F32(elements(source, info.elements)?),
            Dtype::F16 => Data::F16(elements(source, info.elements)?),
            Dtype::BF16 => Data::BF16(elements(source, info.elements)?),
        };
        Ok(Self { shape: info.shape.clone(), data })
    }

    /// The shape.
    pub fn shape(&self) -> &[u32] {
        &self.shape
    }

    /// The elements as a backend takes them.
    pub fn slice(&self) -> HostSlice<'_> {
        match &self.data {
            Data::F32(data) => HostSlice::F32(data),
            Data::F16(data) => HostSlice::F16(data),
            Data::BF16(data) => HostSlice::BF16(data),
        }
    }

    /// The elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::F32(data) => data.clone(),
            Data::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Number of elements that are NaN or infinite.
    pub fn non_finite(&self) -> usize {
        fn count<T: Element>(data: &[T]) -> usize {
            data.iter().filter(|x| !x.to_f32().is_finite()).count()
        }
        match &self.data {
            Data::F32(data) => count(data),
            Data::F16(data) => count(data),
            Data::BF16(data) => count(data),
        }
    }
}

fn elements<T: Pod>(source: &mut impl Read, count: usize) -> io::Result<Vec<T>> {
    let mut data = Vec::new();
    data.try_reserve_exact(count).map_err(|_| io::ErrorKind::OutOfMemory)?;
    data.resize(count, T::zeroed());
    source.read_exact(bytemuck::cast_slice_mut(&mut data))?;
    Ok(data)
}
