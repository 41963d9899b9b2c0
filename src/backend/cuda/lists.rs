//! Rows of slots or positions on the device: what [`Floats`](super::Floats) is for scores.

use super::Cuda;
use super::driver::{Memory, Ptr};
use crate::error::Result;

/// Rows start at whole sectors.
const SECTOR: usize = 32;

/// Rows of u32 with room for so many each: a table of their addresses, then the rows.
pub(super) struct Lists {
    memory: Memory,
    /// Byte at which each row starts.
    starts: Vec<usize>,
}

impl Lists {
    /// Rows of undefined contents.
    pub(super) fn new(cuda: &Cuda, what: &'static str, capacity: &[u32]) -> Result<Self> {
        let mut end = (capacity.len() * size_of::<u64>()).next_multiple_of(SECTOR);
        let mut starts = Vec::with_capacity(capacity.len());
        for &n in capacity {
            starts.push(end);
            end += (n as usize * size_of::<u32>()).next_multiple_of(SECTOR);
        }
        let memory = Memory::new(&cuda.driver, what, end)?;
        let addresses: Vec<u64> = starts.iter().map(|&s| memory.at::<u32>(s).address).collect();
        memory.write(0, &addresses)?;
        Ok(Self { memory, starts })
    }

    /// Copies rows to the device.
    pub(super) fn upload(cuda: &Cuda, what: &'static str, rows: &[&[u32]]) -> Result<Self> {
        let lens: Vec<u32> = rows.iter().map(|row| row.len() as u32).collect();
        let lists = Self::new(cuda, what, &lens)?;
        for (r, row) in rows.iter().enumerate() {
            lists.write(r, row)?;
        }
        Ok(lists)
    }

    /// Overwrites the first entries of a row.
    pub(super) fn write(&self, row: usize, entries: &[u32]) -> Result<()> {
        self.memory.write(self.starts[row], entries)
    }

    /// Address of each row, on the device.
    pub(super) fn rows(&self) -> Ptr<Ptr<u32>> {
        self.memory.at(0)
    }
    /// Waits for the stream, then reads the first entries of each row.
    pub(super) fn read(&self, lens: &[u32]) -> Result<Vec<Vec<u32>>> {
        let rows = self.starts.iter().zip(lens);
        rows.map(|(&start, &len)| self.memory.read(start, len as usize)).collect()
    }
}
