//! Every instruction form against its table: files in `tests/forms`, values from the PTX ISA's text, never from an
//! implementation.
//!
//! Runs through unmodified cudarc: on the simulated device, or with SIMCUDA=0 on a real one. With
//! SIMCUDA_DUMP_PTX=folder the generated modules are written there, for ptxas.

#![allow(unsafe_code, reason = "kernels are launched: what they do to memory is theirs to say")]

#[path = "forms/format.rs"]
mod format;
#[path = "forms/ptx.rs"]
mod ptx;
#[path = "forms/value.rs"]
mod value;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::{env, fs, process};

use cudarc::driver::{CudaContext, CudaModule, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use format::{Form, Kind, Run};
use simcuda::{CpAsync, MmaModel, Policy, Schedule};
use value::{Expected, POISON, Tolerance, Type};

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/forms"))
}

fn forms() -> Vec<Form> {
    format::read(folder()).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// Launches one entry; returns the output buffer.
fn launch(
    module: &Arc<CudaModule>,
    context: &Arc<CudaContext>,
    number: usize,
    (blocks, threads): (u32, u32),
    input: &[u8],
    output_bytes: usize,
) -> Result<Vec<u8>, DriverError> {
    let stream = context.default_stream();
    let function = module.load_function(&ptx::entry(number))?;
    // Buffers of no bytes do not exist.
    let input = stream.clone_htod(if input.is_empty() { &[0][..] } else { input })?;
    let mut output = stream.clone_htod(&vec![POISON; output_bytes.max(1)])?;
    let shape =
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
    let mut arguments = stream.launch_builder(&function);
    // SAFETY: every generated entry takes these two buffers; that it stays within them is what its table says.
    unsafe { arguments.arg(&input).arg(&mut output).launch(shape) }?;
    stream.synchronize()?;
    stream.clone_dtoh(&output)
}

/// Compares results with what a line of the table expects.
fn compare(
    what: &str,
    expected: impl Iterator<Item = (usize, Type, Expected)>,
    got: &[u8],
    tolerance: Tolerance,
    failures: &mut Vec<String>,
) {
    for (i, (offset, ty, expected)) in expected.enumerate() {
        let mut bytes = [0; 8];
        bytes[..ty.bytes()].copy_from_slice(&got[offset..offset + ty.bytes()]);
        let got = u64::from_le_bytes(bytes);
        if !expected.admits(ty, got, tolerance) {
            let (expected, got) = (expected.show(ty), ty.show(got));
            failures.push(format!("{what}, result {i}: expected {expected}, got {got}"));
        }
    }
}

/// Runs every row of a form.
fn run(
    form: &Form,
    number: usize,
    module: &Arc<CudaModule>,
    context: &Arc<CudaContext>,
    failures: &mut Vec<String>,
) -> Result<(), DriverError> {
    let Form { place, name, .. } = form;
    let file = place.split(':').next().unwrap_or(place);
    match &form.kind {
        Kind::Registers { inputs, outputs, tolerance, rows, .. } => {
            let words = rows.iter().flat_map(|row| &row.inputs);
            let input: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
            let (threads, stride) = (rows.len() as u32, 8 * outputs.len());
            let got = launch(module, context, number, (1, threads), &input, stride * rows.len())?;
            for (row, got) in rows.iter().zip(got.chunks(stride)) {
                let given: Vec<_> =
                    row.inputs.iter().zip(inputs).map(|(v, ty)| ty.show(*v)).collect();
                let what = format!("{file}:{} {name} {}", row.line, given.join(", "));
                let results = row.outputs.iter().zip(outputs).enumerate();
                let expected = results.map(|(i, (expected, ty))| (8 * i, *ty, *expected));
                compare(&what, expected, got, *tolerance, failures);
            }
        }
        Kind::Body { threads, blocks, runs, .. } => {
            for run in runs.iter().filter(|run| run.fails.is_none()) {
                let bytes = run.output.iter().map(|(ty, _)| ty.bytes()).sum();
                let shape = (*blocks, *threads);
                let got = launch(module, context, number, shape, &run.input, bytes)?;
                let what = format!("{file}:{} {name}", run.line);
                let expected = run.output.iter().scan(0, |offset, (ty, expected)| {
                    let at = *offset;
                    *offset += ty.bytes();
                    Some((at, *ty, *expected))
                });
                compare(&what, expected, &got, Tolerance::EXACT, failures);
            }
        }
    }
    Ok(())
}

/// A device and, if its driver takes it, the module of all forms there.
struct Device {
    ordinal: usize,
    context: Arc<CudaContext>,
    whole: Result<Arc<CudaModule>, DriverError>,
}

impl Device {
    fn open(text: &str, policy: Policy) -> Self {
        let ordinal = simcuda::device();
        simcuda::set_policy(ordinal, policy);
        let context = CudaContext::new(ordinal).unwrap();
        let whole = context.load_module(Ptx::from_src(text));
        Self { ordinal, context, whole }
    }

    /// What the checks found, for messages.
    fn reports(&self) -> String {
        simcuda::reports(self.ordinal).iter().map(|report| format!("\n    {report}")).collect()
    }
}

/// Runs all tables and panics with everything that failed.
fn check(policy: Policy) {
    simcuda::install();
    let forms = forms();
    let mut failures = Vec::new();
    let mut lost = 0;
    for (target, text) in modules(&forms) {
        let mut device = Device::open(&text, policy);
        for (number, form) in numbered(&forms, target) {
            let mut fail = |what: &str, error| {
                let reports = device.reports();
                failures.push(format!("{} {}: {what}: {error:?}{reports}", form.place, form.name));
            };
            // If the driver refuses the module, it is asked form by form, to name the culprits and run the rest.
            let alone = || ptx::module([(number, form)], target);
            let load = |_| device.context.load_module(Ptx::from_src(alone()));
            let module = match device.whole.clone().or_else(load) {
                Ok(module) => module,
                Err(error) => {
                    fail("not loaded", error);
                    continue;
                }
            };
            let mut wrong = Vec::new();
            if let Err(error) = run(form, number, &module, &device.context, &mut wrong) {
                fail("not run", error);
                // Each takes a device with it.
                lost += 1;
                assert!(lost < 15, "{}\nand so on", failures.join("\n"));
                device = Device::open(&text, policy);
            }
            failures.append(&mut wrong);
        }
        simcuda::assert_clean(device.ordinal);
    }
    let (count, forms) = (failures.len(), forms.len());
    assert!(failures.is_empty(), "{}\n{count} failures in {forms} forms", failures.join("\n"));
}

fn numbered(forms: &[Form], target: u32) -> impl Iterator<Item = (usize, &Form)> {
    forms.iter().enumerate().filter(move |(_, form)| form.target == target)
}

/// A module per target; also written to a folder, if one is given.
fn modules(forms: &[Form]) -> [(u32, String); 2] {
    let modules = [80, 90].map(|target| (target, ptx::module(numbered(forms, target), target)));
    if let Ok(folder) = env::var("SIMCUDA_DUMP_PTX") {
        for (target, text) in &modules {
            fs::write(Path::new(&folder).join(format!("forms_sm_{target}.ptx")), text).unwrap();
        }
    }
    modules
}

#[test]
fn tables() {
    check(Policy::default());
}

#[test]
fn tables_in_turns() {
    // Not one block at a time: tables may wait for another block, as launches this small can on a device.
    let (schedule, cp_async, mma) = (Schedule::Quantum(1), CpAsync::Early, MmaModel::Exact);
    check(Policy { schedule, cp_async, mma, perturb: true, ..Policy::default() });
}

#[test]
fn tables_in_random_order() {
    let (schedule, mma) = (Schedule::Random, MmaModel::Truncated);
    check(Policy { schedule, mma, perturb: true, seed: 7, ..Policy::default() });
}

/// Launches that must fail, each in a process of its own: what they do to a device outlasts the context.
#[test]
fn failing_launches() {
    let mut failing = 0;
    for form in forms() {
        if failure(&form).is_none() {
            continue;
        }
        failing += 1;
        let child = process::Command::new(env::current_exe().unwrap())
            .args(["--exact", "one_failing_launch", "--ignored", "--nocapture"])
            .env("SIMCUDA_FORM", &form.place)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success() && said.contains("the launch failed as it must"),
            "{} {}: {}\n{said}{}",
            form.place,
            form.name,
            child.status,
            String::from_utf8_lossy(&child.stderr)
        );
    }
    assert!(failing > 0, "no table expects a failure");
}

