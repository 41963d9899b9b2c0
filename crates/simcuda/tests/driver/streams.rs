//! Lazy streams: work runs when something waits for it, and what was not ordered is found.

use std::sync::Arc;
use std::sync::mpsc;

use cudarc::driver::sys::{CUevent_flags, CUresult::*};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result};
use simcuda::Class;

use super::{classes, cu, function, increment, lazy, refused, simulated};

/// Several seeds: each orders the free choices in its own way.
const SEEDS: std::ops::Range<u64> = 0..8;

fn address<T>(data: &CudaSlice<T>) -> u64 {
    data.device_ptr(data.stream()).0
}

fn copy(to: u64, from: u64, bytes: usize, stream: &CudaStream) {
    // SAFETY: both are allocations of at least this size.
    unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.unwrap();
}

fn fill(at: u64, value: u8, bytes: usize, stream: &CudaStream) {
    // SAFETY: an allocation of at least this size.
    unsafe { result::memset_d8_async(at, value, bytes, stream.cu_stream()) }.unwrap();
}

/// A context without cudarc's own events: this test orders its streams itself.
fn manual(seed: u64) -> (usize, Arc<CudaContext>) {
    let (device, context) = lazy(seed);
    // SAFETY: waits are placed by hand, and left out where the test is about that.
    unsafe { context.disable_event_tracking() };
    (device, context)
}

#[test]
fn nothing_runs_before_it_is_waited_for() {
    let (device, context) = manual(1);
    if !simulated() {
        return;
    }
    let stream = context.new_stream().unwrap();
    let f = function(&context, "increment");
    let mut data = stream.alloc_zeros::<u32>(8).unwrap();
    increment(&stream, &f, &mut data);
    // SAFETY: filled by the copy.
    let mut host = unsafe { context.alloc_pinned::<u32>(8) }.unwrap();
    let early = host.as_mut_ptr().unwrap();
    stream.memcpy_dtoh(&data, &mut host).unwrap();
    // SAFETY: pinned memory, read too early on purpose; it is zero from the start.
    assert_eq!(unsafe { early.read_volatile() }, 0);
    stream.synchronize().unwrap();
    assert_eq!(host.as_slice().unwrap(), [1; 8]);
    simcuda::assert_clean(device);
}

#[test]
fn a_missing_wait_is_found() {
    for seed in SEEDS {
        for waits in [true, false] {
            let (device, context) = manual(seed);
            if !simulated() {
                return;
            }
            let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
            let a = first.alloc_zeros::<u8>(64).unwrap();
            let b = second.alloc_zeros::<u8>(64).unwrap();
            context.synchronize().unwrap();
            fill(address(&a), 7, 64, &first);
            if waits {
                second.join(&first).unwrap();
            }
            copy(address(&b), address(&a), 64, &second);
            if waits {
                first.join(&second).unwrap(); // for the frees
                assert_eq!(second.clone_dtoh(&b).unwrap(), [7; 64]);
                drop((a, b));
                simcuda::assert_clean(device);
            } else {
                let _ = second.synchronize();
                let _ = context.synchronize();
                assert_eq!(classes(device), [Class::StreamRace], "seed {seed}");
            }
        }
    }
}

/// The same without luck: it is the missing order that is found, also where the order happened to be right.
#[test]
fn a_missing_wait_is_found_by_eager_streams_too() {
    let (device, context) = manual(0);
    simcuda::set_policy(device, simcuda::Policy::default());
    if !simulated() {
        return;
    }
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let a = first.alloc_zeros::<u8>(64).unwrap();
    fill(address(&a), 1, 64, &second);
    assert_eq!(classes(device), [Class::StreamRace]);
}

#[test]
fn waiting_on_the_host_orders_streams() {
    for seed in SEEDS {
        let (device, context) = manual(seed);
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let a = first.alloc_zeros::<u8>(64).unwrap();
        match seed % 3 {
            0 => first.synchronize().unwrap(),
            1 => first.record_event(None).unwrap().synchronize().unwrap(),
            _ => context.synchronize().unwrap(),
        }
        fill(address(&a), 1, 64, &second);
        assert_eq!(second.clone_dtoh(&a).unwrap(), [1; 64]);
        drop(a); // freed in the first stream; the host waited for the second
        simcuda::assert_clean(device);
    }
}

