//! Handles: table ids that carry their kind and device, never repeat, and are no addresses.

/// What a handle names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Context = 1,
    Stream,
    Event,
    Module,
    Function,
    Graph,
    GraphExec,
    Pool,
}

/// Kind, device and serial number. The high byte makes it a non-canonical address: using it as a pointer faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Handle(pub u64);

impl Handle {
    pub const NULL: Self = Self(0);

    pub fn new(kind: Kind, ordinal: usize, serial: u64) -> Self {
        Self(0x5c << 56 | (kind as u64) << 48 | (ordinal as u64) << 40 | serial)
    }

    pub fn is(self, kind: Kind) -> bool {
        self.0 >> 48 == 0x5c << 8 | kind as u64
    }

    /// The device in it; None where the number is no handle of ours.
    pub fn ordinal(self) -> Option<usize> {
        (self.0 >> 56 == 0x5c).then_some((self.0 >> 40 & 0xff) as usize)
    }
}
