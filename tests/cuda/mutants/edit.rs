//! Edits of PTX text that fit exactly or not at all.

use std::ops::Range;

/// `find` in one kernel's text, and what stands there instead. `$1` to `$9` are one operand each.
pub struct Edit {
    pub kernel: &'static str,
    pub find: &'static str,
    pub with: &'static str,
    /// Which of the occurrences are edited, and how many there must be.
    pub which: Range<usize>,
    pub of: usize,
}

pub fn apply(ptx: &str, edits: &[Edit]) -> Result<String, String> {
    let mut text = ptx.to_owned();
    for edit in edits {
        let start = text
            .find(&format!(".entry {}(", edit.kernel))
            .ok_or_else(|| format!("no kernel {}", edit.kernel))?;
        let end = start + text[start..].find("\n}\n").ok_or("a kernel without an end")?;
        let found = matches(&text[start..end], edit.find);
        if found.len() != edit.of || edit.which.end > edit.of || edit.which.is_empty() {
            return Err(format!(
                "`{}` expected {} times in {}, found {}",
                edit.find,
                edit.of,
                edit.kernel,
                found.len()
            ));
        }
        // From the last to the first, so that places stay valid.
        for (place, operands) in found[edit.which.clone()].iter().rev() {
            let mut with = edit.with.to_owned();
            for (i, operand) in operands.iter().enumerate() {
                with = with.replace(&format!("${}", i + 1), operand);
            }
            text.replace_range(start + place.start..start + place.end, &with);
        }
    }
    Ok(text)
}

/// Places where a pattern matches, without overlap, and the operands there.
fn matches(text: &str, pattern: &str) -> Vec<(Range<usize>, Vec<String>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < text.len() {
        match match_at(text, at, pattern) {
            Some((end, operands)) => {
                found.push((at..end, operands));
                at = end;
            }
            None => at += 1,
        }
    }
    found
}

fn match_at(text: &str, at: usize, pattern: &str) -> Option<(usize, Vec<String>)> {
    let (text, mut at, mut operands) = (text.as_bytes(), at, Vec::<String>::new());
    let run = |at: usize, belongs: fn(&u8) -> bool| {
        at + text[at..].iter().take_while(|&c| belongs(c)).count()
    };
    let mut pattern = pattern.bytes();
    while let Some(expected) = pattern.next() {
        let end = match expected {
            b' ' => run(at, u8::is_ascii_whitespace),
            b'$' => run(at, |c| c.is_ascii_alphanumeric() || b"%_.-$".contains(c)),
            _ => at + usize::from(text.get(at) == Some(&expected)),
        };
        if end == at {
            return None;
        }
        if expected == b'$' {
            let name = usize::from(pattern.next()? - b'0');
            let operand = String::from_utf8_lossy(&text[at..end]).into_owned();
            match operands.get(name - 1) {
                // The same operand again.
                Some(known) if *known != operand => return None,
                Some(_) => {}
                None => operands.push(operand),
            }
        }
        at = end;
    }
    Some((at, operands))
}

#[test]
fn edits_fit_exactly_or_fail() {
    let ptx = ".entry a(\n)\n{\n\tadd.s32 \t%r1, %r2, 1;\n\tadd.s32 \t%r3, %r2, -4;\n\n}\n.entry b()\n{\n\tadd.s32 %r9, %r9, 1;\n\n}\n";
    let edit = |find, with, which, of| [Edit { kernel: "a", find, with, which, of }];
    let swapped = apply(ptx, &edit("add.s32 $1, $2, $3;", "sub.s32 $1, $3, $2;", 1..2, 2))
        .expect("two additions");
    assert!(
        swapped.contains("sub.s32 %r3, -4, %r2;") && swapped.contains("add.s32 \t%r1, %r2, 1;")
    );
    assert!(swapped.ends_with(&ptx[ptx.find(".entry b").unwrap_or(0)..]), "only in its kernel");
    assert!(apply(ptx, &edit("add.s32 $1, $2, $3;", "", 0..1, 3)).is_err(), "as often as said");
    assert!(
        apply(ptx, &edit("add.s32 $1, $1, $2;", "", 0..1, 1)).is_err(),
        "$1 twice is the same operand twice"
    );
    assert!(apply(ptx, &edit("add.s32 $1, $2, $3;", "", 2..3, 2)).is_err(), "which is one of them");
}
