//! Device memory with checks: allocations at addresses the host cannot touch, bounds, lifetime, initialisation, and
//! the race shadow.
//!
//! [`Memory`] finds the allocation, [`Region`] checks and moves bytes, its shadow remembers who touched what, and
//! [`Clocks`] know what is ordered before what. The unit of work is a [`Run`]: lanes of a warp whose addresses follow
//! each other, which is what most accesses of a warp are, so that one check serves many lanes.

mod bits;
mod clocks;
mod device;
mod records;
mod region;
mod shadow;
#[cfg(test)]
mod tests;
mod tree;

pub use clocks::{Clocks, OpOrder};
pub use device::Memory;
pub use region::Region;

/// A finding of a check before the executor adds kernel, instruction and source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub class: crate::Class,
    /// The lane to blame, for a warp's access.
    pub lane: Option<u32>,
    /// Other instructions of the kernel are named `inst #N` here.
    pub message: String,
    /// The instruction of the other party of a race, if it is one of this launch.
    pub other_inst: Option<u32>,
}

impl Fault {
    pub fn new(class: crate::Class, lane: Option<u32>, message: String) -> Self {
        Self { class, lane, message, other_inst: None }
    }
}

/// How far a strong operation reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Block,
    Device,
}

/// What an access means to the race check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A plain access: must be ordered after every conflicting one.
    Weak,
    /// `.volatile`, `.relaxed`, atomics: may meet other strong accesses whose scope covers both.
    Strong(Scope),
}

/// One warp's access to memory: all lanes at once.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub mask: u32,
    /// Of the lanes in `mask`: generic (global) addresses, or offsets for a shared or local region.
    pub addresses: &'a [u64; 32],
    /// Bytes per lane: 1, 2, 4, 8 or 16; addresses must be multiples.
    pub width: u32,
    pub order: Order,
    /// `.acquire`, `.acq_rel`: what the value read was released with is ordered before what follows.
    pub acquire: bool,
    /// `.release`, `.acq_rel`: what came before is ordered before whatever acquires the value written.
    pub release: bool,
    /// Index of the warp in the launch: `block * warps_per_block + warp`.
    pub warp: u32,
    /// Index of the instruction in the kernel, for the other party's line in a race report.
    pub inst: u32,
    /// A `.nc` load: what this launch wrote must not be read through it (class ReadOnly).
    pub non_coherent: bool,
}

/// Bytes of each lane; the first `width` count.
pub type Lanes = [[u8; 16]; 32];

/// Lanes of one access, neighbours in number, whose addresses follow each other or are all the same.
#[derive(Debug, Clone, Copy)]
struct Run {
    lane: u32,
    lanes: u32,
    /// Where the first lane's bytes are: a generic address or an offset, like the request's.
    at: u64,
    width: u32,
    /// All lanes have the same address (loads only).
    same: bool,
}

impl Run {
    fn bytes(&self) -> u64 {
        u64::from(if self.same { 1 } else { self.lanes }) * u64::from(self.width)
    }

    fn aligned(&self) -> Result<(), Fault> {
        if self.at.is_multiple_of(u64::from(self.width)) {
            return Ok(());
        }
        let message = format!("{:#x} is no multiple of the {} bytes accessed", self.at, self.width);
        Err(Fault::new(crate::Class::Misaligned, Some(self.lane), message))
    }

    /// The lane that accesses a byte.
    fn lane_of(&self, at: u64) -> u32 {
        self.lane + if self.same { 0 } else { ((at - self.at) / u64::from(self.width)) as u32 }
    }

    /// Takes off the lanes that fit into the next `room` bytes.
    fn split(self, room: u64) -> (Self, Option<Self>) {
        let fit = (room / u64::from(self.width)).min(u64::from(self.lanes)) as u32;
        if self.bytes() <= room {
            return (self, None);
        }
        (Self { lanes: fit, ..self }, self.skip(fit))
    }

    /// What is left without the first lanes.
    fn skip(self, lanes: u32) -> Option<Self> {
        let at =
            if self.same { self.at } else { self.at + u64::from(lanes) * u64::from(self.width) };
        (lanes < self.lanes).then(|| Self {
            lane: self.lane + lanes,
            lanes: self.lanes - lanes,
            at,
            ..self
        })
    }
}

/// The runs of a request, by ascending lane. Lanes with the same address are one run if they read.
fn runs<'a>(r: &Request<'a>, reads: bool) -> impl Iterator<Item = Run> + use<'a> {
    let (mut mask, addresses, width) = (r.mask, r.addresses, r.width);
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros();
        let longest = (mask >> lane).trailing_ones();
        let of = &addresses[lane as usize..(lane + longest) as usize];
        let (at, same) = (of[0], reads && of.get(1) == Some(&of[0]));
        let step = if same { 0 } else { u64::from(width) };
        let follow = of.windows(2).take_while(|pair| pair[1] == pair[0].wrapping_add(step)).count();
        let lanes = follow as u32 + 1;
        mask &= !(u32::MAX >> (32 - lanes) << lane);
        Some(Run { lane, lanes, at, width, same })
    })
}
