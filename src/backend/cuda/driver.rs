//! The driver: found or not, a context, a stream, memory, copies. One of the two files with `unsafe`.
//!
//! All work goes to one stream, so that memory may be freed while kernels that use it still wait: the free waits as
//! well. A borrowed stream is used and never kept alive, destroyed or waited on for longer than a read back takes.
#![allow(unsafe_code, reason = "calls the CUDA driver")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, OnceLock};

use bytemuck::{AnyBitPattern, NoUninit};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, cudaError_enum as Code};
use cudarc::driver::{CudaContext, DriverError, result};

use crate::error::{Error, Result};

/// Compute capability of the kernels: bf16 products and asynchronous copies.
const CAPABILITY: (i32, i32) = (8, 0);
/// First driver that reads PTX ISA 8.0, as `cuDriverGetVersion` has it.
const VERSION: i32 = 12000;

/// A context and the stream that all work goes to.
pub(super) struct Driver {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    /// Allocations in stream order; without, each one waits for the device.
    pools: bool,
    pub(super) processors: u32,
    /// PTX in place of the embedded one, by file.
    replaced: Vec<(String, String)>,
    pub(super) modules: Mutex<HashMap<&'static str, Module>>,
}

/// A loaded PTX file.
pub(super) struct Module {
    pub(super) handle: sys::CUmodule,
    /// With the bytes of dynamic shared memory that each may be launched with.
    pub(super) functions: HashMap<String, (sys::CUfunction, u32)>,
}

// SAFETY: handles of the driver may be used from every thread once the context is current there, which `bind` sees to.
// A borrowed stream's caller has promised to use it on threads where the handle means the same stream.
unsafe impl Send for Driver {}
// SAFETY: as above; what changes is behind a mutex.
unsafe impl Sync for Driver {}

impl Driver {
    /// `stream`: null for the default stream.
    ///
    /// # Safety
    /// A stream that is not null belongs to the primary context of the device and outlives this.
    pub(super) unsafe fn new(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        probe()?;
        let count = result::device::get_count().map_err(|e| failure("cuDeviceGetCount", e))?;
        if ordinal >= count as usize {
            return Err(Error::NoDevice { ordinal, count: count as usize });
        }
        let context = CudaContext::new(ordinal).map_err(|e| failure("a context", e))?;
        let attribute =
            |of| context.attribute(of).map_err(|e| failure("an attribute of the device", e));
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY {
            return Err(Error::ComputeCapability { expected: CAPABILITY, got: capability });
        }
        let pools = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let (stream, replaced) = (stream.cast(), Vec::new());
        Ok(Self { context, stream, pools, processors, replaced, modules: Mutex::default() })
    }

    pub(super) fn replace(&mut self, file: &str, ptx: String) {
        self.replaced.push((file.to_owned(), ptx));
    }

    /// The PTX of `kernels/{file}.cu`.
    pub(super) fn ptx(&self, file: &str) -> &str {
        let replaced = self.replaced.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        let mut all = replaced.chain(super::ptx::FILES.iter().copied());
        all.find(|(name, _)| *name == file).map(|(_, text)| text).expect("a file that is embedded")
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes the context current on this thread.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| failure("cuCtxSetCurrent", e))
    }

    /// Zeroes memory in stream order. Safe inside this crate for the same reason as a launch.
    pub(super) fn clear(&self, at: Ptr<u8>, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the pointer comes from an allocation of at least so many bytes that lives until the stream is done
        // with it, as those that kernels are given.
        unsafe { result::memset_d8_async(at.address, 0, bytes, self.stream) }
            .map_err(|e| failure("cuMemsetD8Async", e))
    }

    /// Waits for all work on the stream.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is alive (`new`), the context current.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|e| failure("cuStreamSynchronize", e))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let modules = self.modules.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for module in modules.values() {
            // SAFETY: loaded by `launch`, unloaded once. Nobody launches from it any more: they would hold this driver.
            // An error cannot be reported from here, and the context is going away.
            let _ = unsafe { result::module::unload(module.handle) };
        }
    }
}

/// Whether there is a driver that can run the kernels. Asks the loader first: cudarc panics where it finds none.
fn probe() -> Result<()> {
    static FOUND: OnceLock<Result<()>> = OnceLock::new();
    FOUND.get_or_init(find).clone()
}

fn find() -> Result<()> {
    let names: &[&str] =
        if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };
    let missing = |reason: String| Error::NoDriver { reason };
    let mut library = Err(missing(String::new()));
    for name in names {
        // SAFETY: the driver's initialisers are run by whoever uses CUDA at all.
        library = unsafe { libloading::Library::new(*name) }.map_err(|e| missing(e.to_string()));
        if library.is_ok() {
            break;
        }
    }
    let library = library?;
    type Version = unsafe extern "C" fn(*mut i32) -> i32;
    // SAFETY: the driver's documented signature.
    let version = unsafe { library.get::<Version>(b"cuDriverGetVersion\0") };
    let version = version.map_err(|e| missing(e.to_string()))?;
    let mut got = 0;
    // SAFETY: it writes one integer, and needs no initialisation before.
    if unsafe { version(&mut got) } != 0 || got < VERSION {
        return Err(Error::OldDriver { expected: VERSION, got });
    }
    // Never unloaded: cudarc opens it for good.
    std::mem::forget(library);
    result::init().map_err(|e| match e.0 {
        Code::CUDA_ERROR_NO_DEVICE => Error::NoDevice { ordinal: 0, count: 0 },
        _ => failure("cuInit", e),
    })
}

