//! What the driver provides to kernels: `vprintf` and `__assertfail`. Both take their arguments in parameter
//! variables, which live in local memory.

use super::LOCAL_WINDOW;
use super::access::{generic, request};
use super::block::Surroundings;
use super::grid::Grid;
use super::warp::Warp;
use crate::Class;
use crate::decode::op::{Builtin, Semantics, Space};
use crate::memory::{Fault, Lanes};

impl Warp {
    #[expect(clippy::too_many_arguments, reason = "the fields of one instruction")]
    pub(super) fn call(
        &mut self,
        grid: &mut Grid<'_>,
        around: &mut Surroundings<'_>,
        builtin: Builtin,
        result: u32,
        params: [u32; 5],
        pc: u32,
        active: u32,
    ) -> Result<(), Fault> {
        let mut results: Lanes = [[0; 16]; 32];
        for lane in (0..32u32).filter(|l| active >> l & 1 == 1) {
            let mut reader = Reader { warp: self, grid, around, lane, pc };
            match builtin {
                Builtin::Printf => {
                    let format = reader.local(params[0], 8)?;
                    let arguments = reader.local(params[1], 8)?;
                    let (text, count) = reader.format(format, arguments)?;
                    grid.printed += &text;
                    // `printf` answers the number of arguments.
                    results[lane as usize][..4].copy_from_slice(&count.to_le_bytes());
                }
                Builtin::AssertFail => {
                    let message = reader.local(params[0], 8)?;
                    let file = reader.local(params[1], 8)?;
                    let line = reader.local(params[2], 4)?;
                    let function = reader.local(params[3], 8)?;
                    let message = format!(
                        "{}:{line}: {}: assertion `{}` failed",
                        reader.text(file)?,
                        reader.text(function)?,
                        reader.text(message)?
                    );
                    return Err(Fault::new(Class::Assert, Some(lane), message));
                }
            }
        }
        if result != u32::MAX {
            let at = [u64::from(result); 32];
            let r = request(self, active, &at, 4, Semantics::WEAK, pc);
            self.store(grid, around, Space::Local, &r, &results)?;
        }
        Ok(())
    }
}

/// Memory as one lane sees it.
struct Reader<'r, 'g, 's> {
    warp: &'r mut Warp,
    grid: &'r mut Grid<'g>,
    around: &'r mut Surroundings<'s>,
    lane: u32,
    pc: u32,
}

impl Reader<'_, '_, '_> {
    fn local(&mut self, offset: u32, width: u32) -> Result<u64, Fault> {
        self.read(LOCAL_WINDOW | u64::from(offset), width)
    }

    fn read(&mut self, address: u64, width: u32) -> Result<u64, Fault> {
        let (space, offset) = generic(address);
        let at = [offset; 32];
        let r = request(self.warp, 1 << self.lane, &at, width, Semantics::WEAK, self.pc);
        let mut data: Lanes = [[0; 16]; 32];
        self.warp.load(self.grid, self.around, space, &r, &mut data)?;
        let bytes = &data[self.lane as usize];
        Ok(u64::from_le_bytes(bytes[..8].try_into().expect("eight of sixteen bytes")))
    }

    fn text(&mut self, address: u64) -> Result<String, Fault> {
        let mut bytes = Vec::new();
        loop {
            match self.read(address + bytes.len() as u64, 1)? as u8 {
                0 => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
                byte => bytes.push(byte),
            }
        }
    }

    /// C's format, with arguments packed as C promotes them: 4 bytes for int, 8 for long, pointers and double.
    fn format(&mut self, format: u64, arguments: u64) -> Result<(String, u32), Fault> {
        let format = self.text(format)?;
        let mut out = String::new();
        let (mut offset, mut count) = (0u64, 0);
        let mut chars = format.chars().peekable();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut spec = String::new();
            let mut long = false;
            let conversion = loop {
                match chars.next() {
                    Some('l' | 'z' | 'j' | 't') => long = true,
                    Some('h') => {}
                    Some(c) if c.is_ascii_digit() || "-+ #.".contains(c) => spec.push(c),
                    other => break other,
                }
            };
            let mut argument = |reader: &mut Self, width: u32| {
                count += 1;
                offset = offset.next_multiple_of(width.into());
                offset += u64::from(width);
                reader.read(arguments + offset - u64::from(width), width)
            };
            let width = if long { 8 } else { 4 };
            let value = match conversion {
                Some('%') => "%".to_owned(),
                Some('d' | 'i') => {
                    let v = argument(self, width)?;
                    if long { (v as i64).to_string() } else { (v as i32).to_string() }
                }
                Some('u') => argument(self, width)?.to_string(),
                Some('x') => format!("{:x}", argument(self, width)?),
                Some('X') => format!("{:X}", argument(self, width)?),
                Some('o') => format!("{:o}", argument(self, width)?),
                Some('c') => char::from(argument(self, 4)? as u8).to_string(),
                Some('p') => format!("{:#x}", argument(self, 8)?),
                Some('s') => {
                    let at = argument(self, 8)?;
                    self.text(at)?
                }
                Some('f' | 'F' | 'e' | 'E' | 'g' | 'G') => {
                    let v = f64::from_bits(argument(self, 8)?);
                    let digits =
                        spec.split_once('.').and_then(|(_, d)| d.parse().ok()).unwrap_or(6);
                    match conversion {
                        Some('f' | 'F') => format!("{v:.digits$}"),
                        Some('e' | 'E') => format!("{v:.digits$e}"),
                        _ => format!("{v}"),
                    }
                }
                other => {
                    let message =
                        format!("expected a printf conversion, got {other:?} in `{format}`");
                    return Err(Fault::new(Class::Unsupported, Some(self.lane), message));
                }
            };
            let columns = spec.split('.').next().unwrap_or_default();
            let pad =
                columns.trim_start_matches(['-', '+', ' ', '#']).parse::<usize>().unwrap_or(0);
            out += &match (columns.contains('-'), columns.starts_with('0')) {
                (true, _) => format!("{value:<pad$}"),
                (false, true) => format!("{value:0>pad$}"),
                (false, false) => format!("{value:>pad$}"),
            };
        }
        Ok((out, count))
    }
}
