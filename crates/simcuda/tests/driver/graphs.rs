//! Capture, replay, and the rules that keep a capture apart from everything else.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUgraphInstantiate_flags as Flags, CUresult::*, CUstreamCaptureMode as Mode,
    CUstreamCaptureStatus as Status,
};
use cudarc::driver::{CudaContext, CudaStream, result};
use simcuda::Class;

use super::{classes, context, cu, function, increment, lazy, refused, simulated};

const GLOBAL: Mode = Mode::CU_STREAM_CAPTURE_MODE_GLOBAL;
const RELAXED: Mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
const LOCAL: Mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const PLAIN: Flags = Flags(0);

/// A context without cudarc's events, which a capture would refuse to wait for.
fn untracked() -> (usize, Arc<CudaContext>, Arc<CudaStream>) {
    let (device, context) = context();
    // SAFETY: one stream, or waits by hand.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    (device, context, stream)
}

#[test]
fn a_graph_replays() {
    let (device, context, stream) = untracked();
    let f = function(&context, "increment");
    let mut data = stream.clone_htod(&[0u32; 64]).unwrap();
    stream.begin_capture(LOCAL).unwrap();
    assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    increment(&stream, &f, &mut data);
    increment(&stream, &f, &mut data);
    let graph = stream.end_capture(PLAIN).unwrap().unwrap();
    assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
    assert_eq!(stream.clone_dtoh(&data).unwrap(), [0; 64], "captured work does not run");
    graph.upload().unwrap();
    for launches in 1..=3 {
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&data).unwrap(), [2 * launches; 64]);
    }
    drop((graph, data));
    context.check_err().unwrap();
    simcuda::assert_clean(device);
}

/// Two branches by event fork and join; lazily, and they are parallel.
#[test]
fn a_graph_with_branches() {
    for (seed, joined) in [(0, true), (1, true), (2, true), (3, false)] {
        let (device, context) = lazy(seed);
        // SAFETY: waits by hand.
        unsafe { context.disable_event_tracking() };
        let (stream, side) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let f = function(&context, "increment");
        let mut a = stream.clone_htod(&[1u32; 32]).unwrap();
        let mut b = stream.clone_htod(&[2u32; 32]).unwrap();
        stream.synchronize().unwrap();
        stream.begin_capture(LOCAL).unwrap();
        side.join(&stream).unwrap();
        assert_eq!(side.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        increment(&side, &f, &mut b);
        increment(&stream, &f, &mut a);
        if joined {
            stream.join(&side).unwrap();
            stream.memcpy_dtod(&b, &mut a).unwrap();
        } else {
            stream.memcpy_dtod(&b, &mut a).unwrap(); // does not wait for the increment of b
            stream.join(&side).unwrap();
        }
        let graph = stream.end_capture(PLAIN).unwrap().unwrap();
        assert_eq!(side.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
        graph.launch().unwrap();
        if joined {
            assert_eq!(stream.clone_dtoh(&a).unwrap(), [3; 32]);
            graph.launch().unwrap();
            assert_eq!(stream.clone_dtoh(&a).unwrap(), [4; 32]);
            simcuda::assert_clean(device);
        } else if simulated() {
            let _ = stream.synchronize();
            assert_eq!(classes(device), [Class::StreamRace]);
        }
    }
}

/// Launches of one graph follow each other, whatever streams they are in.
#[test]
fn launches_of_one_graph_are_ordered() {
    for seed in 0..8 {
        let (device, context) = lazy(seed);
        // SAFETY: one graph, whose launches the driver orders.
        unsafe { context.disable_event_tracking() };
        let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let f = function(&context, "increment");
        let mut a = stream.alloc_zeros::<u32>(4).unwrap();
        let mut b = stream.alloc_zeros::<u32>(4).unwrap();
        stream.synchronize().unwrap();
        stream.begin_capture(LOCAL).unwrap();
        stream.memcpy_dtod(&b, &mut a).unwrap();
        increment(&stream, &f, &mut b);
        let graph = stream.end_capture(PLAIN).unwrap().unwrap();
        graph.launch().unwrap();
        // SAFETY: graph and stream are alive.
        unsafe { result::graph::launch(graph.cu_graph_exec(), other.cu_stream()) }.unwrap();
        context.synchronize().unwrap();
        assert_eq!(stream.clone_dtoh(&a).unwrap(), [1; 4], "seed {seed}");
        assert_eq!(stream.clone_dtoh(&b).unwrap(), [2; 4], "seed {seed}");
        simcuda::assert_clean(device);
    }
}

#[test]
fn pinned_memory_is_read_at_each_launch() {
    let (device, context, stream) = untracked();
    // SAFETY: written before it is read.
    let mut host = unsafe { context.alloc_pinned::<u32>(4) }.unwrap();
    host.as_mut_slice().unwrap().fill(1);
    let at = host.as_mut_ptr().unwrap();
    let data = stream.alloc_zeros::<u32>(4).unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&data, &stream);
    stream.begin_capture(LOCAL).unwrap();
    assert_eq!(cu!(cuMemcpyHtoDAsync_v2(address, at.cast(), 16, stream.cu_stream())), CUDA_SUCCESS);
    let graph = stream.end_capture(PLAIN).unwrap().unwrap();
    for value in [1, 5] {
        // SAFETY: four numbers of pinned memory; nothing is pending.
        unsafe { std::slice::from_raw_parts_mut(at, 4) }.fill(value);
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&data).unwrap(), [value; 4]);
    }
    simcuda::assert_clean(device);
}

