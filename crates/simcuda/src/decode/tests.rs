//! What loads and what is refused: each refusal names the line, what was expected and what came.

use crate::ptx::Module;

/// A kernel around some instructions, with a register or two of each type. The instructions start at line 14.
fn load(body: &str) -> Result<Module, String> {
    let text = format!(
        ".version 8.0
.target sm_80
.address_size 64
.global .align 4 .u32 counter = 7;
.visible .entry kernel(.param .u64 kernel_param_0)
{{
.reg .pred %p<4>;
.reg .b16 %rs<4>;
.reg .b32 %r<8>;
.reg .f32 %f<8>;
.reg .b64 %rd<8>;
.reg .f64 %fd<4>;
.shared .align 16 .b8 tile[64];
{body}
ret;
}}"
    );
    Module::load(&text).map_err(|error| error.to_string())
}

#[track_caller]
fn refused(body: &str, parts: &[&str]) {
    let error = load(body).expect_err(body);
    for part in parts {
        assert!(error.contains(part), "`{part}` expected in: {error}");
    }
}

#[test]
fn operands_fit_their_instructions() {
    for body in [
        "add.s32 %r0, %r1, -5;",
        "add.f32 %f0, %f1, 0f3F800000;",
        "and.b32 %r0, %r1, 0xff;",
        "mov.b32 %r0, %f1;",
        // Untyped registers take every type of their size.
        "add.f32 %f0, %r1, %f2;",
        "mul.wide.s32 %rd0, %r1, 4;",
        "cvt.u64.u32 %rd0, %r1;",
        "cvt.u32.u16 %r0, %rs1;",
        "ld.shared.f32 %f0, [%r1];",
        "ld.shared.f32 %f0, [%rd1+4];",
        "ld.shared.v2.u32 {%r0, %r1}, [tile+8];",
        "ld.global.u8 %rs0, [%rd1];",
        "ld.global.u8 %r0, [%rd1];",
        "mov.u64 %rd0, counter;",
        "mov.u64 %rd0, tile+16;",
        "mov.b64 {%r0, _}, %rd1;",
        "setp.lt.and.f32 %p0|%p1, %f0, %f1, !%p2;",
        "@!%p0 bra end; end:",
        "shfl.sync.bfly.b32 %r0|%p0, %r1, 1, 31, -1;",
    ] {
        load(body).expect(body);
    }
    for (body, parts) in [
        ("add.s32 %r0, %f1, %r2;", &["a register of .s32, got `%f1` of .f32"][..]),
        ("add.f32 %f0, %fd1, %f2;", &["a register of .f32, got `%fd1` of .f64"]),
        ("add.s32 %r0, %rd1, %r2;", &["`%rd1` of .b64"]),
        ("add.s32 %r0, %r1, 0f3F800000;", &["a literal of .s32"]),
        ("add.f32 %f0, %f1, 1;", &["a literal of .f32"]),
        ("add.s32 %r0, %p1, %r2;", &["`%p1` of .pred"]),
        ("add.s32 %r0, %r1;", &["operands, got 2"]),
        ("ld.global.f32 %f0, [%r1];", &["an address register, got `%r1` of .b32"]),
        ("ld.global.v2.f32 {%f0, %f1, %f2}, [%rd1];", &["2 registers, got 3"]),
        ("st.param.u32 [kernel_param_0], %r1;", &["a writable state space"]),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", &["16 bytes with .cg"]),
        ("setp.lt.f32 %r0, %f0, %f1;", &["a predicate register, got `%r0`"]),
        ("mov.u32 %r0, %nothing;", &["known special register, got `%nothing`"]),
        ("bar.arrive 1;", &["a thread count with `arrive`"]),
    ] {
        refused(body, parts);
    }
}

#[test]
fn what_is_unknown_is_refused_with_its_line() {
    for (body, parts) in [
        ("frobnicate.u32 %r0, %r1;", &["PTX line 14", "`frobnicate.u32`"][..]),
        ("add.s32 %r0, %r1, %r2;\nadd.sideways.s32 %r0, %r1, %r2;", &["PTX line 15", "sideways"]),
        ("ld.global.purple.u32 %r0, [%rd1];", &["`.purple`"]),
        ("bra nowhere;", &["a label of kernel, got `nowhere`"]),
        ("call.uni frobnicate;", &["the function `frobnicate`"]),
        ("wgmma.fence.sync.aligned;", &["unsupported", "wgmma"]),
        (".surfref s;", &["unsupported directive `.surfref`"]),
        ("add.s32 %r0, %r1, %r2", &["expected `,`"]),
        ("brx.idx %r0, table;", &["unsupported", "brx"]),
    ] {
        refused(body, parts);
    }
    let error = Module::load(".version 8.0\n.target sm_80\n.address_size 32\n").unwrap_err();
    assert_eq!((error.line, error.message.contains("`.address_size 64`, got 32")), (3, true));
    assert!(Module::load("").unwrap_err().message.contains("`.version`"));
}

#[test]
fn functions_are_inlined_but_not_into_themselves() {
    let module = |callee: &str| {
        Module::load(&format!(
            ".version 8.0\n.target sm_80\n.address_size 64
.func (.param .b32 out) twice(.param .b32 in)
{{ .reg .b32 %r<4>; ld.param.b32 %r0, [in]; {callee} add.s32 %r1, %r0, %r0; st.param.b32 [out], %r1; ret; }}
.visible .entry kernel()
{{ .reg .b32 %r<4>;
{{ .param .b32 a; .param .b32 b; st.param.b32 [a], 4; call.uni (b), twice, (a); ld.param.b32 %r0, [b]; }}
ret; }}"
        ))
    };
    module("").unwrap();
    let recursion = "{ .param .b32 a; .param .b32 b; call.uni (b), twice, (a); }";
    assert!(module(recursion).unwrap_err().message.contains("recursion into `twice`"));
}

#[test]
fn shared_variables_keep_their_banks_and_their_distance() {
    let module = Module::load(
        ".version 8.0\n.target sm_80\n.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel()
{ .reg .b32 %r<4>;
.shared .align 4 .b8 first[20];
.shared .align 8 .b8 second[40];
mov.u32 %r0, dynamic; mov.u32 %r1, first; mov.u32 %r2, second;
ret; }",
    )
    .unwrap();
    let kernel = &module.kernels[0];
    // 20, padded to 24, and 40.
    assert_eq!(kernel.shared_bytes, 64);
    let [first, second] = &kernel.code.shared[..] else { panic!("two variables") };
    assert_eq!((first.offset % 128, second.offset % 128), (0, 24));
    assert!(second.offset - (first.offset + first.bytes) >= 128);
    assert_eq!(kernel.code.shared_end % 128, 64);
    assert!(kernel.code.shared_end - (second.offset + second.bytes) >= 128);
}
