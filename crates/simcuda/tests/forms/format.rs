//! The table files: one per instruction form, named after it. `#` begins a comment. A file has one or more sections,
//! each opened by a line `form`, all of the file's form:
//!
//! ```text
//! form add.s32 s32 s32 -> s32     register form: each row is a thread, its values by these types
//! within ulp 2                    optional: or `abs X`, `rel X`
//! code add.s32 %x, %a, %b;        optional: inputs are %a %b %c %d, results %x %y %z %w; this is the default
//! 1 2 -> 3
//!
//! form shfl.sync.bfly.b32         body form: a kernel
//! threads 32                      optional, as is `blocks 1`
//! module                          optional: declarations at module scope, `$` stands for a number of its own
//! body
//!     ld.global.u32 %r1, [%src];  %i is tid.x, %in and %out are the buffers, %src = %in + 4 i, %dst = %out + 4 i;
//!     st.global.u32 [%dst], %r1;  %p %h %r %rd %f %fd 0.. are declared
//! end
//! in u32 0..32                    words of the input buffer: ranges, `3*7` is 7 7 7
//! out u32 0..32                   and of the output buffer; or `fails Trap`; `in` again opens the next launch
//! ```
//!
//! `target 90` in a section raises `.target` from sm_80 where the ISA asks for it.

use std::fs;
use std::path::Path;

use super::value::{Expected, Tolerance, Type};

/// A section of a file.
#[derive(Debug)]
pub struct Form {
    /// `file:line` of its `form` line.
    pub place: String,
    pub name: String,
    pub target: u32,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    Registers {
        inputs: Vec<Type>,
        outputs: Vec<Type>,
        code: String,
        tolerance: Tolerance,
        rows: Vec<Row>,
    },
    Body {
        threads: u32,
        blocks: u32,
        module: String,
        body: String,
        runs: Vec<Run>,
    },
}

#[derive(Debug)]
pub struct Row {
    pub line: usize,
    pub inputs: Vec<u64>,
    pub outputs: Vec<Expected>,
}

/// One launch of a body.
#[derive(Debug, Default)]
pub struct Run {
    pub line: usize,
    pub input: Vec<u8>,
    pub output: Vec<(Type, Expected)>,
    /// The launch must fail, with a report of this class on a simulated device; nothing is compared.
    pub fails: Option<String>,
}

