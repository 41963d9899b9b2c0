//! Device memory by shape: rows of floats, and small tables of launch parameters.

use bytemuck::{AnyBitPattern, NoUninit};

use super::Cuda;
use super::driver::{Memory, Ptr};
use crate::backend::check::Lens;
use crate::error::Result;
use crate::ragged::Ragged;

/// Rows start at whole sectors: vector accesses stay aligned, and neighbours share none.
const SECTOR: usize = 32;

/// f32 rows of different lengths on the device.
///
/// One allocation: a table of row addresses, the lengths, then the rows. Kernels take the tables, so that rows of
/// different containers may meet in one launch.
pub struct Floats {
    memory: Memory,
    lens: Vec<u32>,
    /// Byte at which each row starts.
    starts: Vec<usize>,
    /// Byte at which the lengths start.
    lengths: usize,
}

impl Floats {
    /// Rows of undefined contents.
    pub(super) fn new(cuda: &Cuda, lens: &[u32]) -> Result<Self> {
        let lengths = lens.len() * size_of::<u64>();
        let mut end = (lengths + size_of_val(lens)).next_multiple_of(SECTOR);
        let mut starts = Vec::with_capacity(lens.len());
        for &len in lens {
            starts.push(end);
            end += (len as usize * size_of::<f32>()).next_multiple_of(SECTOR);
        }
        let memory = Memory::new(&cuda.driver, "rows of scores", end)?;
        let mut head: Vec<u8> = Vec::with_capacity(lengths + size_of_val(lens));
        for &start in &starts {
            head.extend(memory.at::<f32>(start).address.to_ne_bytes());
        }
        head.extend_from_slice(bytemuck::cast_slice(lens));
        memory.write(0, &head)?;
        Ok(Self { memory, lens: lens.to_vec(), starts, lengths })
    }

    pub(super) fn zeroed(cuda: &Cuda, lens: &[u32]) -> Result<Self> {
        let rows = Self::new(cuda, lens)?;
        rows.memory.clear(rows.first(), rows.memory.bytes() - rows.first())?;
        Ok(rows)
    }

    fn first(&self) -> usize {
        self.starts.first().copied().unwrap_or(self.memory.bytes())
    }

    pub(super) fn upload(cuda: &Cuda, rows: &Ragged<f32>) -> Result<Self> {
        let lens: Vec<u32> = rows.lens().map(|n| n as u32).collect();
        let on_device = Self::zeroed(cuda, &lens)?;
        for (row, &start) in rows.iter().zip(&on_device.starts) {
            on_device.memory.write(start, row)?;
        }
        Ok(on_device)
    }

    pub(super) fn to_host(&self) -> Result<Ragged<f32>> {
        let first = self.first();
        let words: Vec<f32> =
            self.memory.read(first, (self.memory.bytes() - first) / size_of::<f32>())?;
        let row = |(&start, &len): (&usize, &u32)| {
            let at = (start - first) / size_of::<f32>();
            words[at..at + len as usize].to_vec()
        };
        Ok(self.starts.iter().zip(&self.lens).map(row).collect())
    }

    /// Length of each row.
    pub(super) fn lens(&self) -> &[u32] {
        &self.lens
    }
    /// Length of the longest row.
    pub(super) fn longest(&self) -> u32 {
        self.lens.iter().copied().max().unwrap_or(0)
    }
    /// Address of each row, on the device: `[rows]`.
    pub(super) fn rows(&self) -> Ptr<Ptr<f32>> {
        self.memory.at(0)
    }
    /// Length of each row, on the device: `[rows]`.
    pub(super) fn lengths(&self) -> Ptr<u32> {
        self.memory.at(self.lengths)
    }
    /// Address of one row.
    pub(super) fn row(&self, row: usize) -> Ptr<f32> {
        self.memory.at(self.starts[row])
    }

    /// A copy of the rows `range`.
    pub(super) fn slice(&self, cuda: &Cuda, range: std::ops::Range<usize>) -> Result<Self> {
        let some = Self::new(cuda, &self.lens[range.clone()])?;
        // Rows lie in the same distances there: one copy.
        if let (Some(&from), false) = (self.starts.get(range.start), range.is_empty()) {
            let to = some.first();
            some.memory.copy(to, &self.memory, from, some.memory.bytes() - to)?;
        }
        Ok(some)
    }
}

impl Lens for Floats {
    fn rows(&self) -> usize {
        self.lens.len()
    }
    fn len(&self, row: usize) -> usize {
        self.lens[row] as usize
    }
}

/// Arrays for one launch, gathered on the host to travel in one copy.
#[derive(Default)]
pub(super) struct Table {
    bytes: Vec<u8>,
}

/// Where an array of a [`Table`] will be.
#[derive(Debug)]
pub(super) struct Slot<T> {
    offset: usize,
    element: std::marker::PhantomData<fn() -> T>,
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slot<T> {}

impl Table {
    /// Adds an array.
    pub(super) fn push<T: NoUninit>(&mut self, items: &[T]) -> Slot<T> {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(items));
        Slot { offset, element: std::marker::PhantomData }
    }

    /// Copies everything to the device.
    pub(super) fn send(&self, cuda: &Cuda) -> Result<Sent> {
        let memory = Memory::new(&cuda.driver, "launch parameters", self.bytes.len())?;
        memory.write(0, &self.bytes)?;
        Ok(Sent(memory))
    }
}

/// A [`Table`] on the device.
pub(super) struct Sent(Memory);

impl Sent {
    pub(super) fn at<T>(&self, slot: Slot<T>) -> Ptr<T> {
        self.0.at(slot.offset)
    }

    /// Overwrites entries of an array from `first` on.
    pub(super) fn write<T: NoUninit>(
        &self,
        slot: Slot<T>,
        first: usize,
        items: &[T],
    ) -> Result<()> {
        self.0.write(slot.offset + first * size_of::<T>(), items)
    }

    /// Waits for the stream, then reads an array back.
    pub(super) fn read<T: AnyBitPattern + NoUninit>(
        &self,
        slot: Slot<T>,
        count: usize,
    ) -> Result<Vec<T>> {
        self.0.read(slot.offset, count)
    }
}
