//! Devices and contexts: what a device is, primary and other contexts, and which one is current to a thread.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::abi::{In, Out, TextOut, Uuid};
use super::attributes;
use super::clock::Clock;
use super::device::{self, CAPACITY, DEVICES, Device};
use super::handle::{Handle, Kind};
use super::init;
use super::status::{Cu, Status};

/// A context. What belongs to it lies in the device's tables.
pub struct Context {
    pub flags: u32,
    pub limits: BTreeMap<u32, usize>,
    pub cache: u32,
    /// After a fault, what every call returns.
    pub error: Option<Status>,
    pub legacy: Handle,
    /// Default streams of threads that use handle 2.
    pub per_thread: BTreeMap<u64, Handle>,
    /// What waiting for all blocking streams, or for all streams, makes known.
    pub blocking: Clock,
    pub everything: Clock,
}

impl Context {
    pub fn new(flags: u32, legacy: Handle) -> Self {
        let limits = BTreeMap::from([
            (0, 1024),
            (1, 1 << 20),
            (2, 8 << 20),
            (3, 2),
            (4, 2048),
            (5, 64),
            (6, 0),
        ]);
        Self {
            flags,
            limits,
            cache: 0,
            error: None,
            legacy,
            per_thread: BTreeMap::new(),
            blocking: Clock::default(),
            everything: Clock::default(),
        }
    }
}