#[test]
fn a_free_that_does_not_wait_is_found() {
    // Eagerly the fill runs first: it is the missing order that is found, not its effect.
    for seed in [None].into_iter().chain(SEEDS.map(Some)) {
        let (device, context) = manual(seed.unwrap_or(0));
        if !simulated() {
            return;
        }
        if seed.is_none() {
            simcuda::set_policy(device, simcuda::Policy::default());
        }
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let a = first.alloc_zeros::<u8>(64).unwrap();
        first.synchronize().unwrap();
        fill(address(&a), 1, 64, &second);
        drop(a);
        let _ = context.synchronize();
        let found = classes(device);
        match seed {
            None => assert_eq!(found, [Class::StreamRace]),
            Some(_) => assert!(matches!(found[..], [Class::StreamRace | Class::UseAfterFree])),
        }
    }
}

#[test]
fn cudarcs_event_tracking_is_enough() {
    for seed in SEEDS {
        let (device, context) = lazy(seed);
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let f = function(&context, "increment");
        let mut a = first.clone_htod(&[1u32; 32]).unwrap();
        increment(&first, &f, &mut a);
        increment(&second, &f, &mut a);
        let b = second.clone_dtod(&a).unwrap();
        increment(&first, &f, &mut a);
        assert_eq!(first.clone_dtoh(&b).unwrap(), [3; 32]);
        assert_eq!(second.clone_dtoh(&a).unwrap(), [4; 32]);
        drop((a, b));
        context.check_err().unwrap();
        simcuda::assert_clean(device);
    }
}

/// A stream of cuStreamCreate's default kind, as a handle.
fn blocking_stream(context: &CudaContext) -> cudarc::driver::sys::CUstream {
    context.bind_to_thread().unwrap();
    result::stream::create(result::stream::StreamKind::Default).unwrap()
}

#[test]
fn the_legacy_stream_waits_for_blocking_streams_and_they_for_it() {
    for seed in SEEDS {
        let (device, context) = manual(seed);
        let legacy = context.default_stream();
        let blocking = blocking_stream(&context);
        // SAFETY: the stream lives to the end of the test.
        let blocking = unsafe { context.wrap_borrowed_stream(blocking) };
        let a = legacy.alloc_zeros::<u8>(64).unwrap();
        fill(address(&a), 1, 32, &blocking);
        fill(address(&a), 2, 16, &legacy);
        fill(address(&a), 3, 8, &context.per_thread_stream());
        let host = legacy.clone_dtoh(&a).unwrap();
        assert_eq!((host[0], host[8], host[16], host[32]), (3, 2, 1, 0));
        drop(a);
        simcuda::assert_clean(device);
    }
}

#[test]
fn the_legacy_stream_does_not_wait_for_non_blocking_streams() {
    let (device, context) = manual(5);
    if !simulated() {
        return;
    }
    let (legacy, free) = (context.default_stream(), context.new_stream().unwrap());
    let a = legacy.alloc_zeros::<u8>(64).unwrap();
    context.synchronize().unwrap();
    fill(address(&a), 1, 64, &free);
    fill(address(&a), 2, 64, &legacy);
    let _ = context.synchronize();
    assert_eq!(classes(device), [Class::StreamRace]);
}

/// A synchronous copy from pageable memory may return before its last part: only the legacy stream is behind it.
#[test]
fn a_synchronous_copy_orders_only_the_legacy_stream() {
    let (device, context) = manual(2);
    if !simulated() {
        return;
    }
    let free = context.new_stream().unwrap();
    // SAFETY: sizes match; the memory is freed after its last use.
    unsafe {
        let a = result::malloc_sync(64).unwrap();
        result::memcpy_htod_sync(a, &[1u8; 64]).unwrap();
        fill(a, 2, 64, &free);
    }
    let _ = context.synchronize();
    assert_eq!(classes(device), [Class::StreamRace]);
}

