//! Stream-ordered memory pools: how much of a pool is used and reserved. Reservation follows the documented rules
//! (kept until a synchronisation finds more than the release threshold), in units of 2 MiB.

use std::ffi::c_void;

use super::abi::{In, Out, PoolProps};
use super::device::{self, Device};
use super::handle::{Handle, Kind};
use super::status::{Cu, Status};

const UNIT: u64 = 2 << 20;
const DEVICE_LOCATION: u32 = 1;
const PINNED_ALLOCATION: u32 = 1;

/// A pool.
#[derive(Debug, Clone)]
pub struct Pool {
    /// Follow event dependencies, opportunistic, internal dependencies.
    reuse: [i32; 3],
    threshold: u64,
    reserved: u64,
    reserved_high: u64,
    used: u64,
    used_high: u64,
    limit: u64,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            reuse: [1; 3],
            threshold: 0,
            reserved: 0,
            reserved_high: 0,
            used: 0,
            used_high: 0,
            limit: u64::MAX,
        }
    }
}

impl Pool {
    /// Takes memory, if the pool's limit allows.
    pub fn take(&mut self, bytes: u64) -> Cu {
        if self.used.saturating_add(bytes) > self.limit {
            return Err(Status::OUT_OF_MEMORY);
        }
        self.used += bytes;
        self.used_high = self.used_high.max(self.used);
        self.reserved = self.reserved.max(self.used.next_multiple_of(UNIT));
        self.reserved_high = self.reserved_high.max(self.reserved);
        Ok(())
    }

    pub fn give(&mut self, bytes: u64) {
        self.used -= bytes;
    }

    /// Gives back what is reserved beyond this and beyond what is used.
    fn keep(&mut self, bytes: u64) {
        if bytes < self.reserved {
            self.reserved = self.reserved.min(self.used.max(bytes).next_multiple_of(UNIT));
        }
    }
}

impl Device {
    /// What a stream, event or context synchronisation does to the pools.
    pub fn settle_pools(&mut self) {
        self.pools.values_mut().for_each(|pool| pool.keep(pool.threshold));
    }

    fn pool(&mut self, pool: Handle) -> Cu<&mut Pool> {
        self.pools.get_mut(&pool).ok_or(Status::INVALID_VALUE)
    }
}

fn owner(pool: Handle) -> Cu<std::sync::MutexGuard<'static, Device>> {
    device::owner(pool, Kind::Pool).map_err(|status| match status {
        Status::INVALID_HANDLE => Status::INVALID_VALUE,
        status => status,
    })
}

entries! {
    fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, ordinal: i32) {
        pool.set(device::by_ordinal(ordinal)?.default_pool)
    }

    fn cuDeviceGetMemPool(pool: Out<Handle>, ordinal: i32) {
        pool.set(device::by_ordinal(ordinal)?.current_pool)
    }

    fn cuDeviceSetMemPool(ordinal: i32, pool: Handle) {
        let mut device = device::by_ordinal(ordinal)?;
        device.pool(pool)?;
        device.current_pool = pool;
        Ok(())
    }

    fn cuMemPoolCreate(pool: Out<Handle>, props: In<PoolProps>) {
        pool.check()?;
        let props = props.get()?;
        if props.alloc_type != PINNED_ALLOCATION || props.location_type != DEVICE_LOCATION {
            return Err(Status::INVALID_VALUE);
        }
        if props.handle_types != 0 {
            return Err(Status::NOT_SUPPORTED); // sharing between processes
        }
        let mut device = device::by_ordinal(props.location_id)?;
        let limit = if props.max_size == 0 { u64::MAX } else { props.max_size as u64 };
        let handle = device.handle(Kind::Pool);
        device.pools.insert(handle, Pool { limit, ..Pool::default() });
        pool.set(handle)
    }

    /// Outstanding allocations stay valid.
    fn cuMemPoolDestroy(pool: Handle) {
        let mut device = owner(pool)?;
        device.pool(pool)?;
        if pool == device.default_pool {
            return Err(Status::INVALID_VALUE);
        }
        if pool == device.current_pool {
            device.current_pool = device.default_pool;
        }
        device.pools.remove(&pool);
        Ok(())
    }

    fn cuMemPoolTrimTo(pool: Handle, keep: usize) {
        owner(pool)?.pool(pool)?.keep(keep as u64);
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: Word) {
        let mut device = owner(pool)?;
        let pool = device.pool(pool)?;
        match attribute {
            1..=3 => value.int().set(pool.reuse[attribute as usize - 1]),
            4 => value.word().set(pool.threshold),
            5 => value.word().set(pool.reserved),
            6 => value.word().set(pool.reserved_high),
            7 => value.word().set(pool.used),
            8 => value.word().set(pool.used_high),
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: Word) {
        let mut device = owner(pool)?;
        let pool = device.pool(pool)?;
        match attribute {
            1..=3 => pool.reuse[attribute as usize - 1] = value.int().get()?,
            4 => pool.threshold = value.word().get()?,
            6 if value.word().get()? == 0 => pool.reserved_high = pool.reserved,
            8 if value.word().get()? == 0 => pool.used_high = pool.used,
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    }
}

/// An attribute's value: an int or a 64-bit word, by the attribute.
#[repr(transparent)]
pub struct Word(*mut c_void);

impl Word {
    fn int(&self) -> Out<i32> {
        Out::new(self.0.cast())
    }

    fn word(&self) -> Out<u64> {
        Out::new(self.0.cast())
    }
}