thread_local! {
    /// The thread's stack of contexts; the last is current.
    static STACK: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// The context current to this thread.
pub fn peek() -> Option<Handle> {
    STACK.with_borrow(|stack| stack.last().copied())
}

/// A context that may be made current. The primary one may before it is active: its handle never changes.
fn known(context: Handle) -> Cu {
    let device = device::owner(context, Kind::Context).map_err(|_| Status::INVALID_CONTEXT)?;
    if device.contexts.contains_key(&context) || context == device.primary() {
        Ok(())
    } else {
        Err(Status::INVALID_CONTEXT)
    }
}

fn create(context: &Out<Handle>, flags: u32, ordinal: i32) -> Cu {
    context.check()?;
    if flags & !0x7f != 0 {
        return Err(Status::INVALID_VALUE);
    }
    let mut device = device::by_ordinal(ordinal)?;
    let handle = device.handle(Kind::Context);
    device.open(handle, flags);
    STACK.with_borrow_mut(|stack| stack.push(handle));
    context.set(handle)
}

fn primary_released(device: &mut Device) {
    device.retained = 0;
    let primary = device.primary();
    device.close(primary);
}

entries! {
    fn cuDeviceGetCount(count: Out<i32>) {
        init::check()?;
        count.set(DEVICES as i32)
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) {
        device::exists(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetName(name: TextOut, room: i32, ordinal: i32) {
        device::exists(ordinal)?;
        name.set(attributes::NAME, room)
    }

    fn cuDeviceGetUuid(uuid: Out<Uuid>, ordinal: i32) {
        let device = device::by_ordinal(ordinal)?;
        let mut bytes = *b"simcuda-device-\0";
        bytes[15] = device.ordinal as u8;
        uuid.set(Uuid(bytes))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<Uuid>, ordinal: i32) {
        Status(cuDeviceGetUuid(uuid, ordinal)).ok()
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, ordinal: i32) {
        device::exists(ordinal)?;
        bytes.set(CAPACITY as usize)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, attribute: u32, ordinal: i32) {
        device::exists(ordinal)?;
        value.set(attributes::get(attribute, ordinal).ok_or(Status::INVALID_VALUE)?)
    }

    fn cuDevicePrimaryCtxRetain(context: Out<Handle>, ordinal: i32) {
        context.check()?;
        let mut device = device::by_ordinal(ordinal)?;
        let primary = device.primary();
        if device.retained == 0 {
            let flags = device.primary_flags;
            device.open(primary, flags);
        }
        device.retained += 1;
        context.set(primary)
    }

    fn cuDevicePrimaryCtxRelease_v2(ordinal: i32) {
        let mut device = device::by_ordinal(ordinal)?;
        match device.retained {
            0 => return Err(Status::INVALID_CONTEXT),
            1 => primary_released(&mut device),
            _ => device.retained -= 1,
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxReset_v2(ordinal: i32) {
        let mut device = device::by_ordinal(ordinal)?;
        if device.retained != 0 {
            primary_released(&mut device);
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxSetFlags_v2(ordinal: i32, flags: u32) {
        device::by_ordinal(ordinal)?.primary_flags = flags;
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(ordinal: i32, flags: Out<u32>, active: Out<i32>) {
        let device = device::by_ordinal(ordinal)?;
        flags.set(device.primary_flags)?;
        active.set(i32::from(device.retained != 0))
    }

    fn cuCtxCreate_v2(context: Out<Handle>, flags: u32, ordinal: i32) {
        create(&context, flags, ordinal)
    }

    fn cuCtxCreate_v3(
        context: Out<Handle>, affinity: In<u64>, affinities: i32, flags: u32, ordinal: i32
    ) {
        if !affinity.is_null() || affinities != 0 {
            return Err(Status::UNSUPPORTED_EXEC_AFFINITY);
        }
        create(&context, flags, ordinal)
    }

    fn cuCtxCreate_v4(context: Out<Handle>, params: In<u64>, flags: u32, ordinal: i32) {
        if !params.is_null() {
            return Err(Status::NOT_SUPPORTED);
        }
        create(&context, flags, ordinal)
    }

    fn cuCtxDestroy_v2(context: Handle) {
        let device = device::owner(context, Kind::Context);
        let mut device = device.map_err(|_| Status::INVALID_CONTEXT)?;
        if context == device.primary() || !device.contexts.contains_key(&context) {
            return Err(Status::INVALID_CONTEXT);
        }
        device.close(context);
        STACK.with_borrow_mut(|stack| stack.pop_if(|top| *top == context));
        Ok(())
    }

    fn cuCtxGetCurrent(context: Out<Handle>) {
        init::check()?;
        context.set(peek().unwrap_or(Handle::NULL))
    }

    /// Replaces the top of the stack; null pops it.
    fn cuCtxSetCurrent(context: Handle) {
        init::check()?;
        if context != Handle::NULL {
            known(context)?;
        }
        STACK.with_borrow_mut(|stack| {
            stack.pop();
            stack.extend((context != Handle::NULL).then_some(context));
        });
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: Handle) {
        known(context)?;
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<Handle>) {
        init::check()?;
        let top = STACK.with_borrow_mut(Vec::pop).ok_or(Status::INVALID_CONTEXT)?;
        context.set_if_wanted(top);
        Ok(())
    }

    fn cuCtxGetDevice(ordinal: Out<i32>) {
        let (device, _) = device::current()?;
        ordinal.set(device.ordinal as i32)
    }

    fn cuCtxGetFlags(flags: Out<u32>) {
        let (device, context) = device::current()?;
        flags.set(device.contexts[&context].flags)
    }

    fn cuCtxSetFlags(flags: u32) {
        if flags & !0x7f != 0 {
            return Err(Status::INVALID_VALUE);
        }
        let (mut device, context) = device::current()?;
        device.context(context)?.flags = flags;
        Ok(())
    }

    fn cuCtxGetLimit(value: Out<usize>, limit: u32) {
        let (device, context) = device::current()?;
        value.set(*device.contexts[&context].limits.get(&limit).ok_or(Status::UNSUPPORTED_LIMIT)?)
    }

    fn cuCtxSetLimit(limit: u32, value: usize) {
        let (mut device, context) = device::current()?;
        let slot = device.context(context)?.limits.get_mut(&limit);
        *slot.ok_or(Status::UNSUPPORTED_LIMIT)? = value;
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: Out<u32>) {
        let (device, context) = device::current()?;
        config.set(device.contexts[&context].cache)
    }

    fn cuCtxSetCacheConfig(config: u32) {
        if config > 3 {
            return Err(Status::INVALID_VALUE);
        }
        let (mut device, context) = device::current()?;
        device.context(context)?.cache = config;
        Ok(())
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        drop(device::current()?);
        least.set_if_wanted(0);
        greatest.set_if_wanted(super::stream::GREATEST_PRIORITY);
        Ok(())
    }

    fn cuCtxSynchronize() {
        let (mut device, context) = device::current()?;
        device.not_while_capturing(context)?;
        device.finish(context);
        device.usable(context)
    }
}