/// The launch that must fail, and the class of the report.
fn failure(form: &Form) -> Option<(&Run, &str)> {
    let Kind::Body { runs, .. } = &form.kind else { return None };
    runs.iter().find_map(|run| Some((run, run.fails.as_deref()?)))
}

#[test]
#[ignore = "run by failing_launches, in a process of its own"]
fn one_failing_launch() {
    let place = env::var("SIMCUDA_FORM").expect("failing_launches names a form");
    let installed = simcuda::install();
    let forms = forms();
    let number = forms.iter().position(|form| form.place == place).unwrap();
    let form = &forms[number];
    let (run, class) = failure(form).unwrap();
    let Kind::Body { threads, blocks, .. } = form.kind else { unreachable!("it has launches") };
    let device = Device::open(&ptx::module([(number, form)], form.target), Policy::default());
    let module = device.whole.as_ref().unwrap();
    let result = launch(module, &device.context, number, (blocks, threads), &run.input, 128);
    let error = result.expect_err("the launch must fail");
    let classes: Vec<_> =
        simcuda::reports(device.ordinal).iter().map(|r| format!("{:?}", r.class)).collect();
    if installed == simcuda::Installed::Simulated {
        assert_eq!(classes, [class], "{error:?}");
    }
    println!("the launch failed as it must: {error:?}");
    // The context is lost: to unload it would only fail again.
    process::exit(0);
}

