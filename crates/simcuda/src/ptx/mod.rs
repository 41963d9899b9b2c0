//! PTX modules: text in, decoded kernels out.

pub mod ast;
mod lexer;
mod parser;

use std::fmt;

use crate::decode::{self, Code};

/// A loaded module.
#[derive(Debug)]
pub struct Module {
    /// `.version`, major and minor.
    pub version: (u32, u32),
    /// `.target`, the number: 80 for sm_80.
    pub target: u32,
    pub kernels: Vec<Kernel>,
    /// `.global` and `.const` variables.
    pub variables: Vec<Variable>,
}

/// An `.entry`.
#[derive(Debug)]
pub struct Kernel {
    pub name: String,
    pub params: Vec<Param>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// Bytes of statically declared `.shared` variables, as the device lays them out.
    pub shared_bytes: u32,
    pub local_bytes: u32,
    /// `.maxntid`, if given.
    pub max_threads: Option<[u32; 3]>,
    /// Registers per thread, from a line `// simcuda registers NAME N` (ptxas knows, PTX does not); else 32.
    pub registers: u32,
    pub(crate) code: Code,
}

/// A kernel parameter.
#[derive(Debug)]
pub struct Param {
    pub offset: u32,
    pub bytes: u32,
}

/// A module variable.
#[derive(Debug)]
pub struct Variable {
    pub name: String,
    pub constant: bool,
    pub bytes: u32,
    /// As long as the variable; what has no initialiser is zero (PTX ISA, "Initializers").
    pub init: Vec<u8>,
    /// Offsets in `init` that take the address of another variable.
    pub addresses: Vec<(u32, usize)>,
}

/// Why a module was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// 1-based line of the PTX text.
    pub line: u32,
    /// Names what was expected and what came, quotes the line.
    pub message: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

/// Registers per thread where nobody says.
const DEFAULT_REGISTERS: u32 = 32;

impl Module {
    /// Parses, checks operand types and decodes. Unknown directives, opcodes and modifiers are errors.
    pub fn load(text: &str) -> Result<Self, LoadError> {
        let file = parser::parse(text)?;
        let lines: Vec<&str> = text.lines().collect();
        let mut kernels = Vec::new();
        for function in file.functions.iter().filter(|f| f.entry) {
            let (code, shared) = decode::decode(&file, function, &lines)?;
            let mut params = Vec::new();
            let mut param_bytes = 0u32;
            for p in &function.params {
                let offset = param_bytes.next_multiple_of(p.align);
                params.push(Param { offset, bytes: p.bytes });
                param_bytes = offset + p.bytes;
            }
            kernels.push(Kernel {
                name: function.name.clone(),
                params,
                param_bytes,
                shared_bytes: shared.real_bytes,
                local_bytes: code.local_bytes,
                max_threads: function.max_threads,
                registers: registers(&lines, &function.name).unwrap_or(DEFAULT_REGISTERS),
                code,
            });
        }
        let index = |name: &str| file.variables.iter().position(|v| v.name == name);
        let mut variables = Vec::new();
        for v in &file.variables {
            let mut init = v.init.clone();
            init.resize(v.bytes as usize, 0);
            let mut addresses = Vec::new();
            for (offset, name) in &v.init_names {
                let target = index(name).ok_or_else(|| LoadError {
                    line: 1,
                    message: format!(
                        "expected a variable in the initialiser of `{}`, got `{name}`",
                        v.name
                    ),
                })?;
                addresses.push((*offset, target));
            }
            let constant = v.space == ast::Space::Const;
            let name = v.name.clone();
            variables.push(Variable { name, constant, bytes: v.bytes, init, addresses });
        }
        Ok(Self { version: file.version, target: file.target, kernels, variables })
    }

    /// Gives the variables their addresses, one each in their order, before the first launch.
    pub fn place(&mut self, addresses: &[u64]) {
        for kernel in &mut self.kernels {
            for constant in &mut kernel.code.constants {
                if let Some(i) = constant.variable {
                    constant.bits = constant.bits.wrapping_add(addresses[i]);
                }
            }
        }
        for v in &mut self.variables {
            for (offset, target) in &v.addresses {
                let at = *offset as usize;
                v.init[at..at + 8].copy_from_slice(&addresses[*target].to_le_bytes());
            }
        }
    }
}

fn registers(lines: &[&str], kernel: &str) -> Option<u32> {
    lines.iter().rev().find_map(|line| {
        let mut words = line.strip_prefix("// simcuda registers ")?.split_whitespace();
        (words.next()? == kernel).then(|| words.next()?.parse().ok()).flatten()
    })
}
