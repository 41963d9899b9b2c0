//! What a driver rejects, with the exact code: one case or more for each row of the specification's §1.3.

use std::ptr::null_mut;

use cudarc::driver::sys::{CUevent_flags, CUfunction_attribute, CUresult, CUresult::*};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use simcuda::Class;

use super::{PTX, classes, context, cu, function, launch_bare, refused, simulated};

const OPT_IN: CUfunction_attribute =
    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

#[test]
fn shared_memory_without_opt_in() {
    let (_, context) = context();
    let (f, stream) = (function(&context, "staged"), context.default_stream());
    let launch = |shared| refused(launch_bare(&stream, &f, (1, 1, 1), (32, 1, 1), shared));
    assert_eq!(launch(47 << 10), CUDA_SUCCESS);
    assert_eq!(launch((47 << 10) + 1), CUDA_ERROR_INVALID_VALUE);
    // With opt-in, 227 KiB with the static part.
    assert_eq!(refused(f.set_attribute(OPT_IN, (226 << 10) + 1)), CUDA_ERROR_INVALID_VALUE);
    f.set_attribute(OPT_IN, 226 << 10).unwrap();
    assert_eq!(launch(226 << 10), CUDA_SUCCESS);
    assert_eq!(launch((226 << 10) + 1), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(refused(f.set_attribute(OPT_IN, -1)), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(
        refused(f.set_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS, 8)),
        CUDA_ERROR_INVALID_VALUE
    );
    context.synchronize().unwrap();
}

#[test]
fn launch_shapes() {
    let (_, context) = context();
    let (f, stream) = (function(&context, "staged"), context.default_stream());
    let launch = |grid, block| refused(launch_bare(&stream, &f, grid, block, 0));
    assert_eq!(launch((1, 1, 1), (1024, 1, 1)), CUDA_SUCCESS);
    assert_eq!(launch((1, 1, 1), (4, 4, 64)), CUDA_SUCCESS);
    for (grid, block) in [
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
        ((1, 1, 1), (0, 1, 1)),
        ((0, 1, 1), (32, 1, 1)),
        ((1, 65_536, 1), (32, 1, 1)),
        ((1, 1, 65_536), (32, 1, 1)),
        ((1 << 31, 1, 1), (32, 1, 1)),
    ] {
        assert_eq!(launch(grid, block), CUDA_ERROR_INVALID_VALUE, "grid {grid:?}, block {block:?}");
    }
    let bounded = function(&context, "bounded");
    assert_eq!(refused(launch_bare(&stream, &bounded, (1, 1, 1), (64, 1, 1), 0)), CUDA_SUCCESS);
    assert_eq!(
        refused(launch_bare(&stream, &bounded, (1, 1, 1), (65, 1, 1), 0)),
        CUDA_ERROR_INVALID_VALUE
    );
    if simulated() {
        let wide = function(&context, "wide");
        assert_eq!(refused(launch_bare(&stream, &wide, (1, 1, 1), (512, 1, 1), 0)), CUDA_SUCCESS);
        assert_eq!(
            refused(launch_bare(&stream, &wide, (1, 1, 1), (513, 1, 1), 0)),
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        );
    }
    context.synchronize().unwrap();
}

#[test]
fn cooperative_grid_above_residency() {
    let (_, context) = context();
    let (f, stream) = (function(&context, "staged"), context.default_stream());
    let launch = |blocks| {
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (1024, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel has no parameters and touches only shared memory.
        refused(unsafe { stream.launch_builder(&f).launch_cooperative(config) })
    };
    let resident = f.occupancy_max_active_blocks_per_multiprocessor(1024, 0, None).unwrap() * 132;
    assert_eq!(launch(resident), CUDA_SUCCESS);
    assert_eq!(launch(resident + 1), CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    context.synchronize().unwrap();
}

#[test]
fn missing_parameters() {
    let (_, context) = context();
    let f = function(&context, "increment");
    let f = f.cu_function();
    let none = cu!(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), null_mut()));
    assert_eq!(none, CUDA_ERROR_INVALID_VALUE);
    let (mut params, mut extra) = ([null_mut(); 2], [null_mut(); 1]);
    let both = cu!(cuLaunchKernel(
        f,
        1,
        1,
        1,
        32,
        1,
        1,
        0,
        null_mut(),
        params.as_mut_ptr(),
        extra.as_mut_ptr()
    ));
    assert_eq!(both, CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn frees() {
    let (_, context) = context();
    context.bind_to_thread().unwrap();
    let stream = context.default_stream().cu_stream();
    // SAFETY: each address is one that the driver gave, or one that it must refuse.
    unsafe {
        let a = result::malloc_sync(64).unwrap();
        assert_eq!(refused(result::free_sync(a + 4)), CUDA_ERROR_INVALID_VALUE);
        result::free_sync(a).unwrap();
        assert_eq!(refused(result::free_sync(a)), CUDA_ERROR_INVALID_VALUE);
        let b = result::malloc_async(stream, 64).unwrap();
        result::free_async(b, stream).unwrap();
        assert_eq!(refused(result::free_async(b, stream)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(refused(result::free_sync(b)), CUDA_ERROR_INVALID_VALUE);
        let foreign = (&raw const context) as u64;
        assert_eq!(refused(result::free_async(foreign, stream)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(refused(result::free_host(foreign as *mut _)), CUDA_ERROR_INVALID_VALUE);
    }
    assert_eq!(refused(context.synchronize()), CUDA_SUCCESS);
}

#[test]
fn a_modules_variable_is_not_freed() {
    let (_, context) = context();
    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    let stream = context.default_stream();
    let table = module.get_global("table", &stream).unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&table, &stream);
    assert_eq!(cu!(cuMemFree_v2(address)), CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn copies_past_the_end() {
    let (_, context) = context();
    context.bind_to_thread().unwrap();
    let stream = context.default_stream().cu_stream();
    // SAFETY: addresses the driver gave, with sizes that it must refuse before it touches anything.
    unsafe {
        let a = result::malloc_sync(64).unwrap();
        let b = result::malloc_sync(256).unwrap();
        let mut host = [0u8; 128];
        assert_eq!(refused(result::memcpy_htod_sync(a, &host[..65])), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            refused(result::memcpy_htod_async(a + 32, &host[..33], stream)),
            CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(refused(result::memcpy_dtoh_sync(&mut host[..65], a)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            refused(result::memcpy_dtoh_async(&mut host[..65], a, stream)),
            CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(refused(result::memcpy_dtod_sync(b, a, 65)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(refused(result::memcpy_dtod_async(a, b, 65, stream)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(refused(result::memset_d8_sync(a, 0, 65)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(
            refused(result::memset_d8_async(a + 64, 0, 1, stream)),
            CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(refused(result::memset_d8_async(8, 0, 1, stream)), CUDA_ERROR_INVALID_VALUE);
        result::free_sync(a).unwrap();
        assert_eq!(refused(result::memset_d8_async(a, 0, 1, stream)), CUDA_ERROR_INVALID_VALUE);
        // Nothing that was refused is an error of the context.
        result::memset_d8_async(b, 0, 256, stream).unwrap();
    }
    assert_eq!(cu!(cuMemcpyHtoD_v2(8, null_mut(), 4)), CUDA_ERROR_INVALID_VALUE);
    context.synchronize().unwrap();
}

#[test]
fn allocations_that_cannot_be() {
    let (_, context) = context();
    context.bind_to_thread().unwrap();
    let mut address = 0;
    assert_eq!(cu!(cuMemAlloc_v2(&mut address, 0)), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(cu!(cuMemAlloc_v2(&mut address, usize::MAX / 2)), CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(
        cu!(cuMemAllocAsync(&mut address, usize::MAX / 2, null_mut())),
        CUDA_ERROR_OUT_OF_MEMORY
    );
    assert_eq!(cu!(cuMemAlloc_v2(null_mut(), 64)), CUDA_ERROR_INVALID_VALUE);
    let mut host = null_mut();
    assert_eq!(cu!(cuMemHostAlloc(&mut host, 64, 0x80)), CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn no_current_context() {
    let (_, _context) = context();
    let on_a_new_thread = std::thread::spawn(|| {
        let mut address = 0;
        let mut event = null_mut();
        [
            cu!(cuMemAlloc_v2(&mut address, 64)),
            cu!(cuCtxSynchronize()),
            cu!(cuEventCreate(&mut event, 0)),
            cu!(cuStreamSynchronize(null_mut())),
        ]
    });
    assert_eq!(on_a_new_thread.join().unwrap(), [CUDA_ERROR_INVALID_CONTEXT; 4]);
}

#[test]
fn destroyed_handles() {
    let (_, context) = context();
    let (f, stream, event) = {
        let stream = context.new_stream().unwrap();
        let event = context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
        (function(&context, "bounded").cu_function(), stream.cu_stream(), event.cu_event())
    };
    // Function (its module was unloaded), stream and event are gone.
    let launch =
        |f, stream| cu!(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, stream, null_mut(), null_mut()));
    assert_eq!(launch(f, null_mut()), CUDA_ERROR_INVALID_HANDLE);
    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    let bounded = module.load_function("bounded").unwrap();
    assert_eq!(launch(bounded.cu_function(), stream), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuStreamSynchronize(stream)), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuStreamDestroy_v2(stream)), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuEventRecord(event, null_mut())), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuEventSynchronize(event)), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuStreamWaitEvent(null_mut(), event, 0)), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuEventDestroy_v2(event)), CUDA_ERROR_INVALID_HANDLE);
    // Not a handle at all, and one of another kind: an error code, no crash.
    assert_eq!(cu!(cuEventQuery(0x1234 as _)), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuEventQuery(bounded.cu_function().cast())), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(launch(0x1234 as _, null_mut()), CUDA_ERROR_INVALID_HANDLE);
    context.synchronize().unwrap();
}

#[test]
fn handles_of_another_context() {
    let (_, here) = context();
    if !simulated() {
        return; // would need a second GPU
    }
    let there = CudaContext::new(simcuda::device()).unwrap();
    let stream = there.new_stream().unwrap();
    let event = there.new_event(None).unwrap();
    let module = here.load_module(Ptx::from_src(PTX)).unwrap();
    let f = module.load_function("bounded").unwrap().cu_function();
    here.bind_to_thread().unwrap();
    let launch =
        |stream| cu!(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, stream, null_mut(), null_mut()));
    assert_eq!(launch(stream.cu_stream()), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(cu!(cuEventRecord(event.cu_event(), null_mut())), CUDA_ERROR_INVALID_HANDLE);
    there.bind_to_thread().unwrap();
    assert_eq!(launch(stream.cu_stream()), CUDA_ERROR_INVALID_HANDLE);
    // Memory of one device is unknown to the other.
    let data = here.default_stream().alloc_zeros::<u8>(64).unwrap();
    there.bind_to_thread().unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&data, data.stream());
    assert_eq!(cu!(cuMemsetD8_v2(address, 0, 64)), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(cu!(cuMemFree_v2(address)), CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn a_released_context() {
    let (device, context) = context();
    let handle = context.cu_ctx();
    drop(context);
    if !simulated() {
        return; // other tests share the device
    }
    // Still current to this thread, but no more there.
    assert_eq!(cu!(cuCtxSynchronize()), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(device as i32)), CUDA_ERROR_INVALID_CONTEXT);
    let context = CudaContext::new(device).unwrap();
    assert_eq!(context.cu_ctx(), handle);
    context.synchronize().unwrap();
}

#[test]
fn devices_that_are_not() {
    simcuda::install();
    result::init().unwrap();
    assert_eq!(refused(result::device::get(1000)), CUDA_ERROR_INVALID_DEVICE);
    assert_eq!(refused(result::device::get(-1)), CUDA_ERROR_INVALID_DEVICE);
    assert_eq!(cu!(cuInit(1)), CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn events_without_time() {
    let (_, context) = context();
    let stream = context.new_stream().unwrap();
    let timed = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let untimed = stream.record_event(None).unwrap();
    assert_eq!(refused(untimed.elapsed_ms(&timed())), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(refused(timed().elapsed_ms(&untimed)), CUDA_ERROR_INVALID_HANDLE);
    let never = context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert_eq!(refused(timed().elapsed_ms(&never)), CUDA_ERROR_INVALID_HANDLE);
    let mut event = null_mut();
    assert_eq!(cu!(cuEventCreate(&mut event, 8)), CUDA_ERROR_INVALID_VALUE);
    // Interprocess events have no timing.
    assert_eq!(cu!(cuEventCreate(&mut event, 4)), CUDA_ERROR_INVALID_VALUE);
    let mut other = null_mut();
    assert_eq!(cu!(cuStreamCreate(&mut other, 2)), CUDA_ERROR_INVALID_VALUE);
}

fn load(ptx: &str) -> (usize, CUresult) {
    let (device, context) = context();
    (device, refused(context.load_module(Ptx::from_src(ptx))))
}

#[test]
fn ptx_newer_than_the_driver() {
    if !simulated() {
        return;
    }
    let (device, error) = load(&PTX.replace(".version 8.0", ".version 8.1"));
    assert_eq!(error, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    let reports = simcuda::reports(device);
    assert!(reports[0].message.contains("8.1"), "{}", reports[0]);
}

#[test]
fn ptx_that_does_not_load() {
    let (device, error) = load(&PTX.replace("add.s32 ", "frobnicate.s32 "));
    assert_eq!(error, CUDA_ERROR_INVALID_PTX);
    if simulated() {
        let line = 1 + PTX.lines().position(|line| line.contains("add.s32 ")).unwrap();
        let reports = simcuda::reports(device);
        assert!(reports[0].message.contains(&format!("line {line}")), "{}", reports[0]);
        assert!(reports[0].message.contains("frobnicate"), "{}", reports[0]);
    }
}

#[test]
fn images_that_are_not_ptx() {
    let (_, context) = context();
    let mut module = null_mut();
    let cubin = b"\x7fELF\x02\x01\x01\0";
    assert_eq!(cu!(cuModuleLoadData(&mut module, cubin.as_ptr().cast())), CUDA_ERROR_INVALID_IMAGE);
    assert_eq!(cu!(cuModuleLoad(&mut module, c"/no/such.ptx".as_ptr())), CUDA_ERROR_FILE_NOT_FOUND);
    let loaded = context.load_module(Ptx::from_src(PTX)).unwrap();
    assert_eq!(refused(loaded.load_function("absent")), CUDA_ERROR_NOT_FOUND);
    assert_eq!(
        refused(loaded.get_global("absent", &context.default_stream())),
        CUDA_ERROR_NOT_FOUND
    );
}

/// A fault ends a context: every later call returns it, until the context is gone. Other devices go on.
fn faulting(kernel: &str, error: CUresult, class: Class) {
    let (device, context) = context();
    let stream = context.default_stream();
    let f = function(&context, kernel);
    let mut data = stream.alloc_zeros::<u32>(16).unwrap();
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    let mut builder = stream.launch_builder(&f);
    if kernel != "trapping" {
        builder.arg(&mut data);
    }
    // SAFETY: the kernel faults by design, on a device of this test's own.
    unsafe { builder.launch(config) }.unwrap();
    assert_eq!(refused(context.synchronize()), error);
    assert_eq!(refused(stream.synchronize()), error);
    assert_eq!(refused(stream.alloc_zeros::<u8>(1)), error);
    assert_eq!(refused(context.new_event(None)), error);
    assert_eq!(refused(launch_bare(&stream, &f, (1, 1, 1), (1, 1, 1), 0)), error);
    if !simulated() {
        return; // a real context stays broken for the process
    }
    let reports = simcuda::reports(device);
    assert_eq!(reports.iter().map(|report| report.class).collect::<Vec<_>>(), [class]);
    assert_eq!(reports[0].kernel, kernel);
    let other = CudaContext::new(simcuda::device()).unwrap();
    other.synchronize().unwrap();
    drop((data, f, stream, context));
    let anew = CudaContext::new(device).unwrap();
    let zeros = anew.default_stream().alloc_zeros::<u32>(4).unwrap();
    assert_eq!(anew.default_stream().clone_dtoh(&zeros).unwrap(), [0; 4]);
    simcuda::assert_clean(device);
}

#[test]
fn an_illegal_address_is_sticky() {
    faulting("stray", CUDA_ERROR_ILLEGAL_ADDRESS, Class::OutOfBounds);
}

#[test]
fn a_misaligned_address_is_sticky() {
    faulting("odd", CUDA_ERROR_MISALIGNED_ADDRESS, Class::Misaligned);
}

#[test]
fn a_trap_is_sticky() {
    faulting("trapping", CUDA_ERROR_LAUNCH_FAILED, Class::Trap);
}

/// Undefined bytes reach the host, as on a device, but not unnoticed.
#[test]
fn a_copy_of_undefined_memory_is_reported() {
    let (device, context) = context();
    let stream = context.default_stream();
    // SAFETY: reading undefined numbers is the point.
    let data = unsafe { stream.alloc::<u32>(4) }.unwrap();
    stream.clone_dtoh(&data).unwrap();
    context.synchronize().unwrap();
    if simulated() {
        assert_eq!(classes(device), [Class::Uninitialised]);
    }
}
