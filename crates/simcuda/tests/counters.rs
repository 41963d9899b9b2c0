//! Golden counters: small kernels whose counts were worked out by hand. Tolerance 0, under every schedule.
#![allow(unsafe_code, reason = "kernels are launched: what they do to memory is theirs to say")]

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use simcuda::{Counters, Installed, Policy, Schedule};

thread_local! {
    /// One device for all launches of a test.
    static DEVICE: usize = simcuda::device();
}

/// Launches a kernel that begins with %i = tid.x, %n = the thread's number in the grid, %in and %out, two buffers of
/// 64 KiB. Its preamble is 12 instructions, its end one. The counters are the same under every schedule.
fn count(blocks: u32, threads: u32, body: &str) -> Option<Counters> {
    if simcuda::install() == Installed::RealDriver {
        eprintln!("not run: a real device has no such counters");
        return None;
    }
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<32>, %i, %n;
    .reg .f32 %f<16>;
    .reg .b64 %rd<16>, %in, %out;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    cvta.to.global.u64 %in, %in;
    cvta.to.global.u64 %out, %out;
    mov.u32 %i, %tid.x;
    mov.u32 %n, %ctaid.x;
    mov.u32 %r0, %ntid.x;
    mad.lo.s32 %n, %n, %r0, %i;
    mov.u32 %r1, 1;
    mov.f32 %f0, 0f3F800000;
    mul.lo.s32 %r2, %r1, 3;
    add.f32 %f1, %f0, %f0;
{body}
    ret;
}}
"
    );
    let schedules = [Schedule::InOrder, Schedule::Quantum(3), Schedule::OneBlock, Schedule::Random];
    let counters = schedules.map(|schedule| {
        let device = DEVICE.with(|device| *device);
        simcuda::clear_counters(device);
        simcuda::set_policy(device, Policy { schedule, seed: 5, ..Policy::default() });
        let context = CudaContext::new(device).unwrap();
        let stream = context.default_stream();
        let module = context.load_module(Ptx::from_src(text.as_str())).unwrap();
        let function = module.load_function("kernel").unwrap();
        let input = stream.clone_htod(&[0u8; 1 << 16]).unwrap();
        let mut output = stream.clone_htod(&[0u8; 1 << 16]).unwrap();
        let shape = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut arguments = stream.launch_builder(&function);
        // SAFETY: the kernel takes these two buffers; the simulator checks that it stays within them.
        unsafe { arguments.arg(&input).arg(&mut output).launch(shape) }.unwrap();
        stream.synchronize().unwrap();
        simcuda::assert_clean(device);
        let (launches, counters) = simcuda::counters(device, "kernel");
        assert_eq!(launches, 1);
        counters
    });
    for other in &counters[1..] {
        assert_eq!(*other, counters[0]);
    }
    let [counters, ..] = counters;
    assert_eq!(counters.blocks, blocks.into());
    assert_eq!(counters.threads, (blocks * threads).into());
    Some(counters)
}

/// Requests, sectors, bytes, ideal sectors of loads; each thread loads at `stride` times its number plus `offset`.
fn loads(instruction: &str, stride: u32, offset: u32) -> Option<[u64; 4]> {
    let body = format!(
        "mul.wide.u32 %rd0, %n, {stride};\nadd.s64 %rd1, %in, %rd0;\n{instruction} [%rd1+{offset}];"
    );
    let counters = count(2, 64, &body)?;
    assert_eq!(counters.global_store, Default::default());
    assert_eq!(counters.warp_instructions.global_load, 4);
    let count = counters.global_load;
    Some([count.requests, count.sectors, count.bytes, count.ideal_sectors])
}

#[test]
fn a_copy() {
    let Some(counters) = count(
        3,
        64,
        "mul.wide.u32 %rd0, %n, 4;
         add.s64 %rd1, %in, %rd0;
         add.s64 %rd2, %out, %rd0;
         ld.global.f32 %f2, [%rd1];
         st.global.f32 [%rd2], %f2;",
    ) else {
        return;
    };
    // Six warps of 18 instructions: 2 parameters, 2 cvta, 5 mov, 2 + 3 integer, 1 float, 1 load, 1 store, ret.
    let warp = &counters.warp_instructions;
    assert_eq!(warp.total, 6 * 18);
    assert_eq!([warp.constant, warp.moves, warp.integer, warp.float], [12, 42, 30, 6]);
    assert_eq!([warp.global_load, warp.global_store, warp.control], [6, 6, 6]);
    assert_eq!(counters.thread_instructions.total, 32 * 6 * 18);
    for access in [&counters.global_load, &counters.global_store] {
        assert_eq!(
            [access.requests, access.sectors, access.bytes, access.ideal_sectors],
            [6, 24, 768, 24]
        );
    }
    assert_eq!((counters.dram_read_sectors, counters.dram_write_sectors), (24, 24));
    assert_eq!((counters.barriers, counters.divergent_branches), (0, 0));
}