/// A driver's error as ours.
pub(super) fn failure(call: &'static str, error: DriverError) -> Error {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    Error::Driver { call, code: error.0 as u32, name: name.unwrap_or_default() }
}

/// An address on the device of elements `T`.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct Ptr<T> {
    pub(super) address: u64,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Ptr<T> {}

impl<T> Ptr<T> {
    pub(super) const NULL: Self = Self::at(0);
    pub(super) const fn at(address: u64) -> Self {
        Self { address, element: PhantomData }
    }
    pub(super) fn add(self, elements: usize) -> Self {
        Self::at(self.address + (elements * size_of::<T>()) as u64)
    }
}

/// Device memory, freed in stream order.
pub(super) struct Memory {
    address: u64,
    bytes: usize,
    driver: Arc<Driver>,
}

impl Memory {
    /// Contents undefined.
    pub(super) fn new(driver: &Arc<Driver>, what: &'static str, bytes: usize) -> Result<Self> {
        let driver = driver.clone();
        if bytes == 0 {
            return Ok(Self { address: 0, bytes, driver });
        }
        driver.bind()?;
        // SAFETY: what is undefined stays behind pointers until a kernel or a copy has written it.
        let address = unsafe {
            match driver.pools {
                true => result::malloc_async(driver.stream, bytes),
                false => result::malloc_sync(bytes),
            }
        };
        let address = address.map_err(|e| match e.0 {
            Code::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { what, bytes: bytes as u64 },
            _ => failure("an allocation", e),
        })?;
        Ok(Self { address, bytes, driver })
    }

    /// Zeroes some bytes.
    pub(super) fn clear(&self, offset: usize, bytes: usize) -> Result<()> {
        assert!(offset + bytes <= self.bytes, "clearing stays inside");
        self.driver.clear(self.at(offset), bytes)
    }

    /// The address of the byte `offset`.
    pub(super) fn at<T>(&self, offset: usize) -> Ptr<T> {
        debug_assert!(offset <= self.bytes && offset.is_multiple_of(align_of::<T>()));
        Ptr::at(self.address + offset as u64)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `data` to the byte `offset`.
    pub(super) fn write<T: NoUninit>(&self, offset: usize, data: &[T]) -> Result<()> {
        let data: &[u8] = bytemuck::cast_slice(data);
        assert!(offset + data.len() <= self.bytes, "writing stays inside");
        if data.is_empty() {
            return Ok(());
        }
        self.driver.bind()?;
        // SAFETY: inside this allocation, in stream order. Memory that is not pinned is staged before the call returns.
        unsafe { result::memcpy_htod_async(self.address + offset as u64, data, self.driver.stream) }
            .map_err(|e| failure("cuMemcpyHtoDAsync", e))
    }

    /// Waits for the stream, then copies `count` elements from the byte `offset`.
    pub(super) fn read<T: AnyBitPattern + NoUninit>(
        &self,
        offset: usize,
        count: usize,
    ) -> Result<Vec<T>> {
        let mut data = vec![T::zeroed(); count];
        assert!(offset + size_of_val(data.as_slice()) <= self.bytes, "reading stays inside");
        if count > 0 {
            self.driver.bind()?;
            // SAFETY: inside this allocation; the vector lives until the copy is waited for.
            unsafe {
                let from = self.address + offset as u64;
                result::memcpy_dtoh_async(&mut data, from, self.driver.stream)
            }
            .map_err(|e| failure("cuMemcpyDtoHAsync", e))?;
            self.driver.synchronize()?;
        }
        Ok(data)
    }

    /// Copies bytes of another allocation to the byte `offset`.
    pub(super) fn copy(
        &self,
        offset: usize,
        from: &Memory,
        from_offset: usize,
        bytes: usize,
    ) -> Result<()> {
        assert!(
            offset + bytes <= self.bytes && from_offset + bytes <= from.bytes,
            "copies stay inside"
        );
        if bytes == 0 {
            return Ok(());
        }
        self.driver.bind()?;
        // SAFETY: inside both allocations, in stream order.
        unsafe {
            let source = from.address + from_offset as u64;
            result::memcpy_dtod_async(
                self.address + offset as u64,
                source,
                bytes,
                self.driver.stream,
            )
        }
        .map_err(|e| failure("cuMemcpyDtoDAsync", e))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.bytes == 0 || self.driver.bind().is_err() {
            return;
        }
        // SAFETY: allocated by `new`, freed once, after what the stream still does with it. An error cannot be reported
        // from here; the next call meets the same broken context.
        let _ = unsafe {
            match self.driver.pools {
                true => result::free_async(self.address, self.driver.stream),
                false => result::free_sync(self.address),
            }
        };
    }
}