/// All sections of all files in a folder, or every mistake in them.
pub fn read(folder: &Path) -> Result<Vec<Form>, String> {
    let mut paths: Vec<_> = fs::read_dir(folder)
        .map_err(|error| format!("{}: {error}", folder.display()))?
        .map(|entry| entry.expect("a folder that could be opened").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    let (mut forms, mut mistakes) = (Vec::new(), Vec::new());
    for path in paths {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match fs::read_to_string(&path).map_err(|error| error.to_string()).and_then(|text| {
            let sections = parse(&file, &text)?;
            check(&file, &text, &sections)?;
            Ok(sections)
        }) {
            Ok(sections) => forms.extend(sections),
            Err(mistake) => mistakes.push(format!("{file}: {mistake}")),
        }
    }
    if mistakes.is_empty() { Ok(forms) } else { Err(mistakes.join("\n")) }
}

/// What a file must have beyond its grammar.
fn check(file: &str, text: &str, forms: &[Form]) -> Result<(), String> {
    if !text.starts_with("# ") {
        return Err("does not open with a comment that says what the form does".into());
    }
    if forms.is_empty() {
        return Err("has no section".into());
    }
    for Form { place, name, kind, .. } in forms {
        if format!("{name}.txt") != file {
            return Err(format!("{place}: `{name}` is not the file's name"));
        }
        let (code, empty) = match kind {
            Kind::Registers { code, rows, .. } => (code, rows.is_empty()),
            Kind::Body { body, runs, .. } => (
                body,
                runs.is_empty() || runs.iter().any(|r| r.output.is_empty() != r.fails.is_some()),
            ),
        };
        if empty {
            return Err(format!("{place}: has no rows, or a launch that expects nothing"));
        }
        if !code.split([' ', '\t', '\n', ';']).any(|word| word == name) {
            return Err(format!("{place}: does not execute `{name}`"));
        }
    }
    Ok(())
}

/// The sections of one file.
pub fn parse(file: &str, text: &str) -> Result<Vec<Form>, String> {
    let mut forms: Vec<Form> = Vec::new();
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split_once('#').map_or(line, |(code, _)| code).trim_end()));
    while let Some((line, content)) = lines.next() {
        let content = content.trim();
        let (word, rest) = content.split_once(' ').unwrap_or((content, ""));
        let at = |message: String| format!("line {line}: {message}");
        let number = || rest.parse().map_err(|_| at(format!("`{rest}` is no number")));
        if word == "form" {
            forms.push(open(format!("{file}:{line}"), rest).map_err(at)?);
            continue;
        }
        if word.is_empty() {
            continue;
        }
        let Some(form) = forms.last_mut() else {
            return Err(at("expected a `form` line first".into()));
        };
        match (&mut form.kind, word) {
            (_, "target") => form.target = number()?,
            (Kind::Registers { code, .. }, "code") => *code = rest.into(),
            (Kind::Registers { tolerance, .. }, "within") => {
                *tolerance = Tolerance::parse(rest)
                    .ok_or_else(|| at(format!("`{rest}` is no tolerance")))?;
            }
            (Kind::Registers { inputs, outputs, rows, .. }, _) => {
                rows.push(row(line, content, inputs, outputs).map_err(at)?);
            }
            (Kind::Body { threads, .. }, "threads") => *threads = number()?,
            (Kind::Body { blocks, .. }, "blocks") => *blocks = number()?,
            (Kind::Body { module, body, .. }, "module" | "body") => {
                let mut into = if word == "module" { module } else { &mut *body };
                loop {
                    match lines.next().ok_or_else(|| at("`end` is missing".into()))?.1 {
                        "end" => break,
                        "body" => into = body,
                        code => *into += &format!("{code}\n"),
                    }
                }
            }
            (Kind::Body { runs, .. }, "in") => {
                if runs.last().is_none_or(|run| run.fails.is_some() || !run.output.is_empty()) {
                    runs.push(Run { line, ..Run::default() });
                }
                let run = runs.last_mut().expect("just pushed");
                let (ty, words) = words(rest).map_err(at)?;
                for text in words {
                    let value = ty.value(&text).map_err(at)?;
                    run.input.extend(&value.to_le_bytes()[..ty.bytes()]);
                }
            }
            (Kind::Body { runs, .. }, "out" | "fails") => {
                if runs.is_empty() {
                    runs.push(Run { line, ..Run::default() });
                }
                let run = runs.last_mut().expect("not empty");
                if word == "fails" {
                    run.fails = Some(rest.into());
                    continue;
                }
                let (ty, words) = words(rest).map_err(at)?;
                for text in words {
                    run.output.push((ty, Expected::parse(ty, &text).map_err(at)?));
                }
            }
            (Kind::Body { .. }, _) => return Err(at(format!("`{word}` is not known here"))),
        }
    }
    Ok(forms)
}

fn open(place: String, rest: &str) -> Result<Form, String> {
    let (name, signature) = rest.split_once(' ').unwrap_or((rest, ""));
    let (name, target) = (name.to_string(), 80);
    let Some((inputs, outputs)) = signature.split_once("->") else {
        if !signature.is_empty() {
            return Err(format!("expected `types -> types`, found `{signature}`"));
        }
        let (module, body) = (String::new(), String::new());
        let kind = Kind::Body { threads: 32, blocks: 1, module, body, runs: Vec::new() };
        return Ok(Form { place, name, target, kind });
    };
    let types = |text: &str| -> Result<Vec<Type>, String> {
        let parse = |name| Type::parse(name).ok_or_else(|| format!("`{name}` is no type"));
        text.split_whitespace().map(parse).collect()
    };
    let (inputs, outputs) = (types(inputs)?, types(outputs)?);
    if inputs.len() > 4 || outputs.len() > 4 || outputs.is_empty() {
        return Err("expected up to four inputs, one to four results".into());
    }
    let operands: Vec<_> = ["%x", "%y", "%z", "%w"][..outputs.len()]
        .iter()
        .chain(&["%a", "%b", "%c", "%d"][..inputs.len()])
        .copied()
        .collect();
    let code = format!("{name} {};", operands.join(", "));
    let kind =
        Kind::Registers { inputs, outputs, code, tolerance: Tolerance::EXACT, rows: Vec::new() };
    Ok(Form { place, name, target, kind })
}

