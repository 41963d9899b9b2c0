//! Each check with what it must find and what it must let pass.

mod bench;
mod bounds;
mod ordering;
mod races;
mod schedules;

use super::*;
use crate::{Checks, Class};

const ALL: Checks = Checks { init: true, race: true };

/// The `n`th operation of one stream.
fn op(n: u32) -> OpOrder {
    OpOrder::new(n, 0, n, vec![n])
}

/// Something that warps access: a device's memory at an allocation, or a block's shared memory.
enum Target {
    Global(Memory, u64),
    Shared(Box<Region>),
}

/// A launch of 4 blocks of 4 warps on initialised memory, all bytes zero.
struct Launch {
    target: Target,
    clocks: Clocks,
    check: Checks,
}

#[derive(Clone, Copy)]
struct Access {
    warp: u32,
    width: u32,
    order: Order,
    acquire: bool,
    release: bool,
    inst: u32,
    non_coherent: bool,
}

/// A plain access of 4 bytes.
fn by(warp: u32) -> Access {
    let order = Order::Weak;
    Access { warp, width: 4, order, acquire: false, release: false, inst: 0, non_coherent: false }
}

impl Access {
    fn width(self, width: u32) -> Self {
        Self { width, ..self }
    }

    fn inst(self, inst: u32) -> Self {
        Self { inst, ..self }
    }

    fn strong(self, scope: Scope) -> Self {
        Self { order: Order::Strong(scope), ..self }
    }

    fn acquire(self, scope: Scope) -> Self {
        Self { acquire: true, ..self.strong(scope) }
    }

    fn release(self, scope: Scope) -> Self {
        Self { release: true, ..self.strong(scope) }
    }
}

impl Launch {
    fn global(bytes: u64) -> Self {
        let mut memory = Memory::new(0, 1 << 40);
        let at = memory.alloc(bytes).unwrap();
        memory.fill(at, &[0], bytes, &op(1)).unwrap();
        Self { target: Target::Global(memory, at), clocks: Clocks::new(&op(2), 4, 4), check: ALL }
    }

    /// Two variables of 64 bytes, 16 apart.
    fn shared() -> Self {
        let variables = [("tile".to_owned(), 0, 64), ("sums".to_owned(), 80, 64)];
        let region = Region::shared(&variables, 144);
        Self {
            target: Target::Shared(Box::new(region)),
            clocks: Clocks::new(&op(2), 4, 4),
            check: ALL,
        }
    }

    fn request<T>(
        &mut self,
        access: Access,
        lanes: &[(u32, u64)],
        act: impl FnOnce(&mut Self, &Request<'_>) -> T,
    ) -> T {
        let base = if let Target::Global(_, at) = self.target { at } else { 0 };
        let (mut addresses, mut mask) = ([0xdead_beef; 32], 0);
        for (lane, at) in lanes {
            addresses[*lane as usize] = base.wrapping_add(*at);
            mask |= 1 << lane;
        }
        let Access { warp, width, order, acquire, release, inst, non_coherent } = access;
        let addresses = &addresses;
        act(
            self,
            &Request { mask, addresses, width, order, acquire, release, warp, inst, non_coherent },
        )
    }

    fn load(&mut self, access: Access, lanes: &[(u32, u64)]) -> Result<Lanes, Fault> {
        self.request(access, lanes, |launch, r| {
            let mut out = [[0; 16]; 32];
            match &mut launch.target {
                Target::Global(memory, _) => {
                    memory.load(r, &mut launch.clocks, launch.check, &mut out)?
                }
                Target::Shared(region) => {
                    region.load(r, &mut launch.clocks, launch.check, &mut out)?
                }
            }
            Ok(out)
        })
    }

    fn store(&mut self, access: Access, lanes: &[(u32, u64)], values: &Lanes) -> Result<(), Fault> {
        self.request(access, lanes, |launch, r| match &mut launch.target {
            Target::Global(memory, _) => memory.store(r, &mut launch.clocks, launch.check, values),
            Target::Shared(region) => region.store(r, &mut launch.clocks, launch.check, values),
        })
    }

    /// Every lane adds one.
    fn add(&mut self, access: Access, lanes: &[(u32, u64)]) -> Result<[u64; 32], Fault> {
        self.request(access, lanes, |launch, r| match &mut launch.target {
            Target::Global(memory, _) => {
                memory.atomic(r, &mut launch.clocks, launch.check, &mut |_, old| old + 1)
            }
            Target::Shared(region) => {
                region.atomic(r, &mut launch.clocks, launch.check, &mut |_, old| old + 1)
            }
        })
    }

    /// Lane 0 reads.
    fn read(&mut self, access: Access, at: u64) -> Result<(), Fault> {
        self.load(access, &[(0, at)]).map(|_| ())
    }

    /// Lane 0 writes.
    fn write(&mut self, access: Access, at: u64) -> Result<(), Fault> {
        self.store(access, &[(0, at)], &[[7; 16]; 32])
    }
}

#[track_caller]
fn fault<T>(result: Result<T, Fault>, class: Class, tells: &[&str]) -> Fault {
    let fault = result.err().expect("a fault");
    assert_eq!(fault.class, class, "{}", fault.message);
    for part in tells {
        assert!(fault.message.contains(part), "`{part}` is not in: {}", fault.message);
    }
    fault
}
