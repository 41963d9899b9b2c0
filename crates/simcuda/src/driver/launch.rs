//! Launches: function attributes, the limits that a driver checks, and the parameter array.

use std::sync::Arc;

use super::abi::{Host, In, Out};
use super::attributes::{BLOCK_DIM, GRID_DIM, SHARED_OPT_IN, THREADS_PER_BLOCK};
use super::device;
use super::handle::{Handle, Kind};
use super::module::Function;
use super::occupancy::{device_blocks, max_threads, warps_by_registers};
use super::status::{Cu, Status};
use super::stream::locked;
use super::work::{Action, Launch};
use crate::ptx::Kernel;

/// Grid and block of a launch, and its dynamic shared memory.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
}

impl Shape {
    /// Refuses what the device or the kernel cannot take.
    fn check(&self, function: &Function, cooperative: bool) -> Cu {
        let kernel = function.kernel();
        let threads: u64 = self.block.iter().map(|&n| u64::from(n)).product();
        let beyond =
            |dims: [u32; 3], max: [u32; 3]| dims.iter().zip(max).any(|(&n, max)| n == 0 || n > max);
        if beyond(self.grid, GRID_DIM)
            || beyond(self.block, BLOCK_DIM)
            || threads > u64::from(THREADS_PER_BLOCK)
        {
            return Err(Status::INVALID_VALUE);
        }
        let threads = threads as u32;
        if kernel.max_threads.is_some_and(|max| threads > max.iter().product()) {
            return Err(Status::INVALID_VALUE);
        }
        if threads.div_ceil(32) > warps_by_registers(kernel) {
            return Err(Status::LAUNCH_OUT_OF_RESOURCES);
        }
        let shared = kernel.shared_bytes.saturating_add(self.dynamic_shared);
        if self.dynamic_shared > function.max_dynamic_shared || shared > SHARED_OPT_IN {
            return Err(Status::INVALID_VALUE);
        }
        let blocks: u64 = self.grid.iter().map(|&n| u64::from(n)).product();
        if cooperative && blocks > u64::from(device_blocks(kernel, threads, self.dynamic_shared)) {
            return Err(Status::COOPERATIVE_LAUNCH_TOO_LARGE);
        }
        Ok(())
    }
}

/// The parameter space, read from one pointer per `.param` of the kernel: the array itself has no length.
fn from_array(kernel: &Kernel, array: In<Host>) -> Cu<Vec<u8>> {
    let mut params = vec![0; kernel.param_bytes as usize];
    for (index, param) in kernel.params.iter().enumerate() {
        let from = array.at(index)?;
        if from.0 == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let at = param.offset as usize..(param.offset + param.bytes) as usize;
        params[at].copy_from_slice(from.bytes(param.bytes as usize));
    }
    Ok(params)
}

/// The parameter space packed by the caller: names and values, up to a 0.
fn from_extra(kernel: &Kernel, extra: In<usize>) -> Cu<Vec<u8>> {
    const POINTER: usize = 1;
    const SIZE: usize = 2;
    let (mut buffer, mut bytes) = (Host(0), 0);
    let mut at = 0;
    loop {
        match extra.at(at)? {
            0 => break,
            POINTER => buffer = Host(extra.at(at + 1)?),
            SIZE => {
                bytes = usize::from_ne_bytes(
                    Host(extra.at(at + 1)?)
                        .bytes(size_of::<usize>())
                        .try_into()
                        .map_err(|_| Status::INVALID_VALUE)?,
                )
            }
            _ => return Err(Status::INVALID_VALUE),
        }
        at += 2;
    }
    if buffer.0 == 0 || bytes != kernel.param_bytes as usize {
        return Err(Status::INVALID_VALUE);
    }
    Ok(buffer.bytes(bytes).to_vec())
}

impl Function {
    /// A CUfunction_attribute.
    fn attribute(&self, attribute: u32) -> Option<i32> {
        let (kernel, module) = (self.kernel(), &self.module.module);
        let value = match attribute {
            0 => max_threads(kernel),
            1 => kernel.shared_bytes,
            2 => module.variables.iter().filter(|v| v.constant).map(|v| v.bytes).sum(),
            3 => kernel.local_bytes,
            4 => kernel.registers,
            5 => module.version.0 * 10 + module.version.1,
            6 => 90, // binary version
            8 => self.max_dynamic_shared,
            9 => return Some(self.carveout),
            7 | 10..=17 => 0, // caching, clusters
            _ => return None,
        };
        Some(value as i32)
    }
}

fn launch(
    function: Handle,
    shape: Shape,
    stream: Handle,
    array: In<Host>,
    extra: In<usize>,
    cooperative: bool,
) -> Cu {
    let (mut device, stream) = locked(stream)?;
    let found = device.function(function)?;
    if found.context != device.streams[&stream].context {
        return Err(Status::INVALID_HANDLE);
    }
    shape.check(found, cooperative)?;
    let kernel = found.kernel();
    let params = match (kernel.params.is_empty(), array.is_null(), extra.is_null()) {
        (_, false, false) => return Err(Status::INVALID_VALUE),
        (true, _, true) => Vec::new(),
        (_, _, false) => from_extra(kernel, extra)?,
        (_, _, true) => from_array(kernel, array)?,
    };
    let Shape { grid, block, dynamic_shared } = shape;
    let launch = Launch {
        module: found.module.clone(),
        kernel: found.kernel,
        grid,
        block,
        dynamic_shared,
        params,
    };
    device.submit(stream, Action::Launch(Arc::new(launch)))
}

entries! {
    fn cuLaunchKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32,
        dynamic_shared: u32, stream: Handle, params: In<Host>, extra: In<usize>
    ) {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], dynamic_shared };
        launch(function, shape, stream, params, extra, false)
    }

    fn cuLaunchCooperativeKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32,
        dynamic_shared: u32, stream: Handle, params: In<Host>
    ) {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], dynamic_shared };
        launch(function, shape, stream, params, In::NULL, true)
    }

    fn cuFuncGetAttribute(value: Out<i32>, attribute: u32, function: Handle) {
        value.check()?;
        let device = device::owner(function, Kind::Function)?;
        value.set(device.function(function)?.attribute(attribute).ok_or(Status::INVALID_VALUE)?)
    }

    fn cuFuncSetAttribute(function: Handle, attribute: u32, value: i32) {
        const MAX_DYNAMIC_SHARED: u32 = 8;
        const CARVEOUT: u32 = 9;
        let mut device = device::owner(function, Kind::Function)?;
        let room = SHARED_OPT_IN.saturating_sub(device.function(function)?.kernel().shared_bytes);
        let found = device.functions.get_mut(&function).ok_or(Status::INVALID_HANDLE)?;
        match (attribute, u32::try_from(value)) {
            (MAX_DYNAMIC_SHARED, Ok(bytes)) if bytes <= room => found.max_dynamic_shared = bytes,
            (CARVEOUT, _) if (-1..=100).contains(&value) => found.carveout = value,
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    }

    fn cuFuncSetCacheConfig(function: Handle, config: u32) {
        let device = device::owner(function, Kind::Function)?;
        device.function(function)?;
        if config > 3 { Err(Status::INVALID_VALUE) } else { Ok(()) }
    }
}
