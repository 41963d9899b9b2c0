//! What a program does with a driver, stage by stage.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{
    CUcontext, CUdevice_attribute as Attribute, CUevent_flags, CUfunction_attribute,
    CUmemPool_attribute, CUresult,
};
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;

use super::{PTX, context, cu, function, increment, launch_bare, simulated};

#[test]
fn the_device_is_an_h100() {
    let (_, context) = context();
    if !simulated() {
        return;
    }
    assert_eq!(context.name().unwrap(), "simcuda H100");
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    assert_eq!(CudaContext::device_count().unwrap(), 64);
    assert_eq!(
        context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap(),
        132
    );
    assert_eq!(
        context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .unwrap(),
        232_448
    );
    assert_eq!(context.total_mem().unwrap(), 80 << 30);
    let other = CudaContext::new(simcuda::device()).unwrap();
    assert_ne!(context.uuid().unwrap().bytes, other.uuid().unwrap().bytes);
}

#[test]
fn memory_goes_there_and_back() {
    let (device, context) = context();
    let stream = context.default_stream();
    let (free, total) = context.mem_get_info().unwrap();
    let mut a = stream.clone_htod(&[1u32, 2, 3, 4]).unwrap();
    let b = stream.clone_dtod(&a).unwrap();
    stream.memset_zeros(&mut a.slice_mut(1..3)).unwrap();
    assert_eq!(stream.clone_dtoh(&a).unwrap(), [1, 0, 0, 4]);
    assert_eq!(stream.clone_dtoh(&b.slice(1..)).unwrap(), [2, 3, 4]);
    let (with_both, same) = context.mem_get_info().unwrap();
    assert!(with_both < free && same == total);
    drop((a, b));
    let empty = stream.null::<f32>().unwrap();
    assert_eq!(stream.clone_dtoh(&empty).unwrap(), [0.0f32; 0]);
    drop(empty);
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

#[test]
fn synchronous_calls() {
    let (device, context) = context();
    context.bind_to_thread().unwrap();
    // SAFETY: addresses and sizes are those of the allocation.
    unsafe {
        let a = result::malloc_sync(64).unwrap();
        result::memset_d8_sync(a, 7, 64).unwrap();
        result::memcpy_htod_sync(a, &[1u8, 2]).unwrap();
        let b = result::malloc_sync(64).unwrap();
        result::memcpy_dtod_sync(b, a, 64).unwrap();
        let mut back = [0u8; 4];
        result::memcpy_dtoh_sync(&mut back, b).unwrap();
        assert_eq!(back, [1, 2, 7, 7]);
        result::free_sync(a).unwrap();
        result::memory_free(b).unwrap();
    }
    simcuda::assert_clean(device);
}

#[test]
fn pinned_memory() {
    let (device, context) = context();
    let stream = context.new_stream().unwrap();
    // SAFETY: written before it is read.
    let mut host = unsafe { context.alloc_pinned::<u32>(256) }.unwrap();
    host.as_mut_slice().unwrap().iter_mut().zip(0..).for_each(|(slot, n)| *slot = n);
    let data = stream.clone_htod(&host).unwrap();
    // SAFETY: the copy writes all of it.
    let mut back = unsafe { context.alloc_pinned::<u32>(256) }.unwrap();
    stream.memcpy_dtoh(&data, &mut back).unwrap();
    assert!(back.as_slice().unwrap().iter().copied().eq(0..256));
    drop((host, back, data));
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

#[test]
fn kernels_run() {
    let (device, context) = context();
    let stream = context.default_stream();
    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    let f = module.load_function("increment").unwrap();
    let mut data = stream.clone_htod(&(0..1000).collect::<Vec<u32>>()).unwrap();
    increment(&stream, &f, &mut data);
    increment(&stream, &f, &mut data);
    assert!(stream.clone_dtoh(&data).unwrap().into_iter().eq(2..1002));
    if simulated() {
        assert_eq!(simcuda::counters(device, "increment").0, 2);
        assert_eq!(simcuda::counters(device, "staged").0, 0);
        simcuda::clear_counters(device);
        assert_eq!(simcuda::counters(device, "increment"), Default::default());
    }
    let table = module.get_global("table", &stream).unwrap();
    assert_eq!(
        stream.clone_dtoh(&table).unwrap(),
        [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    drop((data, f, module));
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

#[test]
fn a_module_from_a_file() {
    let (_, context) = context();
    let path = std::env::temp_dir().join(format!("simcuda-{}.ptx", std::process::id()));
    std::fs::write(&path, PTX).unwrap();
    let module = context.load_module(Ptx::from_file(&path)).unwrap();
    std::fs::remove_file(&path).unwrap();
    launch_bare(
        &context.default_stream(),
        &module.load_function("bounded").unwrap(),
        (1, 1, 1),
        (64, 1, 1),
        0,
    )
    .unwrap();
    context.synchronize().unwrap();
}

/// Parameters packed by the caller instead of an array.
#[test]
fn packed_parameters() {
    let (_, context) = context();
    let stream = context.default_stream();
    let f = function(&context, "increment");
    let data = stream.clone_htod(&[5u32; 3]).unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&data, &stream);
    let mut buffer = [0u8; 12];
    buffer[..8].copy_from_slice(&address.to_ne_bytes());
    buffer[8..].copy_from_slice(&3u32.to_ne_bytes());
    let mut size = buffer.len();
    let mut extra: [*mut c_void; 5] =
        [1 as _, buffer.as_mut_ptr().cast(), 2 as _, (&raw mut size).cast(), std::ptr::null_mut()];
    let launch = |extra: &mut [*mut c_void; 5]| {
        cu!(cuLaunchKernel(
            f.cu_function(),
            1,
            1,
            1,
            32,
            1,
            1,
            0,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            extra.as_mut_ptr()
        ))
    };
    assert_eq!(launch(&mut extra), CUresult::CUDA_SUCCESS);
    assert_eq!(stream.clone_dtoh(&data).unwrap(), [6; 3]);
    let mut short = 8usize;
    extra[3] = (&raw mut short).cast();
    assert_eq!(launch(&mut extra), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn function_attributes_and_occupancy() {
    let (_, context) = context();
    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    let staged = module.load_function("staged").unwrap();
    assert_eq!(staged.shared_size_bytes().unwrap(), 1024);
    assert_eq!(staged.ptx_version().unwrap(), 80);
    assert_eq!(module.load_function("bounded").unwrap().max_threads_per_block().unwrap(), 64);
    // 2 KiB with the reserve: 32 blocks by count, 2048 / 256 by threads.
    assert_eq!(staged.occupancy_max_active_blocks_per_multiprocessor(32, 0, None).unwrap(), 32);
    assert_eq!(staged.occupancy_max_active_blocks_per_multiprocessor(256, 0, None).unwrap(), 8);
    // 50 KiB dynamic: 52 KiB with static and reserve, of 228.
    assert_eq!(
        staged.occupancy_max_active_blocks_per_multiprocessor(32, 50 << 10, None).unwrap(),
        4
    );
    assert_eq!(
        staged.occupancy_available_dynamic_smem_per_block(4, 32).unwrap(),
        (57 << 10) - 2048
    );
    extern "C" fn nothing(_: i32) -> usize {
        0
    }
    assert_eq!(
        staged.occupancy_max_potential_block_size(nothing, 0, 0, None).unwrap(),
        (264, 1024)
    );
    if simulated() {
        let wide = module.load_function("wide").unwrap();
        assert_eq!(wide.num_regs().unwrap(), 128);
        // 4096 registers a warp: 16 warps in 65 536.
        assert_eq!(wide.occupancy_max_active_blocks_per_multiprocessor(128, 0, None).unwrap(), 4);
        assert_eq!(wide.max_threads_per_block().unwrap(), 512);
    }
}

#[test]
fn dynamic_shared_memory_by_opt_in() {
    let (_, context) = context();
    let f = function(&context, "staged");
    f.set_attribute(
        CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        (227 << 10) - 1024,
    )
    .unwrap();
    launch_bare(&context.default_stream(), &f, (1, 1, 1), (32, 1, 1), (227 << 10) - 1024).unwrap();
    context.synchronize().unwrap();
}

#[test]
fn events_and_their_time() {
    let (_, context) = context();
    let stream = context.new_stream().unwrap();
    let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let _data = stream.alloc_zeros::<u8>(1 << 20).unwrap();
    let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    assert!(start.is_complete() && end.is_complete());
    assert_eq!(context.new_event(None).unwrap().try_is_complete(), Ok(true));
}

#[test]
fn streams_fork_and_join() {
    let (device, context) = context();
    let stream = context.new_stream().unwrap();
    let f = function(&context, "increment");
    let mut a = stream.clone_htod(&[1u32; 64]).unwrap();
    let mut b = stream.clone_htod(&[2u32; 64]).unwrap();
    let side = stream.fork().unwrap();
    increment(&stream, &f, &mut a);
    increment(&side, &f, &mut b);
    stream.join(&side).unwrap();
    stream.memcpy_dtod(&b, &mut a).unwrap();
    assert_eq!(stream.clone_dtoh(&a).unwrap(), [3; 64]);
    drop((a, b));
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

#[test]
fn host_functions_run_in_stream_order() {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    extern "C" fn call(times: *mut c_void) {
        // The driver is out of bounds here.
        assert_eq!(cu!(cuCtxSynchronize()), CUresult::CUDA_ERROR_NOT_PERMITTED);
        CALLS.fetch_add(times as usize as u32, Ordering::SeqCst);
    }
    let (_, context) = context();
    let stream = context.new_stream().unwrap();
    // SAFETY: the function takes its argument as a number.
    unsafe { result::stream::launch_host_function(stream.cu_stream(), call, 3 as _) }.unwrap();
    stream.synchronize().unwrap();
    assert_eq!(CALLS.load(Ordering::SeqCst), 3);
}

#[test]
fn pools() {
    let (_, context) = context();
    let stream = context.new_stream().unwrap();
    // SAFETY: the pool is alive, the attribute is a 64-bit number.
    let attribute = |pool, attribute| unsafe {
        let mut value = 0u64;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()).unwrap();
        value
    };
    // SAFETY: the device exists, the pool is destroyed last.
    unsafe {
        let default = result::device::get_default_mem_pool(context.cu_device()).unwrap();
        assert_eq!(result::device::get_mem_pool(context.cu_device()).unwrap(), default);
        let mut props: cudarc::driver::sys::CUmemPoolProps = std::mem::zeroed();
        props.allocType = cudarc::driver::sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        props.location.type_ = cudarc::driver::sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        // The device's number follows the type, whatever the binding's version calls it.
        (&raw mut props.location).cast::<i32>().add(1).write(context.cu_device());
        let pool = result::mem_pool::create(&props).unwrap();
        result::device::set_mem_pool(context.cu_device(), pool).unwrap();
        let a = result::malloc_async(stream.cu_stream(), 1000).unwrap();
        let b = result::mem_pool::alloc_async(pool, 24, stream.cu_stream()).unwrap();
        assert_eq!(attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT), 1024);
        let mut keep = u64::MAX;
        let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast()).unwrap();
        result::free_async(a, stream.cu_stream()).unwrap();
        result::free_async(b, stream.cu_stream()).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT), 0);
        assert_eq!(attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH), 1024);
        assert!(attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) > 0);
        result::mem_pool::trim_to(pool, 0).unwrap();
        assert_eq!(attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT), 0);
        result::mem_pool::destroy(pool).unwrap();
        assert_eq!(result::device::get_mem_pool(context.cu_device()).unwrap(), default);
    }
}