#[test]
fn a_pinned_buffer_reused_too_early_is_found() {
    for early in [false, true] {
        let (device, context) = manual(4);
        if !simulated() {
            return;
        }
        let stream = context.new_stream().unwrap();
        // SAFETY: written before it is read.
        let mut host = unsafe { context.alloc_pinned::<u8>(64) }.unwrap();
        host.as_mut_slice().unwrap().fill(1);
        let at = host.as_mut_ptr().unwrap();
        let data = stream.clone_htod(&host).unwrap();
        if !early {
            stream.synchronize().unwrap();
        }
        // SAFETY: the buffer's first byte. In the early case the copy still reads it: that is the bug to find.
        unsafe { at.write_volatile(9) };
        stream.synchronize().unwrap();
        let expected: &[Class] = if early { &[Class::HostBuffer] } else { &[] };
        assert_eq!(classes(device), expected);
        drop(data);
    }
}

#[test]
fn pageable_memory_is_staged_at_submission() {
    let (device, context) = manual(4);
    let stream = context.new_stream().unwrap();
    let mut host = vec![1u8; 64];
    let data = stream.clone_htod(&host).unwrap();
    host.fill(9);
    assert_eq!(stream.clone_dtoh(&data).unwrap(), [1; 64]);
    simcuda::assert_clean(device);
}

#[test]
fn queries_end_a_polling_loop() {
    let (_, context) = manual(6);
    let stream = context.new_stream().unwrap();
    let event = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let _data = stream.alloc_zeros::<u8>(64).unwrap();
    if simulated() {
        assert_eq!(event.try_is_complete(), Ok(false));
        assert_eq!(cu!(cuStreamQuery(stream.cu_stream())), CUDA_ERROR_NOT_READY);
        let mut time = 0.0;
        // SAFETY: both events exist.
        let elapsed = unsafe { result::event::elapsed(event.cu_event(), event.cu_event()) };
        assert!(
            matches!(refused(elapsed.map(|ms| time = ms)), CUDA_ERROR_NOT_READY | CUDA_SUCCESS),
            "{time}"
        );
    }
    while !event.try_is_complete().unwrap() {}
    while cu!(cuStreamQuery(stream.cu_stream())) == CUDA_ERROR_NOT_READY {}
}

/// As cudarc's own test has it: the host function waits for this thread.
#[test]
fn an_event_after_a_host_function_is_pending() {
    let (_, context) = manual(6);
    extern "C" fn wait(gate: *mut std::ffi::c_void) {
        // SAFETY: the receiver that this test leaked for the function, once.
        let gate = unsafe { Box::from_raw(gate.cast::<mpsc::Receiver<()>>()) };
        let _ = gate.recv();
    }
    let stream = context.new_stream().unwrap();
    let (open, gate) = mpsc::channel();
    let gate = Box::into_raw(Box::new(gate));
    // SAFETY: the function takes the receiver over.
    unsafe { result::stream::launch_host_function(stream.cu_stream(), wait, gate.cast()) }.unwrap();
    let event = stream.record_event(None).unwrap();
    assert_eq!(event.try_is_complete(), Ok(false));
    open.send(()).unwrap();
    event.synchronize().unwrap();
    assert_eq!(event.try_is_complete(), Ok(true));
}

#[test]
fn a_fault_shows_when_its_work_runs() {
    let (device, context) = manual(0);
    let stream = context.new_stream().unwrap();
    let f = function(&context, "trapping");
    super::launch_bare(&stream, &f, (1, 1, 1), (32, 1, 1), 0).unwrap();
    let other = context.new_stream().unwrap();
    if simulated() {
        assert_eq!(classes(device), [Class::Trap]); // asking runs what is pending
    }
    assert_eq!(refused(other.synchronize()), CUDA_ERROR_LAUNCH_FAILED);
}