#[test]
fn a_partial_warp() {
    let body = "mul.wide.u32 %rd0, %i, 8; add.s64 %rd0, %out, %rd0; st.global.u32 [%rd0], %r1;";
    let Some(counters) = count(1, 40, body) else { return };
    assert_eq!(counters.warp_instructions.total, 2 * 16);
    assert_eq!(counters.thread_instructions.total, 40 * 16);
    let store = &counters.global_store;
    assert_eq!([store.requests, store.sectors, store.bytes, store.ideal_sectors], [2, 10, 160, 5]);
    assert_eq!(counters.dram_write_sectors, 10);
}

#[test]
fn global_patterns() {
    let Some(coalesced) = loads("ld.global.u32 %r4,", 4, 0) else { return };
    assert_eq!(coalesced, [4, 16, 512, 16]);
    assert_eq!(loads("ld.global.v2.u32 {%r4, %r5},", 8, 0).unwrap(), [4, 32, 1024, 32]);
    assert_eq!(loads("ld.global.v4.u32 {%r4, %r5, %r6, %r7},", 16, 0).unwrap(), [4, 64, 2048, 64]);
    assert_eq!(loads("ld.global.u8 %r4,", 1, 0).unwrap(), [4, 4, 128, 4]);
    assert_eq!(loads("ld.global.u32 %r4,", 8, 0).unwrap(), [4, 32, 512, 16], "stride 2");
    assert_eq!(loads("ld.global.u32 %r4,", 128, 0).unwrap(), [4, 128, 512, 16], "a row each");
    assert_eq!(loads("ld.global.u32 %r4,", 4, 4).unwrap(), [4, 20, 512, 16], "one word off");
    assert_eq!(loads("ld.global.nc.u32 %r4,", 0, 64).unwrap(), [4, 4, 16, 4], "broadcast");
}

/// Wavefronts and ideal wavefronts of one warp's loads from shared memory.
fn shared(instruction: &str, stride: u32) -> Option<[u64; 2]> {
    let body = format!(
        ".shared .align 16 .b8 tile[16384];
         mov.u32 %r3, tile;
         mad.lo.s32 %r4, %i, 4, %r3;
         mov.u32 %r5, 0;
fill:
         st.shared.u32 [%r4], %r5;
         add.s32 %r4, %r4, 128;
         add.s32 %r5, %r5, 1;
         setp.lt.u32 %p0, %r5, 128;
         @%p0 bra fill;
         bar.sync 0;
         mad.lo.s32 %r6, %i, {stride}, %r3;
         {instruction} [%r6];"
    );
    let counters = count(1, 32, &body)?;
    let stores = &counters.shared_store;
    assert_eq!([stores.requests, stores.wavefronts, stores.ideal_wavefronts], [128; 3]);
    assert_eq!((counters.shared_load.requests, counters.barriers), (1, 1));
    // The loop's branch is taken by all lanes or by none.
    assert_eq!(counters.divergent_branches, 0);
    Some([counters.shared_load.wavefronts, counters.shared_load.ideal_wavefronts])
}

#[test]
fn bank_conflicts() {
    let Some(rows) = shared("ld.shared.u32 %r8,", 4) else { return };
    assert_eq!(rows, [1, 1]);
    assert_eq!(shared("ld.shared.u32 %r8,", 0).unwrap(), [1, 1], "broadcast");
    assert_eq!(shared("ld.shared.u32 %r8,", 8).unwrap(), [2, 1], "stride 2");
    assert_eq!(shared("ld.shared.u32 %r8,", 128).unwrap(), [32, 1], "a column");
    assert_eq!(shared("ld.shared.u32 %r8,", 132).unwrap(), [1, 1], "a padded column");
    assert_eq!(shared("ld.shared.v2.u32 {%r8, %r9},", 8).unwrap(), [2, 2]);
    assert_eq!(shared("ld.shared.v4.u32 {%r8, %r9, %r10, %r11},", 16).unwrap(), [4, 4]);
    assert_eq!(shared("ld.shared.v4.u32 {%r8, %r9, %r10, %r11},", 256).unwrap(), [32, 4]);
    let ldmatrix = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11},";
    assert_eq!(shared(ldmatrix, 256).unwrap(), [32, 4], "rows of 128 two-byte elements");
    assert_eq!(shared(ldmatrix, 272).unwrap(), [4, 4], "the same, padded");
}