/// The instructions of a PTX text: opcodes with their modifiers.
fn opcodes(text: &str) -> BTreeSet<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or("").trim());
    let code: Vec<_> =
        code.filter(|line| !line.starts_with(".loc") && !line.starts_with(".file")).collect();
    let mut found = BTreeSet::new();
    for statement in code.join(" ").split(';') {
        let statement = statement.trim_start_matches(['{', '}', ' ', '\t']);
        // A directive, perhaps the head of a function with its first statement behind the brace.
        let statement =
            if statement.starts_with('.') { statement.rsplit('{').next() } else { Some(statement) };
        let mut words = statement.unwrap_or("").split_whitespace();
        let opcode = words.find(|word| !word.ends_with(':') && !word.starts_with('@'));
        found.extend(
            opcode
                .filter(|opcode| opcode.starts_with(|first: char| first.is_ascii_lowercase()))
                .map(str::to_string),
        );
    }
    found
}

#[test]
fn shipped_kernels_use_no_form_without_a_table() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels/ptx");
    let known: BTreeSet<_> = forms().into_iter().map(|form| form.name).collect();
    let mut missing = BTreeSet::new();
    let mut files = 0;
    for entry in fs::read_dir(&kernels).unwrap_or_else(|e| panic!("{}: {e}", kernels.display())) {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            files += 1;
            let used = opcodes(&fs::read_to_string(&path).unwrap());
            assert!(used.contains("ret"), "{}: no instruction was recognised", path.display());
            missing.extend(used.difference(&known).cloned());
        }
    }
    assert!(files > 0, "no PTX in {}", kernels.display());
    assert!(missing.is_empty(), "these forms have no table in tests/forms: {missing:#?}");
}

#[test]
fn opcodes_are_found() {
    let text = ".visible .entry k(\n\t.param .u64 k_param_0\n)\n.maxntid 32, 1, 1\n{\n\t.reg .b32 \t%r<2>;\n\
                $L__BB0_1:\n\t.loc 1 2 3\n\t@!%p1 bra \t$L__BB0_1;\n\tcp.async.wait_group 0;\n\t{ // callseq 0, 0\n\
                \tcall.uni (retval0), \n\tvprintf, \n\t(\n\tparam0\n\t);\n\tld.param.b32 \t%r1, [retval0+0];\n\t} // callseq 0\n\
                \tmov.b32 {%r1, %r2}, %rd1;\n\tret;\n\n}\n";
    let found: Vec<_> = opcodes(text).into_iter().collect();
    assert_eq!(found, ["bra", "call.uni", "cp.async.wait_group", "ld.param.b32", "mov.b32", "ret"]);
}