#[test]
fn instantiation_flags() {
    let (_, _context, stream) = untracked();
    let capture = |flags| {
        stream.begin_capture(LOCAL).unwrap();
        refused(stream.end_capture(flags))
    };
    assert_eq!(capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH), CUDA_SUCCESS);
    let contradiction = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
        | Flags::CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH;
    assert_eq!(capture(contradiction), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(capture(Flags(1 << 20)), CUDA_ERROR_INVALID_VALUE);
}

/// What cudarc's event tracking does inside a capture: waits for an event recorded before it.
#[test]
fn an_event_from_outside_is_refused() {
    let (_, context, stream) = untracked();
    let outside = stream.record_event(None).unwrap();
    let other = context.new_stream().unwrap().record_event(None).unwrap();
    for event in [outside, other] {
        stream.begin_capture(LOCAL).unwrap();
        assert_eq!(refused(stream.wait(&event)), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        assert_eq!(refused(stream.record_event(None)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
    }
    // Never recorded: nothing to wait for.
    stream.begin_capture(LOCAL).unwrap();
    stream.wait(&context.new_event(None).unwrap()).unwrap();
    stream.end_capture(PLAIN).unwrap();
}

#[test]
fn event_tracking_breaks_a_capture() {
    let (_, context) = context();
    let stream = context.new_stream().unwrap();
    let mut data = stream.alloc_zeros::<u32>(4).unwrap();
    stream.begin_capture(LOCAL).unwrap();
    let _ = stream.memset_zeros(&mut data);
    assert_eq!(refused(context.check_err()), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

/// Begins a capture, makes a call that it does not survive, and ends it.
fn broken_by(
    mode: Mode,
    call: impl FnOnce(&Arc<CudaContext>, &Arc<CudaStream>) -> cudarc::driver::sys::CUresult,
) -> cudarc::driver::sys::CUresult {
    let (_, context, stream) = untracked();
    stream.begin_capture(mode).unwrap();
    let error = call(&context, &stream);
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    error
}

#[test]
fn waiting_inside_a_capture_is_refused() {
    let unsupported = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    assert_eq!(broken_by(LOCAL, |_, stream| refused(stream.synchronize())), unsupported);
    assert_eq!(broken_by(LOCAL, |_, stream| cu!(cuStreamQuery(stream.cu_stream()))), unsupported);
    assert_eq!(broken_by(LOCAL, |context, _| refused(context.synchronize())), unsupported);
    assert_eq!(broken_by(RELAXED, |context, _| refused(context.synchronize())), unsupported);
    let query = |_: &Arc<CudaContext>, stream: &Arc<CudaStream>| {
        refused(stream.record_event(None).unwrap().try_is_complete())
    };
    assert_eq!(broken_by(RELAXED, query), CUDA_ERROR_CAPTURED_EVENT);
    let wait = |_: &Arc<CudaContext>, stream: &Arc<CudaStream>| {
        refused(stream.record_event(None).unwrap().synchronize())
    };
    assert_eq!(broken_by(RELAXED, wait), CUDA_ERROR_CAPTURED_EVENT);
}

#[test]
fn unsafe_calls_by_mode() {
    let allocate = |_: &Arc<CudaContext>, _: &Arc<CudaStream>| {
        let mut address = 0;
        cu!(cuMemAlloc_v2(&mut address, 64))
    };
    assert_eq!(broken_by(GLOBAL, allocate), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(broken_by(LOCAL, allocate), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    let copy = |_: &Arc<CudaContext>, _: &Arc<CudaStream>| {
        cu!(cuMemcpyHtoD_v2(8, [0u8; 4].as_ptr().cast(), 4))
    };
    assert_eq!(broken_by(GLOBAL, copy), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    // From another thread: only a capture in global mode minds.
    let elsewhere = |context: &Arc<CudaContext>, _: &Arc<CudaStream>| {
        let context = context.clone();
        let call = move || {
            context.bind_to_thread().unwrap();
            let mut address = 0;
            cu!(cuMemAlloc_v2(&mut address, 64))
        };
        std::thread::spawn(call).join().unwrap()
    };
    assert_eq!(broken_by(GLOBAL, elsewhere), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    let (_, context, stream) = untracked();
    for (mode, from_here) in [(RELAXED, true), (LOCAL, false)] {
        stream.begin_capture(mode).unwrap();
        let error =
            if from_here { allocate(&context, &stream) } else { elsewhere(&context, &stream) };
        assert_eq!(error, CUDA_SUCCESS);
        stream.end_capture(PLAIN).unwrap();
    }
    // A thread may say that it knows what it does.
    let mut mode = RELAXED;
    assert_eq!(cu!(cuThreadExchangeStreamCaptureMode(&mut mode)), CUDA_SUCCESS);
    assert_eq!(mode, GLOBAL);
    stream.begin_capture(GLOBAL).unwrap();
    assert_eq!(allocate(&context, &stream), CUDA_SUCCESS);
    stream.end_capture(PLAIN).unwrap();
    assert_eq!(cu!(cuThreadExchangeStreamCaptureMode(&mut mode)), CUDA_SUCCESS);
    assert_eq!(mode, RELAXED);
}

#[test]
fn the_legacy_stream_beside_a_blocking_capture() {
    let (_, context, _) = untracked();
    let legacy = context.default_stream();
    let data = legacy.alloc_zeros::<u8>(4).unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&data, &legacy);
    let blocking = result::stream::create(result::stream::StreamKind::Default).unwrap();
    assert_eq!(
        cu!(cuStreamBeginCapture_v2(null_mut(), LOCAL)),
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    assert_eq!(cu!(cuStreamBeginCapture_v2(blocking, LOCAL)), CUDA_SUCCESS);
    assert_eq!(cu!(cuStreamBeginCapture_v2(blocking, LOCAL)), CUDA_ERROR_ILLEGAL_STATE);
    assert_eq!(refused(legacy.capture_status()), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    assert_eq!(cu!(cuMemsetD8Async(address, 0, 4, null_mut())), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    let mut graph = null_mut();
    assert_eq!(
        cu!(cuStreamEndCapture(blocking, &mut graph)),
        CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    );
    assert!(graph.is_null());
    assert_eq!(cu!(cuStreamEndCapture(blocking, &mut graph)), CUDA_ERROR_ILLEGAL_STATE);
    // Beside a non-blocking capture, the legacy stream goes on.
    let free = context.new_stream().unwrap();
    free.begin_capture(LOCAL).unwrap();
    assert_eq!(cu!(cuMemsetD8Async(address, 0, 4, null_mut())), CUDA_SUCCESS);
    free.end_capture(PLAIN).unwrap();
}

#[test]
fn captures_end_where_they_began() {
    let (_, context, stream) = untracked();
    let side = context.new_stream().unwrap();
    stream.begin_capture(LOCAL).unwrap();
    side.join(&stream).unwrap();
    assert_eq!(refused(side.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    let data = stream.alloc_zeros::<u8>(4).unwrap();
    let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&data, &stream);
    stream.begin_capture(LOCAL).unwrap();
    side.join(&stream).unwrap();
    assert_eq!(cu!(cuMemsetD8Async(address, 0, 4, side.cu_stream())), CUDA_SUCCESS);
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);

    stream.begin_capture(LOCAL).unwrap();
    let from_elsewhere = {
        let stream = stream.clone();
        std::thread::spawn(move || refused(stream.end_capture(PLAIN))).join().unwrap()
    };
    assert_eq!(from_elsewhere, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    stream.end_capture(PLAIN).unwrap();

    stream.begin_capture(LOCAL).unwrap();
    side.begin_capture(LOCAL).unwrap();
    assert_eq!(refused(stream.join(&side)), CUDA_ERROR_STREAM_CAPTURE_MERGE);
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    assert_eq!(refused(side.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

#[test]
fn an_event_of_an_ended_capture() {
    let (_, _context, stream) = untracked();
    stream.begin_capture(LOCAL).unwrap();
    let event = stream.record_event(None).unwrap();
    stream.end_capture(PLAIN).unwrap();
    assert_eq!(refused(stream.wait(&event)), CUDA_ERROR_CAPTURED_EVENT);
    event.record(&stream).unwrap();
    stream.wait(&event).unwrap();
    event.synchronize().unwrap();
}

#[test]
fn memory_inside_a_capture() {
    let (device, _context, stream) = untracked();
    let data = stream.alloc_zeros::<u8>(4).unwrap();
    stream.begin_capture(LOCAL).unwrap();
    drop(data); // memory from outside cannot be freed inside
    assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_INVALID_VALUE);
    if simulated() {
        // A driver would make it the graph's memory; here that is refused, and said.
        assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        stream.begin_capture(LOCAL).unwrap();
        assert_eq!(refused(stream.alloc_zeros::<u8>(4)), CUDA_ERROR_NOT_SUPPORTED);
        assert_eq!(refused(stream.end_capture(PLAIN)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert_eq!(classes(device), [Class::Unsupported]);
    }
}

#[test]
fn graphs_and_what_they_need() {
    let (_, context, stream) = untracked();
    let mut data = stream.alloc_zeros::<u32>(4).unwrap();
    let f = function(&context, "increment");
    stream.begin_capture(LOCAL).unwrap();
    increment(&stream, &f, &mut data);
    let graph = stream.end_capture(PLAIN).unwrap().unwrap();
    let (raw, exec) = (graph.cu_graph(), graph.cu_graph_exec());
    drop(f); // its module is unloaded
    if simulated() {
        assert_eq!(refused(graph.launch()), CUDA_ERROR_INVALID_HANDLE);
    }
    drop(graph);
    assert_eq!(cu!(cuGraphLaunch(exec, stream.cu_stream())), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(cu!(cuGraphExecDestroy(exec)), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(cu!(cuGraphDestroy(raw)), CUDA_ERROR_INVALID_VALUE);
}