#[test]
fn atomics_at_one_address() {
    let atomic = |divisor: u32| {
        let body = format!(
            ".shared .align 4 .b32 cells[64];
             mov.u32 %r3, cells;
             mad.lo.s32 %r4, %i, 4, %r3;
             st.shared.u32 [%r4], 0;
             bar.sync 0;
             div.u32 %r5, %i, {divisor};
             mad.lo.s32 %r6, %r5, 4, %r3;
             red.shared.add.u32 [%r6], 1;
             mul.wide.u32 %rd0, %r5, 4;
             add.s64 %rd0, %out, %rd0;
             atom.global.add.u32 %r7, [%rd0], 1;"
        );
        count(2, 64, &body).map(|c| {
            assert_eq!(c.warp_instructions.atomic, 8);
            [&c.global_atomic, &c.shared_atomic].map(|a| [a.requests, a.serial, a.sectors])
        })
    };
    let Some(own) = atomic(1) else { return };
    assert_eq!(own, [[4, 4, 16], [4, 4, 0]]);
    assert_eq!(atomic(64).unwrap(), [[4, 128, 4], [4, 128, 0]]);
    // Lanes 0 to 19, 20 to 31; 32 to 39, 40 to 59, 60 to 63.
    assert_eq!(atomic(20).unwrap(), [[4, 80, 4], [4, 80, 0]]);
}

#[test]
fn divergence() {
    let branch = |bound: u32| {
        let body = format!(
            "setp.ge.u32 %p0, %i, {bound};
             @%p0 bra high;
             add.s32 %r4, %r1, 1;
             add.s32 %r4, %r4, 1;
             add.s32 %r4, %r4, 1;
             bra.uni join;
high:
             add.s32 %r4, %r1, 9;
join:
             bar.sync 0;
             add.s32 %r5, %r4, 1;"
        );
        count(1, 64, &body).map(|c| {
            assert_eq!(c.barriers, 2);
            assert_eq!(c.warp_instructions.sync, 2);
            (c.divergent_branches, c.warp_instructions.total, c.thread_instructions.total)
        })
    };
    // Per warp 12 + 2, then 4 low or 1 high, then 3; a warp that parts issues both arms. The low lanes do not count
    // at the branch: its guard is false.
    let Some(whole_warps) = branch(32) else { return };
    assert_eq!(whole_warps, (0, 2 * 17 + 4 + 1, 64 * 17 - 32 + 32 * 4 + 32));
    assert_eq!(branch(64).unwrap(), (0, 2 * 17 + 4 + 4, 64 * 17 - 64 + 64 * 4));
    assert_eq!(branch(8).unwrap(), (1, 2 * 17 + 5 + 1, 64 * 17 - 8 + 8 * 4 + 56));
}

#[test]
fn asynchronous_copies_and_mma() {
    let Some(counters) = count(
        1,
        32,
        ".shared .align 16 .b8 tile[1024];
         mov.u32 %r3, tile;
         mad.lo.s32 %r3, %i, 16, %r3;
         mul.wide.u32 %rd0, %i, 16;
         add.s64 %rd0, %in, %rd0;
         cp.async.cg.shared.global [%r3], [%rd0], 16;
         cp.async.cg.shared.global [%r3+512], [%rd0], 16, 0;
         cp.async.commit_group;
         cp.async.wait_group 0;
         bar.sync 0;
         ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];
         mov.f32 %f2, 0f00000000;
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
             {%f4, %f5, %f6, %f7}, {%r4, %r5, %r6, %r7}, {%r4, %r5}, {%f2, %f2, %f2, %f2};",
    ) else {
        return;
    };
    assert_eq!((counters.cp_async, counters.warp_instructions.asynchronous), (2, 4));
    // The second copy reads nothing: its source size is 0.
    assert_eq!((counters.global_load.requests, counters.global_load.sectors), (1, 16));
    let stores = &counters.shared_store;
    assert_eq!([stores.requests, stores.wavefronts, stores.ideal_wavefronts], [2, 8, 8]);
    assert_eq!((counters.shared_load.requests, counters.shared_load.wavefronts), (1, 4));
    assert_eq!((counters.mma, counters.mma_flops), (1, 2 * 16 * 8 * 16));
    assert_eq!((counters.warp_instructions.mma, counters.warp_instructions.shared_load), (1, 1));
    assert_eq!((counters.dram_read_sectors, counters.dram_write_sectors), (16, 0));
}
