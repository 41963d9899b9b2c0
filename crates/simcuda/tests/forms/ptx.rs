//! Table sections to PTX modules.

use std::fmt::Write;

use super::format::{Form, Kind};
use super::value::Type;

/// The entry of the form with this number.
pub fn entry(number: usize) -> String {
    format!("form_{number}")
}

/// A module with an entry for each of these forms; all ask for the same target.
pub fn module<'a>(forms: impl IntoIterator<Item = (usize, &'a Form)>, target: u32) -> String {
    let mut text = format!(".version 8.0\n.target sm_{target}\n.address_size 64\n");
    for (number, form) in forms {
        let name = entry(number);
        write!(text, "\n// {} ({})\n", form.name, form.place).expect("writing to a string");
        text += &match &form.kind {
            Kind::Registers { inputs, outputs, code, .. } => {
                registers(&name, inputs, outputs, code)
            }
            Kind::Body { module, body, .. } => {
                let number = number.to_string();
                kernel(&module.replace('$', &number), &name, &body.replace('$', &number))
            }
        };
    }
    text
}

/// Each thread loads its row from `in`, executes and stores to `out`; values lie 8 bytes apart.
fn registers(name: &str, inputs: &[Type], outputs: &[Type], code: &str) -> String {
    let mut body = String::new();
    let line = |body: &mut String, text: String| *body += &format!("    {text}\n");
    let named = |names: &'static [&str], types: &[Type]| -> Vec<(&'static str, Type)> {
        names.iter().copied().zip(types.iter().copied()).collect()
    };
    let inputs = named(&["a", "b", "c", "d"], inputs);
    let outputs = named(&["x", "y", "z", "w"], outputs);
    for (name, ty) in inputs.iter().chain(&outputs) {
        let register = if *ty == Type::Pred { "pred".into() } else { ty.register() };
        line(&mut body, format!(".reg .{register} %{name};"));
    }
    line(&mut body, format!("mad.wide.u32 %in, %i, {}, %in;", 8 * inputs.len()));
    line(&mut body, format!("mad.wide.u32 %out, %i, {}, %out;", 8 * outputs.len()));
    for (i, (name, ty)) in inputs.iter().enumerate() {
        if *ty == Type::Pred {
            line(&mut body, format!("ld.global.b32 %r0, [%in+{}];", 8 * i));
            line(&mut body, format!("setp.ne.s32 %{name}, %r0, 0;"));
        } else {
            line(&mut body, format!("ld.global.{} %{name}, [%in+{}];", ty.register(), 8 * i));
        }
    }
    line(&mut body, code.into());
    for (i, (name, ty)) in outputs.iter().enumerate() {
        if *ty == Type::Pred {
            line(&mut body, format!("selp.b32 %r0, 1, 0, %{name};"));
            line(&mut body, format!("st.global.b32 [%out+{}], %r0;", 8 * i));
        } else {
            line(&mut body, format!("st.global.{} [%out+{}], %{name};", ty.register(), 8 * i));
        }
    }
    kernel("", name, &body)
}

fn kernel(module: &str, name: &str, body: &str) -> String {
    format!(
        "{module}.visible .entry {name}(.param .u64 {name}_in, .param .u64 {name}_out)
{{
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<16>;
    .reg .f32 %f<32>;
    .reg .f64 %fd<8>;
    .reg .b32 %i;
    .reg .b64 %in, %out, %src, %dst;
    ld.param.u64 %in, [{name}_in];
    ld.param.u64 %out, [{name}_out];
    cvta.to.global.u64 %in, %in;
    cvta.to.global.u64 %out, %out;
    mov.u32 %i, %tid.x;
    mul.wide.u32 %dst, %i, 4;
    add.s64 %src, %in, %dst;
    add.s64 %dst, %out, %dst;
{body}    ret;
}}
"
    )
}