fn row(line: usize, text: &str, inputs: &[Type], outputs: &[Type]) -> Result<Row, String> {
    let (given, expected) = text.split_once("->").ok_or("expected `inputs -> results`")?;
    let given: Vec<_> = given.split_whitespace().collect();
    let expected: Vec<_> = expected.split_whitespace().collect();
    if (given.len(), expected.len()) != (inputs.len(), outputs.len()) {
        return Err(format!("expected {} -> {} values", inputs.len(), outputs.len()));
    }
    Ok(Row {
        line,
        inputs: given.iter().zip(inputs).map(|(v, ty)| ty.value(v)).collect::<Result<_, _>>()?,
        outputs: expected
            .iter()
            .zip(outputs)
            .map(|(v, ty)| Expected::parse(*ty, v))
            .collect::<Result<_, _>>()?,
    })
}

/// A type and values, with ranges and repetitions written out.
fn words(text: &str) -> Result<(Type, Vec<String>), String> {
    let mut words = text.split_whitespace();
    let ty = words.next().and_then(Type::parse).ok_or("expected a type, then values")?;
    let mut all = Vec::new();
    for word in words {
        if let Some((first, end)) = word.split_once("..") {
            let bound = |t: &str| t.parse::<i64>().map_err(|_| format!("`{word}` is no range"));
            all.extend((bound(first)?..bound(end)?).map(|value| value.to_string()));
        } else if let Some((count, value)) = word.split_once('*') {
            let count = count.parse().map_err(|_| format!("`{word}` is no repetition"))?;
            all.extend(std::iter::repeat_n(value.to_string(), count));
        } else {
            all.push(word.into());
        }
    }
    Ok((ty, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(text: &str) -> String {
        let parsed = parse("add.s32.txt", text);
        parsed.and_then(|forms| check("add.s32.txt", text, &forms)).unwrap_err()
    }

    #[test]
    fn malformed_files_are_refused() {
        let head = "# Adds.\nform add.s32 s32 s32 -> s32\n";
        for (text, expected) in [
            ("form add.s32 s32 s32 -> s32\n1 2 -> 3\n".into(), "comment"),
            ("# Adds.\n".into(), "no section"),
            ("# Adds.\n1 2 -> 3\n".into(), "`form` line first"),
            (head.to_string(), "no rows"),
            (format!("{head}1 -> 3\n"), "expected 2 -> 1 values"),
            (format!("{head}1 2 = 3\n"), "expected `inputs -> results`"),
            (format!("{head}1 2 -> 4294967296\n"), "is no Int"),
            (format!("{head}within 2\n1 2 -> 3\n"), "no tolerance"),
            (format!("{head}code sub.s32 %x, %a, %b;\n1 2 -> 3\n"), "does not execute"),
            ("# Adds.\nform add.s64 s64 s64 -> s64\n1 2 -> 3\n".into(), "not the file's name"),
            ("# Adds.\nform add.s32 s31 -> s32\n".into(), "no type"),
            ("# Adds.\nform add.s32\nbody\nadd.s32 %r0, %r0, 1;\n".into(), "`end` is missing"),
            ("# Adds.\nform add.s32\nbody\n add.s32 \nend\nin u32 1\n".into(), "expects nothing"),
            ("# Adds.\nform add.s32\nbody\n add.s32 \nend\n".into(), "no rows"),
            ("# Adds.\nform add.s32\nsize 3\n".into(), "not known"),
        ] {
            let mistake = mistake(&text);
            assert!(mistake.contains(expected), "{text:?}: {mistake}");
        }
    }

    #[test]
    fn bodies_have_launches() {
        let text = "# A\nform add.s32\nthreads 2\nmodule\n.global .u32 g$;\nbody\n  add.s32 ;\nend\n\
                    in u8 1 2*255\nin u16 3\nout u32 0..2 _\nin u32 7\nout u32 1\nout f32 nan\nfails Trap\n";
        let forms = parse("add.s32.txt", text).unwrap();
        let Kind::Body { threads, module, body, runs, .. } = &forms[0].kind else { panic!() };
        assert_eq!(
            (*threads, module.as_str(), body.as_str()),
            (2, ".global .u32 g$;\n", "  add.s32 ;\n")
        );
        assert_eq!(runs[0].input, [1, 255, 255, 3, 0]);
        assert_eq!(
            runs[0].output.iter().map(|o| o.1).collect::<Vec<_>>(),
            [Expected::Bits(0), Expected::Bits(1), Expected::Untouched]
        );
        assert_eq!(
            (runs.len(), runs[1].output.len(), runs[1].fails.as_deref()),
            (2, 2, Some("Trap"))
        );
    }
}