#[test]
fn devices_exchange_memory() {
    let (device, here) = context();
    if !simulated() {
        return; // would need a second GPU
    }
    let there = CudaContext::new(simcuda::device()).unwrap();
    let (from, to) = (here.new_stream().unwrap(), there.new_stream().unwrap());
    let f = function(&here, "increment");
    let mut data = from.clone_htod(&[1u32, 2, 3]).unwrap();
    increment(&from, &f, &mut data);
    let copy = to.clone_dtod(&data).unwrap();
    assert_eq!(to.clone_dtoh(&copy).unwrap(), [2, 3, 4]);
    drop((data, copy));
    here.check_err().unwrap();
    there.check_err().unwrap();
    simcuda::assert_clean(device);
    simcuda::assert_clean(there.ordinal());
}

#[test]
fn contexts_stack_and_threads_have_their_own() {
    let (device, context) = context();
    context.bind_to_thread().unwrap();
    if !simulated() {
        return; // cudarc's bindings name no way to create a context that all CUDA versions have
    }
    let mut second: CUcontext = std::ptr::null_mut();
    // SAFETY: the driver is loaded and exports the function with this signature.
    let created = unsafe {
        let library = libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        let create: extern "C" fn(*mut CUcontext, u32, i32) -> u32 =
            std::mem::transmute(libc::dlsym(library, c"cuCtxCreate_v2".as_ptr()));
        create(&mut second, 0, device as i32)
    };
    assert_eq!(created, 0);
    assert_eq!(result::ctx::get_current().unwrap(), Some(second));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(result::ctx::get_current().unwrap(), None);
            assert_eq!(
                result::ctx::synchronize(),
                Err(DriverError(CUresult::CUDA_ERROR_INVALID_CONTEXT))
            );
            context.bind_to_thread().unwrap();
            result::ctx::synchronize().unwrap();
        });
    });
    assert_eq!(cu!(cuCtxDestroy_v2(second)), CUresult::CUDA_SUCCESS);
    assert_eq!(result::ctx::get_current().unwrap(), Some(context.cu_ctx()));
    assert_eq!(cu!(cuCtxDestroy_v2(second)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
}

#[test]
fn one_device_from_several_threads() {
    let (device, context) = context();
    std::thread::scope(|scope| {
        for n in 0..4u32 {
            let context = &context;
            scope.spawn(move || {
                let stream = context.new_stream().unwrap();
                let f = function(context, "increment");
                let mut data = stream.clone_htod(&vec![n; 100]).unwrap();
                increment(&stream, &f, &mut data);
                assert_eq!(stream.clone_dtoh(&data).unwrap(), vec![n + 1; 100]);
            });
        }
    });
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

#[test]
fn errors_have_names_and_texts() {
    simcuda::install();
    let error = DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(error.error_name().unwrap().to_str(), Ok("CUDA_ERROR_ILLEGAL_ADDRESS"));
    assert_eq!(
        error.error_string().unwrap().to_str(),
        Ok("an illegal memory access was encountered")
    );
    let mut text = std::ptr::null();
    // SAFETY: success gives a C string that lives forever.
    let success = unsafe {
        cudarc::driver::sys::cuGetErrorName(CUresult::CUDA_SUCCESS, &mut text).result().unwrap();
        CStr::from_ptr(text)
    };
    assert_eq!(success.to_str(), Ok("CUDA_SUCCESS"));
}

/// A cooperative launch whose blocks are all resident.
#[test]
fn cooperative_launch() {
    let (_, context) = context();
    let stream = context.default_stream();
    let f = function(&context, "increment");
    let mut data = stream.clone_htod(&[1u32; 256]).unwrap();
    let config = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (128, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: a pointer to 256 numbers, and 256.
    unsafe { stream.launch_builder(&f).arg(&mut data).arg(&256u32).launch_cooperative(config) }
        .unwrap();
    assert_eq!(stream.clone_dtoh(&data).unwrap(), [2; 256]);
}
